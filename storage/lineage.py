"""What the records of the run log mean, folded one by one. Pure.

The history is `Lineage.commits`: a chain, oldest first, in which each commit's attempt resumed from the commit before it (or made it).
A new attempt cuts the chain at the commit it resumes from; what came after leaves the history (a rewind, a damaged checkpoint).
A record that `refusal` objects to is void: it changes nothing, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, assert_never

from .records import Attempt, Commit, Failed, Finished, Opened, Pin, Quarantine, Record, Retire


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Steps after `after` up to `last` of the history were computed by `attempt`; provisional: not committed yet (`last` is None)."""

    attempt: int
    after: int
    last: int | None

    def holds(self, step: int) -> bool:
        return step > self.after and (self.last is None or step <= self.last)


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryStep:
    step: int
    attempt: int
    provisional: bool
    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """All that the run log says up to some record."""

    opened: Opened | None = None  # the newest
    run: str = ""
    identity: str = ""
    attempts: tuple[Attempt, ...] = ()
    commits: tuple[Commit, ...] = ()  # the history, oldest first
    abandoned: tuple[Commit, ...] = ()  # commits that left the history
    quarantined: frozenset[str] = frozenset()  # directories
    pinned: frozenset[str] = frozenset()
    retired: frozenset[str] = frozenset()
    outcome: Finished | Failed | None = None  # since the newest attempt

    @property
    def term(self) -> int:
        return self.opened.term if self.opened else 0

    def newest_attempt(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    def newest_committed(self) -> Commit | None:
        """The checkpoint to resume from: the newest of the history that is neither quarantined nor retired."""
        return next((commit for commit in reversed(self.commits) if self.is_usable(commit)), None)

    def is_usable(self, commit: Commit) -> bool:
        return commit.directory not in self.quarantined and commit.directory not in self.retired

    def commit_of(self, directory: str) -> Commit | None:
        """The commit of a directory, in the history or abandoned."""
        return next((commit for commit in (*self.commits, *self.abandoned) if commit.directory == directory), None)

    def segments(self) -> tuple[Segment, ...]:
        """Which attempt computed which steps of the history; the last one, if any, is the running attempt's uncommitted part."""
        befores = (-1, *(commit.step for commit in self.commits))
        committed = tuple(
            Segment(attempt=commit.attempt, after=before, last=commit.step) for before, commit in zip(befores, self.commits, strict=False)
        )
        running = self.newest_attempt()
        return (*committed, Segment(attempt=running.attempt, after=befores[-1], last=None)) if running else committed

    def history(self, records: Mapping[int, Sequence[Mapping[str, Any]]]) -> tuple[HistoryStep, ...]:
        """The step records that count, in step order.

        Args:
            records: for each attempt the records of its steps file; each has an int under "step". Others were lost work.
        """
        return tuple(step for segment in self.segments() for step in _steps_of(segment, records.get(segment.attempt, ())))


def _steps_of(segment: Segment, records: Sequence[Mapping[str, Any]]) -> tuple[HistoryStep, ...]:
    of_step = {record["step"]: record for record in records if segment.holds(record["step"])}
    provisional = segment.last is None
    return tuple(HistoryStep(step=step, attempt=segment.attempt, provisional=provisional, record=of_step[step]) for step in sorted(of_step))


def fold(lineage: Lineage, record: Record) -> Lineage:
    """The lineage after one more record; unchanged if the record is void."""
    return lineage if refusal(lineage, record) else _apply(lineage, record)


def _apply(lineage: Lineage, record: Record) -> Lineage:
    match record:
        case Opened():
            return replace(lineage, opened=record, run=record.run, identity=record.identity)
        case Attempt():
            return _begin_attempt(lineage, record)
        case Commit():
            return replace(lineage, commits=(*lineage.commits, record))
        case Quarantine():
            return replace(lineage, quarantined=lineage.quarantined | {record.directory})
        case Pin():
            pinned = lineage.pinned | {record.directory} if record.pinned else lineage.pinned - {record.directory}
            return replace(lineage, pinned=pinned)
        case Retire():
            return replace(lineage, retired=lineage.retired | set(record.directories))
        case Finished() | Failed():
            return replace(lineage, outcome=record)
        case _:
            assert_never(record)


def _begin_attempt(lineage: Lineage, record: Attempt) -> Lineage:
    directories = [commit.directory for commit in lineage.commits]
    kept = directories.index(record.resume_directory) + 1 if record.resume_directory else 0
    return replace(
        lineage,
        attempts=(*lineage.attempts, record),
        commits=lineage.commits[:kept],
        abandoned=(*lineage.abandoned, *lineage.commits[kept:]),
        outcome=None,
    )


def refusal(lineage: Lineage, record: Record) -> str:
    """Why this record would be void here, as a sentence; "" if it counts."""
    if isinstance(record, Opened):
        return _refuse_opened(lineage, record)
    if record.term != lineage.term:
        return f"{type(record).__name__.lower()} of term {record.term} while term {lineage.term} is open"
    match record:
        case Attempt():
            return _refuse_attempt(lineage, record)
        case Commit():
            return _refuse_commit(lineage, record)
        case Retire():
            return _refuse_retire(lineage, record)
        case Quarantine() | Pin():
            return "" if lineage.commit_of(record.directory) else f"{record.directory} was never committed"
        case Finished() | Failed():
            return ""
        case _:
            assert_never(record)


def _refuse_opened(lineage: Lineage, record: Opened) -> str:
    if record.term <= lineage.term:
        return f"term {record.term} was opened after term {lineage.term}"
    if lineage.opened and record.identity != lineage.identity:
        return f"the root holds run {lineage.run!r} with identity {lineage.identity}, not {record.run!r} with {record.identity}"
    return ""


def _refuse_attempt(lineage: Lineage, record: Attempt) -> str:
    newest = lineage.newest_attempt()
    if newest and record.attempt <= newest.attempt:
        return f"attempt {record.attempt} came after attempt {newest.attempt}: numbers are never reused"
    if not record.resume_directory:
        return "" if record.resume_step == -1 else f"attempt {record.attempt} resumes from step {record.resume_step} without a directory"
    source = next((commit for commit in lineage.commits if commit.directory == record.resume_directory), None)
    if source is None or not lineage.is_usable(source):
        return f"attempt {record.attempt} resumes from {record.resume_directory}, which is not a usable commit of the history"
    if source.step != record.resume_step:
        return f"attempt {record.attempt} calls {source.directory} step {record.resume_step}, it was committed as step {source.step}"
    return ""


def _refuse_commit(lineage: Lineage, record: Commit) -> str:
    newest = lineage.newest_attempt()
    if newest is None or record.attempt != newest.attempt:
        return f"commit of attempt {record.attempt} while attempt {newest.attempt if newest else 'none'} runs"
    if lineage.commits and record.step <= lineage.commits[-1].step:
        return f"commit of step {record.step} after step {lineage.commits[-1].step}"
    return ""


def _refuse_retire(lineage: Lineage, record: Retire) -> str:
    left = [commit for commit in lineage.commits if lineage.is_usable(commit) and commit.directory not in record.directories]
    if lineage.newest_committed() and not left:
        return "it would retire the last usable checkpoint"
    return ""
