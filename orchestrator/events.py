"""What happens to a run, and what it asks for. Pure data: the machine's input and output alphabets.

Every event has `at`: seconds of the coordinator's own monotonic clock, never going back. The shell turns reports, answers and
elapsed time into events, hands them to `machine.step` one after the other, and carries out the requests that come back.

What the shell promises:

* It answers a log request (`LogAttempt`, `LogQuarantine`, `LogRewind`, `LogEnd`) with `Logged` or `LogFailed` (`LogAttempt` also with
  `AttemptVoid`, `LogRewind` with `RewindVoid`), `FindAlone` with `FoundAlone` or `LogFailed`, a `Commit` with `Committed` or
  `CommitFailed`, and only when it knows: an ambiguous write is read back first.
  `LogFailed` means "it is not in the log".
* Records are appended one at a time. A commit of an attempt is refused once a newer attempt is in the log.
* A request may come again (same value) before it is answered: one that is still being worked on is ignored, one whose record is
  in the log already is answered with that record (an attempt number is logged once).
* It reads the end of the log at least once per second or so and says `LogRead`; a record of a newer term is `Fenced` at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from . import wire
from .policy import Policy

Outcome: TypeAlias = Literal["succeeded", "stopped", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A committed checkpoint."""

    step: int
    directory: str  # key below the root
    manifest_sha256: str


# Records, as far as the machine needs to know them.


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """Attempt `attempt` is in the log: from now on it is the newest, and agents that run an older one must stop."""

    attempt: int
    gang: tuple[str, ...]
    world_size: int
    nonce: str
    resume: Checkpoint | None
    unconfirmed: tuple[str, ...] = ()
    standing: str = ""
    skips: tuple[str, ...] = ()  # positions that it leaves out
    overrides: tuple[str, ...] = ()  # "section.key=value" on top of run.toml

    @property
    def resume_step(self) -> int:
        return self.resume.step if self.resume else 0


@dataclass(frozen=True, slots=True)
class QuarantineRecord:
    """This checkpoint is never resumed from again."""

    directory: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RewindRecord:
    """The history has gone back. `skips` and `overrides`: all that are in force from here on."""

    resume: Checkpoint | None  # None: to the beginning
    skips: tuple[str, ...]
    overrides: tuple[str, ...]
    bad_step: int  # -1: people asked
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EndRecord:
    """The run is over."""

    outcome: Outcome
    step: int
    why: str
    requeue: bool


Record: TypeAlias = AttemptRecord | QuarantineRecord | RewindRecord | EndRecord


# Events.


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """Our term is in the log. What the log said about the run so far comes with it."""

    at: float
    term: int
    last_attempt: int = 0  # 0: there was none
    last_gang: tuple[str, ...] = ()
    last_world_size: int = 0
    last_nonce: str = ""
    last_resume: Checkpoint | None = None
    last_unconfirmed: tuple[str, ...] = ()  # of its AttemptRecord
    last_standing: str = ""  # of its AttemptRecord
    newest_commit: Checkpoint | None = None  # quarantined ones left out
    ever_committed: bool = False  # also True when all that was committed is quarantined: never a silent start from scratch
    attempts_below: int = 0  # records were lost, one of them may have been an attempt: all that can be are below this number
    ended: bool = False  # an end record follows the last attempt: nothing to adopt
    rewound: bool = False  # a rewind follows the last attempt: nothing to adopt either, but its ranks may live
    forgiven: bool = False  # people asked for it: failures before it do not count any more
    skips: tuple[str, ...] = ()  # in force
    overrides: tuple[str, ...] = ()  # likewise
    rewinds: int = 0  # for bad steps, so far


@dataclass(frozen=True, slots=True)
class Tick:
    """Time went by. Wanted every 0.1 to 0.25 s."""

    at: float


@dataclass(frozen=True, slots=True)
class Reported:
    """A node told its whole state."""

    at: float
    report: wire.AgentReport


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection to a node broke (its agent died, or the network dropped it)."""

    at: float
    node: str


@dataclass(frozen=True, slots=True)
class Died:
    """Proof: every process of a node that could ever step, its agent included, has ended (tether.py)."""

    at: float
    node: str


@dataclass(frozen=True, slots=True)
class Found:
    """Answer to FindCheckpoint: the newest good one; None when no commit that is not quarantined exists.

    `rolled_forward`: all its parts were in storage, only the commit record was missing; it was committed on the way to this answer.
    `quarantined`: every directory that the log forbids; people may quarantine, too.
    """

    at: float
    resume: Checkpoint | None
    rolled_forward: bool = False
    quarantined: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class FoundAlone:
    """Answer to FindAlone: those that had said so by then, and those of them that have said since that their ranks are dead."""

    at: float
    request: FindAlone
    nodes: frozenset[str]
    ended: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Logged:
    """Our record is durable."""

    at: float
    record: Record


@dataclass(frozen=True, slots=True)
class LogFailed:
    """The storage could not take a request; it is asked again after a while."""

    at: float
    request: Request
    why: str


@dataclass(frozen=True, slots=True)
class AttemptVoid:
    """The attempt would not count: what it was to resume from has been quarantined meanwhile. It is not in the log."""

    at: float
    attempt: int
    why: str


@dataclass(frozen=True, slots=True)
class RewindVoid:
    """There is no checkpoint to go back to. Nothing is in the log."""

    at: float
    request: LogRewind
    why: str


@dataclass(frozen=True, slots=True)
class Reconfigured:
    """Other overrides are in force: these are the numbers now. A record of a rewind follows."""

    at: float
    policy: Policy


@dataclass(frozen=True, slots=True)
class LogRead:
    """The end of the log was read by a read that began at `began`; nobody newer than us is there."""

    at: float
    began: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    at: float
    attempt: int
    step: int
    directory: str
    manifest_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitFailed:
    """`damaged`: the parts do not make a checkpoint and never will; otherwise the storage was in the way."""

    at: float
    attempt: int
    step: int
    directory: str
    why: str
    damaged: bool


@dataclass(frozen=True, slots=True)
class Damaged:
    """A committed checkpoint was read back and is not what was committed; nobody was about to resume from it."""

    at: float
    directory: str
    why: str


@dataclass(frozen=True, slots=True)
class Fenced:
    """A newer coordinator opened `term`: we decide nothing any more."""

    at: float
    term: int
    by: str


@dataclass(frozen=True, slots=True)
class StopAsked:
    """Save at one step boundary, then end the run as "stopped"."""

    at: float
    why: str


@dataclass(frozen=True, slots=True)
class SaveAsked:
    """Save at the next step boundary and go on."""

    at: float


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """Move off a node: its id, or its host's name."""

    at: float
    node: str
    why: str


@dataclass(frozen=True, slots=True)
class ReadmitAsked:
    """Trust a node again, by its id or its host's name: it is not drained any more, and its failures are forgotten."""

    at: float
    node: str


@dataclass(frozen=True, slots=True)
class ResizeAsked:
    """A full gang is to have so many nodes from now on."""

    at: float
    nodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RewindAsked:
    """Go back to the newest checkpoint at or before step `to` (0: to the beginning) and go on from there, with these skips and overrides
    beside those in force."""

    at: float
    to: int
    skips: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    why: str


Event: TypeAlias = (
    Opened
    | Tick
    | Reported
    | Disconnected
    | Died
    | Found
    | FoundAlone
    | Logged
    | LogFailed
    | AttemptVoid
    | RewindVoid
    | Reconfigured
    | LogRead
    | Committed
    | CommitFailed
    | Damaged
    | Fenced
    | StopAsked
    | SaveAsked
    | DrainAsked
    | ReadmitAsked
    | ResizeAsked
    | RewindAsked
)


# Requests.


@dataclass(frozen=True, slots=True)
class FindCheckpoint:
    """Which committed checkpoint is the newest that is not quarantined? Answered by Found, or LogFailed when storage is in the way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FindAlone:
    """Which of these silent nodes have said in the root that they go on without our answers? Asked when attempt `fence` is in the log.

    A node says so first and reads the log afterwards, we write the fence first and look afterwards: whoever has not said so by now
    will read of the fence.
    """

    fence: int
    suspects: tuple[tuple[str, int], ...]  # node, and the attempt that it may run


@dataclass(frozen=True, slots=True, kw_only=True)
class LogAttempt:
    """Append the attempt, with a fresh random nonce."""

    attempt: int
    gang: tuple[str, ...]
    world_size: int
    resume: Checkpoint | None
    unconfirmed: tuple[str, ...] = ()  # nodes that may still run an older attempt; a successor must wait for them too
    standing: str = ""  # what a successor should know of the run's past, see standing.py
    skips: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRewind:
    """Commit what is whole, choose the newest usable checkpoint at or before step `to`, append the rewind to it.

    A bad step leads to the beginning only where nothing was ever committed; people must say so (`to` 0). Else the answer is RewindVoid.
    """

    to: int
    skips: tuple[str, ...] = ()  # all that shall be in force
    overrides: tuple[str, ...] = ()  # likewise
    bad_step: int = -1
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Check the coverage, write the manifest, append the commit record."""

    attempt: int
    step: int
    directory: str
    indexes: tuple[wire.Persisted, ...]  # by rank


@dataclass(frozen=True, slots=True)
class LogQuarantine:
    directory: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEnd:
    outcome: Outcome
    step: int
    why: str
    requeue: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Say:
    """One event for people and for events.jsonl. Never answered."""

    kind: str
    why: str
    attempt: int = 0
    node: str = ""
    rank: int = -1
    step: int = -1
    cause: str = ""  # of a failure: the kind of its evidence, e.g. "signal"
    detail: tuple[str, ...] = ()  # of a failure: the last lines that the rank printed


Asking: TypeAlias = FindCheckpoint | FindAlone | LogAttempt | Commit | LogQuarantine | LogRewind | LogEnd  # what is answered
Request: TypeAlias = Asking | Say
