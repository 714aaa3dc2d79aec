"""What the records of the run log mean, folded one by one. Pure.

The history is a chain of commits, oldest first, in which each commit's attempt resumed from the commit before it (or made it).
A new attempt cuts the chain at the commit it resumes from; what came after leaves the history (a damaged checkpoint). A rewind cuts it
before the next attempt begins, and says what that attempt and all later ones leave out. Every attempt says so again, in full: a rewind that
is lost brings no skipped sample back.
A record that `refusal` objects to is void: it changes nothing, whoever wrote it.

A lineage keeps what is alive: retired checkpoints are forgotten, but for the steps that their attempts computed. So it stays small
however long the log grows, and a snapshot of it (snapshots.py) is a few kilobytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

from . import skips
from .layout import parse_checkpoint_directory
from .records import Attempt, Commit, Failed, Finished, Opened, Pin, Quarantine, Record, Retire, Rewind, Verified


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
class End:
    """The newest step of the history that an attempt committed, whether or not that checkpoint was retired since."""

    attempt: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """All that the run log says up to some record. A commit is *live* until it is retired."""

    opened: Opened | None = None  # the newest
    attempt: Attempt | None = None  # the newest
    resumed: Commit | None = None  # what the newest attempt resumed from, even if it was retired since
    num_attempts: int = 0
    began_at: str = ""  # `at` of the first attempt
    commits: tuple[Commit, ...] = ()  # the live ones of the history, oldest first; quarantined ones included
    abandoned: tuple[Commit, ...] = ()  # live commits that left the history
    ends: tuple[End, ...] = ()  # one for each attempt of the history that committed, oldest first
    quarantined: frozenset[str] = frozenset()  # directories of live commits, here and below
    pinned: frozenset[str] = frozenset()
    verified: frozenset[str] = frozenset()
    ever_committed: bool = False  # since the beginning of the history, to which a rewind may have led back
    outcome: Finished | Failed | None = None  # since the newest attempt, unless a rewind has made it void
    is_ended: bool = False  # the newest attempt had an outcome, void or not: none of its ranks is to be looked for
    skips: tuple[str, ...] = ()  # in force: for the next attempt, too
    overrides: tuple[str, ...] = ()  # likewise
    rewound: Rewind | None = None  # since the newest attempt: it commits nothing any more
    num_bad_steps: int = 0  # rewinds that no person asked for
    tips: frozenset[str] = frozenset()  # the last checkpoints of histories that rewinds have ended

    @property
    def term(self) -> int:
        return self.opened.term if self.opened else 0

    @property
    def run(self) -> str:
        return self.opened.run if self.opened else ""

    @property
    def identity(self) -> str:
        return self.opened.identity if self.opened else ""

    @property
    def live(self) -> tuple[Commit, ...]:
        """Every checkpoint that exists."""
        return (*self.abandoned, *self.commits)

    @property
    def committed_step(self) -> int:
        """The newest step of the history that was ever committed, -1 before the first: only later steps can be committed."""
        return self.ends[-1].step if self.ends else -1

    def newest_attempt(self) -> Attempt | None:
        return self.attempt

    def newest_committed(self) -> Commit | None:
        """The checkpoint to resume from: the newest live one of the history that is not quarantined."""
        return next((commit for commit in reversed(self.commits) if commit.directory not in self.quarantined), None)

    def newest_until(self, step: int) -> Commit | None:
        """Where a rewind to `step` leads: the newest usable commit of the history at or before it."""
        return next((commit for commit in reversed(self.commits) if commit.step <= step and commit.directory not in self.quarantined), None)

    def best(self, until: Commit | None = None) -> Commit | None:
        """The checkpoint of the history with the best evaluation up to this one, by default the one to resume from: of those that were
        committed and are not damaged. None: there is none."""
        until = until or self.newest_committed()
        usable = {commit.step: commit for commit in self.commits if commit.directory not in self.quarantined}
        steps = (commit.best_step for commit in reversed(self.commits) if until and commit.step <= until.step)
        return next((usable[step] for step in steps if step in usable), None)

    def is_usable(self, commit: Commit) -> bool:
        return commit.directory not in self.quarantined and self.commit_of(commit.directory) is not None

    def commit_of(self, directory: str) -> Commit | None:
        """The live commit of a directory, in the history or abandoned."""
        return next((commit for commit in (*self.commits, *self.abandoned) if commit.directory == directory), None)

    def segments(self) -> tuple[Segment, ...]:
        """Which attempt computed which steps of the history, split at live commits and at changes of the attempt.

        The last one, if there is an attempt that was not rewound, is the running attempt's uncommitted part.
        """
        attempt_of = {end.step: end.attempt for end in self.ends} | {commit.step: commit.attempt for commit in self.commits}
        lasts = sorted(attempt_of)
        committed = tuple(
            Segment(attempt=attempt_of[last], after=before, last=last) for before, last in zip((-1, *lasts), lasts, strict=False)
        )
        running = self.attempt
        if running is None or self.rewound:
            return committed
        return (*committed, Segment(attempt=running.attempt, after=self.committed_step, last=None))

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
    """The lineage after one more record; `lineage` itself if the record is void."""
    folding = Folding(lineage)
    return lineage if folding.add(record) else folding.lineage()


def refusal(lineage: Lineage, record: Record) -> str:
    """Why this record would be void here, as a sentence; "" if it counts."""
    return Folding(lineage).refusal(record)


class Folding:
    """A lineage under construction. Each record costs the same, however many came before; `lineage()` costs what is alive.

    Once a record is lost (`lose`), a later one may prove what it must have been: nobody writes a record that is void when it is written.
    So a rotten `opened` or `attempt` does not take along everything that was done under it.
    """

    def __init__(self, lineage: Lineage, *, has_lost: bool = False) -> None:
        self._has_lost = has_lost
        self._opened = lineage.opened
        self._attempt = lineage.attempt
        self._resumed = lineage.resumed
        self._num_attempts = lineage.num_attempts
        self._began_at = lineage.began_at
        self._commits = {commit.directory: commit for commit in lineage.commits}
        self._abandoned = {commit.directory: commit for commit in lineage.abandoned}
        self._ends = {end.attempt: end.step for end in lineage.ends}
        self._quarantined = set(lineage.quarantined)
        self._pinned = set(lineage.pinned)
        self._verified = set(lineage.verified)
        self._ever_committed = lineage.ever_committed
        self._outcome = lineage.outcome
        self._is_ended = lineage.is_ended
        self._skips = lineage.skips
        self._overrides = lineage.overrides
        self._rewound = lineage.rewound
        self._num_bad_steps = lineage.num_bad_steps
        self._tips = set(lineage.tips)

    @property
    def opened(self) -> Opened | None:
        return self._opened

    @property
    def _term(self) -> int:
        return self._opened.term if self._opened else 0

    def lineage(self) -> Lineage:
        return Lineage(
            opened=self._opened,
            attempt=self._attempt,
            resumed=self._resumed,
            num_attempts=self._num_attempts,
            began_at=self._began_at,
            commits=tuple(self._commits.values()),
            abandoned=tuple(self._abandoned.values()),
            ends=tuple(End(attempt=attempt, step=step) for attempt, step in self._ends.items()),
            quarantined=frozenset(self._quarantined),
            pinned=frozenset(self._pinned),
            verified=frozenset(self._verified),
            ever_committed=self._ever_committed,
            outcome=self._outcome,
            is_ended=self._is_ended,
            skips=self._skips,
            overrides=self._overrides,
            rewound=self._rewound,
            num_bad_steps=self._num_bad_steps,
            tips=frozenset(self._tips),
        )

    def add(self, record: Record) -> str:
        """Takes one more record; why it is void, "" if it counts."""
        if self._has_lost:
            self._imply(record)
        why = self.refusal(record)
        if not why:
            self._apply(record)
        return why

    def lose(self) -> None:
        """A record could not be read."""
        self._has_lost = True

    def _imply(self, record: Record) -> None:
        """What this record proves, and the lost one said."""
        if not isinstance(record, Opened) and record.term > self._term:
            last = self._opened
            self._opened = Opened(
                term=record.term, run=last.run if last else "", identity=last.identity if last else "", host="unknown", pid=0
            )
        if record.term != self._term:
            return  # void: it proves nothing
        if isinstance(record, Commit) and record.attempt > (self._attempt.attempt if self._attempt else 0):
            self._begin_attempt(self._implied_attempt(record))
        if isinstance(record, Attempt) and record.resume_directory and not self._is_live(record.resume_directory):
            self._imply_commit(record.resume_directory, record.resume_step, record.world_size)
        if isinstance(record, Rewind) and record.directory and self._attempt and not self._is_live(record.directory):
            self._go_back(next((commit for commit in reversed(self._commits.values()) if commit.step < record.step), None))
            self._imply_commit(record.directory, record.step, self._attempt.world_size)

    def _implied_attempt(self, record: Commit) -> Attempt:
        """It resumed from the newest checkpoint that could be resumed from, on the nodes of the one before, as far as we know."""
        usable = (commit for commit in reversed(self._commits.values()) if commit.directory not in self._quarantined)
        source = next((commit for commit in usable if commit.step < record.step), None)
        return Attempt(
            term=record.term,
            attempt=record.attempt,
            nodes=self._attempt.nodes if self._attempt else (),
            world_size=record.world_size,
            resume_step=source.step if source else -1,
            resume_directory=source.directory if source else "",
            nonce="",
            skips=self._skips,
            overrides=self._overrides,
        )

    def _imply_commit(self, directory: str, step: int, world_size: int) -> None:
        """Whoever reads this checkpoint finds that it cannot be verified, and takes the one before it."""
        newer = [commit for commit in self._commits.values() if commit.step >= step]
        made_by = parse_checkpoint_directory(directory)
        if newer or made_by is None:
            return
        self._apply(Commit(term=self._term, attempt=made_by[0], step=step, directory=directory, manifest_sha256="", world_size=world_size))

    def _apply(self, record: Record) -> None:
        match record:
            case Opened():
                self._opened = record
            case Attempt():
                self._begin_attempt(record)
            case Commit():
                self._commits[record.directory] = record
                self._ends[record.attempt] = record.step
                self._ever_committed = True
            case Quarantine():
                self._quarantined.add(record.directory)
            case Pin():
                (self._pinned.add if record.pinned else self._pinned.discard)(record.directory)
            case Verified():
                self._verified.add(record.directory)
            case Retire():
                self._retire(record)
            case Rewind():
                self._rewind(record)
            case Finished() | Failed():
                self._outcome, self._is_ended = record, True
            case _:
                assert_never(record)

    def _begin_attempt(self, record: Attempt) -> None:
        self._resumed = self._commits.get(record.resume_directory)
        self._cut(self._resumed)
        self._attempt = record
        self._began_at = self._began_at if self._num_attempts else record.at
        self._num_attempts += 1
        self._outcome, self._is_ended, self._rewound = None, False, None
        self._skips, self._overrides = record.skips, record.overrides

    def _rewind(self, record: Rewind) -> None:
        self._go_back(self._commits.get(record.directory))
        self._ever_committed = bool(record.directory)
        self._skips, self._overrides = record.skips, record.overrides
        self._num_bad_steps += record.bad_step >= 0
        self._outcome, self._rewound = None, record

    def _go_back(self, source: Commit | None) -> None:
        """Cuts the history on purpose: the last checkpoint of what leaves it stays for people to look at."""
        tip = next((commit for commit in reversed(self._commits.values()) if commit.directory not in self._quarantined), None)
        if tip and tip is not source:
            self._pinned.add(tip.directory)
            self._tips.add(tip.directory)
        self._cut(source)

    def _cut(self, source: Commit | None) -> None:
        """What came after `source` leaves the history; everything, for None."""
        left = []
        while self._commits and (newest := next(reversed(self._commits.values()))) is not source:
            left.append(self._commits.pop(newest.directory))
        self._abandoned |= {commit.directory: commit for commit in reversed(left)}
        while self._ends and (source is None or next(reversed(self._ends)) != source.attempt):
            self._ends.popitem()
        if source:
            self._ends[source.attempt] = source.step

    def _retire(self, record: Retire) -> None:
        for directory in record.directories:
            self._commits.pop(directory, None)
            self._abandoned.pop(directory, None)
        for directories in (self._quarantined, self._pinned, self._verified, self._tips):
            directories.difference_update(record.directories)

    def refusal(self, record: Record) -> str:
        """Why this record would be void here, as a sentence; "" if it counts."""
        if isinstance(record, Opened):
            return self._refuse_opened(record)
        if record.term != self._term:
            return f"{type(record).__name__.lower()} of term {record.term} while term {self._term} is open"
        match record:
            case Attempt():
                return self._refuse_attempt(record)
            case Commit():
                return self._refuse_commit(record)
            case Retire():
                return self._refuse_retire(record)
            case Rewind():
                return self._refuse_rewind(record)
            case Quarantine() | Pin() | Verified():
                return "" if self._is_live(record.directory) else f"{record.directory} was never committed, or is retired"
            case Finished() | Failed():
                return ""
            case _:
                assert_never(record)

    def _is_live(self, directory: str) -> bool:
        return directory in self._commits or directory in self._abandoned

    def _refuse_opened(self, record: Opened) -> str:
        opened = self._opened
        if record.term <= self._term:
            return f"term {record.term} was opened after term {self._term}"
        if opened and opened.identity and record.identity != opened.identity:  # none: the first record of the log is lost
            return f"the root holds run {opened.run!r} with identity {opened.identity}, not {record.run!r} with {record.identity}"
        return ""

    def _refuse_attempt(self, record: Attempt) -> str:
        newest = self._attempt
        if newest and record.attempt <= newest.attempt:
            return f"attempt {record.attempt} came after attempt {newest.attempt}: numbers are never reused"
        if why := self._refuse_settings(record):
            return f"attempt {record.attempt} {why}"
        if not record.resume_directory:
            return (
                "" if record.resume_step == -1 else f"attempt {record.attempt} resumes from step {record.resume_step} without a directory"
            )
        source = self._commits.get(record.resume_directory)
        if source is None or source.directory in self._quarantined:
            return f"attempt {record.attempt} resumes from {record.resume_directory}, which is not a usable commit of the history"
        if source.step != record.resume_step:
            return f"attempt {record.attempt} calls {source.directory} step {record.resume_step}, it was committed as step {source.step}"
        return ""

    def _refuse_settings(self, record: Attempt) -> str:
        """A record that is lost may have been a rewind: then more may be skipped, and other overrides may hold, than we know of."""
        if why := self._refuse_skips(record.skips):
            return why
        if self._has_lost or (record.skips, record.overrides) == (self._skips, self._overrides):
            return ""
        return f"has skips {record.skips} and overrides {record.overrides}; in force are {self._skips} and {self._overrides}"

    def _refuse_skips(self, given: tuple[str, ...]) -> str:
        try:
            return "" if skips.cover(given, self._skips) else f"skips {given}, fewer than are skipped already: {self._skips}"
        except ValueError as error:
            return f"skips {given}: {error}"

    def _refuse_rewind(self, record: Rewind) -> str:
        if self._attempt is None:
            return "a rewind before the first attempt"
        if why := self._refuse_skips(record.skips):
            return f"a rewind {why}"
        if not record.directory:
            return "" if record.step == -1 else f"a rewind to step {record.step} without a directory"
        target = self._commits.get(record.directory)
        if target is None or target.directory in self._quarantined:
            return f"a rewind to {record.directory}, which is not a usable commit of the history"
        return "" if target.step == record.step else f"a rewind calls {target.directory} step {record.step}, it is step {target.step}"

    def _refuse_commit(self, record: Commit) -> str:
        newest = self._attempt
        if newest is None or record.attempt != newest.attempt:
            return f"commit of attempt {record.attempt} while attempt {newest.attempt if newest else 'none'} runs"
        if self._rewound:
            return f"commit of attempt {record.attempt}, which was rewound"
        committed_step = next(reversed(self._ends.values()), -1)
        if record.step <= committed_step:
            return f"commit of step {record.step} after step {committed_step}"
        return f"{record.directory} is committed already" if self._is_live(record.directory) else ""

    def _refuse_retire(self, record: Retire) -> str:
        going = set(record.directories)
        if pinned := sorted(going & self._pinned):
            return f"it would retire {', '.join(pinned)}, which {'is' if len(pinned) == 1 else 'are'} pinned"
        attempt, source = self._attempt, self._resumed
        if attempt and not self._rewound and source and source.directory in going and attempt.attempt not in self._ends:
            return f"it would retire {source.directory}, from which attempt {attempt.attempt} is starting"
        if self._rewound and self._rewound.directory in going:
            return f"it would retire {self._rewound.directory}, to which the run was rewound"
        commits = [commit for commit in self._commits.values() if commit.directory not in self._quarantined]
        usable = {commit.directory for commit in commits}
        if usable and usable <= going:
            return "it would retire the last usable checkpoint"
        if any(commit.directory in going and commit.step == commits[-1].best_step for commit in commits):
            return "it would retire the checkpoint with the best evaluation"
        verified = usable & self._verified
        return "it would retire the last verified checkpoint" if verified and verified <= going else ""
