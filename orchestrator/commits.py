"""From "every rank's part is durable" to "the checkpoint exists": check, merge, manifest. The commit record is the logbook's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from keepstep.storage.canonical import sha256_hex
from keepstep.storage.errors import IncompleteCheckpoint, NotFound, StoreError
from keepstep.storage.faults import fault_point
from keepstep.storage.layout import (
    MANIFEST_NAME,
    attempt_directory,
    checkpoint_directory,
    parse_checkpoint_directory,
    parse_rank_index_name,
    rank_index_name,
)
from keepstep.storage.lineage import Lineage
from keepstep.storage.manifest import Manifest, RankIndex, merge
from keepstep.storage.records import Attempt
from keepstep.storage.store import Store

from . import events as ev


class InvalidCheckpoint(Exception):
    """The parts do not make a checkpoint, and never will."""


def write_manifest(store: Store, request: ev.Commit) -> Manifest:
    """Checks the ranks' indexes and writes the manifest beside them. Two coordinators write the same bytes.

    Raises:
        InvalidCheckpoint: an index is not what its rank reported, or the indexes do not cover the tensors.
        StoreError: the storage was in the way.
    """
    fault_point("coordinator.manifest.before", step=request.step)
    bodies = _read_indexes(store, request.directory, [part.rank for part in request.indexes])
    for part, (key, body) in zip(request.indexes, bodies.items(), strict=True):
        if sha256_hex(body) != part.index_sha256:
            raise InvalidCheckpoint(f"{key} is not what rank {part.rank} reported")
    manifest = _put_manifest(store, bodies)
    fault_point("coordinator.manifest.after", step=request.step)
    return manifest


def complete_newest(store: Store, lineage: Lineage) -> list[Manifest]:
    """The newest directory of the newest attempt that is whole and newer than every commit, its manifest written; empty if there is none.
    Before it comes the one with the best evaluation up to it, if nobody has committed that either.

    Whoever should have committed them died before the record. Older attempts' directories do not count: theirs would be void.

    Raises:
        StoreError: the storage was in the way.
    """
    attempt = lineage.newest_attempt()
    if attempt is None or lineage.rewound:
        return []
    whole = list(_whole_directories(store, attempt, lineage.committed_step))
    newest = next(filter(None, (_completed(store, attempt, directory) for directory in whole)), None)
    if newest is None:
        return []
    best = checkpoint_directory(attempt.attempt, max(newest.best_step, 0), attempt.nonce)
    is_left = best in whole and best != newest.directory
    return [*filter(None, [_completed(store, attempt, best) if is_left else None]), newest]


def _completed(store: Store, attempt: Attempt, directory: str) -> Manifest | None:
    """None where its parts do not fit together: it stays uncommitted and is swept as garbage one day."""
    try:
        return _put_manifest(store, _read_indexes(store, directory, range(attempt.world_size)))
    except InvalidCheckpoint:
        return None


def _whole_directories(store: Store, attempt: Attempt, after_step: int) -> Iterable[str]:
    """Those in which every rank's index lies, the newest first."""
    ranks: dict[str, set[int]] = defaultdict(set)
    for key in store.list(attempt_directory(attempt.attempt)):
        directory, _, name = key.rpartition("/")
        if (rank := parse_rank_index_name(name)) is not None:
            ranks[directory].add(rank)
    steps = (parsed[1] for directory in ranks if (parsed := parse_checkpoint_directory(directory)))
    for step in sorted((step for step in steps if step > after_step), reverse=True):
        directory = checkpoint_directory(attempt.attempt, step, attempt.nonce)
        if ranks.get(directory) == set(range(attempt.world_size)):
            yield directory


def _read_indexes(store: Store, directory: str, ranks: Iterable[int]) -> dict[str, bytes]:
    """By key, in the order of `ranks`."""
    keys = [f"{directory}/{rank_index_name(rank)}" for rank in ranks]
    return {key: _found(body, key) for body, key in zip(store.get_many(keys), keys, strict=True)}


def _found(body: bytes | StoreError, key: str) -> bytes:
    if isinstance(body, NotFound):
        raise InvalidCheckpoint(f"{key} is gone")
    if isinstance(body, StoreError):
        raise body
    return body


def _parsed(body: bytes, key: str) -> RankIndex:
    try:
        return RankIndex.parse(body)
    except ValueError as error:
        raise InvalidCheckpoint(f"{key}: {error}") from error


def _put_manifest(store: Store, bodies: Mapping[str, bytes]) -> Manifest:
    try:
        manifest = merge([_parsed(body, key) for key, body in bodies.items()])
    except IncompleteCheckpoint as error:
        raise InvalidCheckpoint(str(error)) from error
    key = f"{manifest.directory}/{MANIFEST_NAME}"
    if not store.put_new(key, manifest.body()):
        raise InvalidCheckpoint(f"{key} exists with other content")
    return manifest
