"""Which checkpoints may go. Pure.

Kept: the newest `keep` verified ones, whatever is newer than the newest verified one (it may be all we have if that one fails),
pins, and every `every`-th step. When that would leave none, nothing goes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from .layout import parse_checkpoint_directory
from .lineage import Lineage


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    retire: tuple[str, ...]  # directories, oldest first
    why: str


def choose_retired(lineage: Lineage, *, keep: int, verified: Collection[str], every: int = 0) -> Retention:
    """The committed checkpoints that may be retired now.

    Args:
        keep: at least so many verified checkpoints stay.
        verified: directories whose bytes were read back and found right (or whose writing was acknowledged, at the caller's choice).
        every: checkpoints whose step is a multiple of it stay for ever; 0 switches this off.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep} must be at least 1")
    usable = [commit for commit in lineage.commits if lineage.is_usable(commit)]
    good = [commit.directory for commit in usable if commit.directory in verified]
    if not good:
        return Retention(retire=(), why=f"nothing retired: none of {len(usable)} checkpoints is verified")
    oldest_kept = good[-keep:][0]
    directories = [commit.directory for commit in usable]
    old = usable[: directories.index(oldest_kept)]
    gone = [commit for commit in old if commit.directory not in lineage.pinned and not (every and commit.step % every == 0)]
    left_history = [commit for commit in lineage.abandoned if lineage.is_usable(commit) and commit.directory not in lineage.pinned]
    retire = tuple(commit.directory for commit in (*left_history, *gone))
    return Retention(retire=retire, why=f"retire {len(retire)} of {len(usable) + len(left_history)}: {min(keep, len(good))} verified stay")


def garbage(lineage: Lineage, directories: Iterable[str]) -> tuple[str, ...]:
    """Checkpoint directories that nobody can ever commit: of attempts before the newest, without a commit record."""
    newest = lineage.newest_attempt()
    committed = {commit.directory for commit in (*lineage.commits, *lineage.abandoned)}
    found = ((directory, parse_checkpoint_directory(directory)) for directory in directories)
    return tuple(directory for directory, of in found if of and newest and of[0] < newest.attempt and directory not in committed)
