"""From "every rank's part is durable" to "the checkpoint exists": check, merge, manifest, commit record."""

from __future__ import annotations

from keepstep.storage.canonical import sha256_hex
from keepstep.storage.errors import IncompleteCheckpoint, NotFound, StoreError
from keepstep.storage.faults import fault_point
from keepstep.storage.layout import MANIFEST_NAME, rank_index_name
from keepstep.storage.manifest import Manifest, RankIndex, merge
from keepstep.storage.store import Store

from . import events as ev
from .wire import Persisted


class InvalidCheckpoint(Exception):
    """The parts do not make a checkpoint, and never will."""


def write_manifest(store: Store, request: ev.Commit) -> str:
    """Checks the ranks' indexes and writes the manifest beside them; its SHA-256. Two coordinators write the same bytes.

    Raises:
        InvalidCheckpoint: an index is not what its rank reported, or the indexes do not cover the tensors.
        StoreError: the storage was in the way.
    """
    fault_point("coordinator.manifest.before", step=request.step)
    manifest = _merged(_read_indexes(store, request))
    key, body = f"{request.directory}/{MANIFEST_NAME}", manifest.body()
    if not store.put_new(key, body):
        raise InvalidCheckpoint(f"{key} exists with other content")
    fault_point("coordinator.manifest.after", step=request.step)
    return manifest.sha256()


def _read_indexes(store: Store, request: ev.Commit) -> list[RankIndex]:
    keys = [f"{request.directory}/{rank_index_name(part.rank)}" for part in request.indexes]
    return [_checked(body, part, key) for body, part, key in zip(store.get_many(keys), request.indexes, keys, strict=True)]


def _checked(body: bytes | StoreError, part: Persisted, key: str) -> RankIndex:
    if isinstance(body, NotFound):
        raise InvalidCheckpoint(f"{key} is gone")
    if isinstance(body, StoreError):
        raise body
    if sha256_hex(body) != part.index_sha256:
        raise InvalidCheckpoint(f"{key} is not what rank {part.rank} reported")
    try:
        return RankIndex.parse(body)
    except ValueError as error:
        raise InvalidCheckpoint(f"{key}: {error}") from error


def _merged(indexes: list[RankIndex]) -> Manifest:
    try:
        return merge(indexes)
    except IncompleteCheckpoint as error:
        raise InvalidCheckpoint(str(error)) from error
