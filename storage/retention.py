"""Which checkpoints may go, and why the others stay. Pure.

Kept: the newest `keep` verified ones, what is newer than the newest of them (it may be all we have if that one fails), pins, one per
`every` steps, damaged ones as evidence until `keep` newer ones are good, and for each of these the one with the best evaluation up to it:
whoever goes back to it finds its best. Commits that left the history go when nobody pinned them.
When nothing at all is verified, nothing goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .layout import parse_checkpoint_directory
from .lineage import Lineage
from .records import Commit


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What goes, what stays, and why."""

    goes: Mapping[str, str]  # directory -> the reason, in the order of `Lineage.live`
    stays: Mapping[str, str]
    why: str

    @property
    def retire(self) -> tuple[str, ...]:
        """Directories."""
        return tuple(self.goes)


def choose_retired(lineage: Lineage, *, keep: int, every: int = 0, trust_writes: bool = False) -> Retention:
    """The committed checkpoints that may be retired now. Retiring them never leaves fewer than one verified one where there was one.

    Args:
        keep: so many verified checkpoints stay; while there are fewer, the newest unverified ones take their places.
        every: the first checkpoint at or after each multiple of so many steps stays for ever; 0 switches this off.
        trust_writes: what the store acknowledged counts as verified (nobody reads it back).
    """
    if keep < 1:
        raise ValueError(f"keep = {keep} must be at least 1")
    usable = [commit for commit in lineage.commits if commit.directory not in lineage.quarantined]
    good = [commit for commit in usable if trust_writes or commit.directory in lineage.verified]
    if not good:
        why = f"nothing retired: none of {len(usable)} usable checkpoints is verified yet"
        return Retention(goes={}, stays={commit.directory: "nothing is verified yet" for commit in lineage.live}, why=why)
    stays = _reasons(lineage, usable, good, keep, every)
    goes = {commit.directory: _why_goes(lineage, commit, keep) for commit in lineage.live if commit.directory not in stays}
    why = f"{len(goes)} of {len(lineage.live)} retired, {min(keep, len(good))} verified ones stay"
    return Retention(goes=goes, stays=stays, why=why)


def _why_goes(lineage: Lineage, commit: Commit, keep: int) -> str:
    if commit.directory in lineage.quarantined:
        return f"damaged, and {keep} newer ones are verified"
    return "left the history" if commit in lineage.abandoned else f"not among the newest {keep} verified"


def _reasons(lineage: Lineage, usable: Sequence[Commit], good: Sequence[Commit], keep: int, every: int) -> dict[str, str]:
    """Directory -> why it stays; the strongest reason where there are several."""
    unverified = sorted(set(usable) - set(good), key=lambda commit: commit.step)
    places = max(0, keep - len(good))
    groups: tuple[tuple[Iterable[Commit], str], ...] = (
        ((commit for commit in lineage.live if commit.directory in lineage.pinned & lineage.tips), "pinned: the last before a rewind"),
        ((commit for commit in lineage.live if commit.directory in lineage.pinned), "pinned"),
        (good[-keep:], f"among the newest {keep} verified"),
        ([commit for commit in usable if commit.directory in lineage.verified][-1:], "the newest that was read back"),
        ((commit for commit in usable if commit.step > good[-1].step), "newer than the newest verified"),
        (unverified[len(unverified) - places :], f"only {len(good)} of {keep} wanted are verified"),
        (_milestones(usable, every), f"one per {every} steps"),
        (_evidence(lineage, good, keep), f"damaged: evidence until {keep} newer ones are verified"),
    )
    reasons: dict[str, str] = {}
    for commits, why in groups:
        for commit in commits:
            reasons.setdefault(commit.directory, why)
    for commit in usable:
        if commit.directory in reasons and (best := lineage.best(commit)):
            reasons.setdefault(best.directory, f"the best evaluation, as of step {commit.step}")
    return reasons


def _milestones(usable: Sequence[Commit], every: int) -> Sequence[Commit]:
    """The first one at or after each multiple of `every`: intervals in seconds hit no multiple exactly."""
    if not every:
        return ()
    first: dict[int, Commit] = {}
    for commit in usable:
        first.setdefault(commit.step // every, commit)
    return [commit for number, commit in first.items() if number]


def _evidence(lineage: Lineage, good: Sequence[Commit], keep: int) -> Iterable[Commit]:
    damaged = (commit for commit in lineage.live if commit.directory in lineage.quarantined)
    return (commit for commit in damaged if sum(_came_after(newer, commit) for newer in good) < keep)


def _came_after(one: Commit, other: Commit) -> bool:
    return (one.attempt, one.step) > (other.attempt, other.step)


def garbage(lineage: Lineage, directories: Iterable[str]) -> tuple[str, ...]:
    """Those below data/ that are no live commit and that nobody can ever commit, whatever is appended to the log.

    Only the newest attempt commits, unless it was rewound, and only steps beyond its newest commit: what `lineage.refusal` objects to.
    """
    newest = lineage.newest_attempt()
    if newest is None:
        return ()
    live = {commit.directory for commit in lineage.live}
    reached = (newest.attempt + 1, -1) if lineage.rewound else (newest.attempt, lineage.committed_step)
    found = ((directory, parse_checkpoint_directory(directory)) for directory in directories)
    return tuple(directory for directory, of in found if of and of <= reached and directory not in live)
