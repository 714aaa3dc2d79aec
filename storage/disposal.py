"""Deleting checkpoint directories: those that the log has let go of, and those that nobody can ever commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from .faults import fault_point
from .layout import DATA, MANIFEST_NAME, directory_of, rank_index_name
from .lineage import Lineage
from .retention import garbage
from .store import Modified, Store

GRACE_S: Final = 900.0  # a process of an older attempt may still be writing; its next file would bring the directory back
UPLOAD_GRACE_S: Final = 86_400.0  # the longest that one file may take to write


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftovers:
    """Directories below data/ without a live commit."""

    garbage: tuple[str, ...]  # may be deleted now
    stays: Mapping[str, str]  # directory -> why it must not, or not yet


def find_leftovers(store: Store, lineage: Lineage, *, is_log_whole: bool, grace_s: float = GRACE_S) -> Leftovers:
    """What lies below data/ beside the committed checkpoints.

    Safe with a lineage that is older than the log: what can never be committed stays so.

    Args:
        is_log_whole: no record of the log is corrupt or missing. Otherwise the lost one may be the commit of any directory that has
            a manifest, so all of those stay.
        grace_s: what was written to more recently stays, by the store's clock.

    Raises:
        StoreError: the store could not be asked.
    """
    found = store.modified(DATA)
    live = {commit.directory for commit in lineage.live}
    written_at = {directory: at for directory, at in _newest_files(found).items() if directory not in live}
    dead = frozenset(garbage(lineage, written_at))
    stays = {
        directory: why
        for directory, at in written_at.items()
        if (
            why := _why_stays(directory, found, age_s=found.now - at, grace_s=grace_s, is_dead=directory in dead, is_log_whole=is_log_whole)
        )
    }
    return Leftovers(garbage=tuple(sorted(dead - stays.keys())), stays=stays)


def _newest_files(found: Modified) -> dict[str, float]:
    """Each checkpoint directory, and when somebody wrote to it last."""
    newest: dict[str, float] = {}
    for key, at in found.at.items():
        if directory := directory_of(key):
            newest[directory] = max(at, newest.get(directory, at))
    return newest


def _why_stays(directory: str, found: Modified, *, age_s: float, grace_s: float, is_dead: bool, is_log_whole: bool) -> str:
    """ "" if it may go."""
    if not is_dead:
        return "its attempt may still commit it"
    if age_s <= grace_s:
        return f"written to {max(0.0, age_s):.0f} s ago, goes after {grace_s:.0f} s"
    if not is_log_whole and f"{directory}/{MANIFEST_NAME}" in found.at:
        return "a record of the run log is corrupt, it may have been this one's commit"
    return ""


def dispose(store: Store, directory: str) -> None:
    """Deletes a checkpoint directory. What vouches for its bytes goes first: a crash leaves nothing that looks whole.

    Raises:
        StoreError: some of it may be left. Call again.
    """
    store.delete(f"{directory}/{MANIFEST_NAME}")
    store.delete(f"{directory}/{rank_index_name(0)}")
    fault_point("dispose.middle", directory=directory)
    store.delete_tree(directory)
