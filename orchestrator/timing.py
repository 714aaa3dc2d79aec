"""When what happened to an attempt, on the coordinator's monotonic clock. Pure.

Agents tell instants relative to the order that they got (`RankReport.marks_s`, `stepped_s`, `ended_s`) and how old that order was when
they told (`AgentReport.ordered_s`); the report's arrival ties both to our clock. So no clocks of two machines are compared, and an instant
is too late by the way of one message at most. Everything here is read from whole states at a few moments of an attempt's life: a report
costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from keepstep.trainer.contract import MARKS, Phase

from . import phases
from .events import Say
from .run import Run
from .wire import RankReport

SPANS: Final = ("detect", "stop", "wait", "choose", "fence", "launch", "join", "build", "restore", "step")
_OF_MARK: Final = dict(zip(MARKS, ("launch", "join", "build", "restore", "step"), strict=True))
_TOLD_S: Final = 0.005  # a shorter wait, or fence, is not worth a word


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One attempt. Instants are None where nobody knows them (yet); those of ranks are those of the last rank to come there."""

    attempt: int
    resume_step: int  # 0: from scratch
    launched: float  # the directives said so
    forked: float | None = None
    joined: float | None = None
    built: float | None = None
    loaded: float | None = None
    stepped: float | None = None  # the first step
    last_step: float | None = None  # the newest finished step,
    step: int = 0  # and its number
    stalled_s: float = 0.0  # how long saves held up training
    ended: float | None = None  # what ended it happened: a death, or the last sign of progress before a silence
    verdict: float | None = None  # it was noticed
    is_orderly: bool = False  # the ranks were asked to save and leave
    is_finishing: bool = False  # no rank will begin another step

    def fields(self) -> dict[str, Any]:
        """For an event; from_fields takes it back."""
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> Timing:
        return Timing(**fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    name: str
    seconds: float
    rank: int = -1  # that came last to its end


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """From what ended an attempt to the first step of the next."""

    attempt: int  # that trains again
    seconds: float
    why: str  # one sentence
    spans: tuple[Span, ...]

    def fields(self) -> dict[str, Any]:
        """Of `recovery` in the status and in the event."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loss:
    """The end of an attempt, as far as its recovery has come."""

    what: str  # "rank 2 died"
    ended: float
    verdict: float
    dead: float  # every old rank was known dead, or could not be observed
    choosing: float | None = None
    logged: float | None = None


@dataclass(slots=True)
class Timekeeper:
    """Hears the machine's sentences in order, with the state that they led to, and says what to add to them."""

    recovery: Recovery | None = None  # the last one of this term
    _timing: Timing | None = None  # of the attempt that was launched last
    _verdict_at: float = 0.0
    _culprit: Say | None = None  # the verdict on the attempt that is being drained
    _loss: _Loss | None = None
    _is_draining: bool = False

    def hear(self, said: Say, run: Run) -> dict[str, Any]:
        """What this event carries beside its sentence."""
        match said.kind:
            case "draining":
                self._verdict_at, self._culprit, self._is_draining = run.now, None, True
            case "failure" | "moved":
                self._culprit = said
            case "trains-again" if self.recovery:
                return {"recovery": self.recovery.fields()}
            case "waiting" | "ending":
                return self._over(run) | {"is_short": run.short_since is not None and said.kind == "waiting"}
            case "choosing" if self._loss:
                self._loss = replace(self._loss, choosing=run.now)
            case "fencing":
                self._loss = self._loss and replace(self._loss, logged=run.now)
                return {"fences": bool(run.members.suspects)}
            case "starting":
                return self._launched(run)
            case "training" if self._timing:
                timing = _filled(self._timing, run)
                self._timing = timing if timing.loaded is not None else replace(timing, loaded=run.now)  # a script that marks nothing
                return {"timing": self._timing.fields()}
        return {}

    def now(self, run: Run) -> Timing | None:
        """The attempt that was launched last, as its nodes' newest reports show it."""
        return None if self._timing is None else _filled(self._timing, run)

    def recovered(self, said: Say, run: Run) -> Say | None:
        """After "training": the event that tells how long it took since the last attempt ended."""
        if said.kind != "training" or self._loss is None or self._timing is None:
            return None
        self.recovery = _recovery(self._loss, self._timing, run)
        self._loss = None
        return Say(kind="trains-again", why=self.recovery.why, attempt=self.recovery.attempt, step=run.reached)

    def _launched(self, run: Run) -> dict[str, Any]:
        attempt = getattr(run.phase, "attempt", None)
        record = attempt.record if isinstance(attempt, phases.Attempt) else getattr(run.phase, "record", None)
        resume_step = record.resume_step if record else 0
        self._timing = Timing(attempt=run.attempt, resume_step=resume_step, launched=run.now)
        return {"resume_step": resume_step}

    def _over(self, run: Run) -> dict[str, Any]:
        """The attempt is over, and nothing of it is left."""
        if not self._is_draining:
            timing, self._timing = self.now(run), None
            return {"timing": timing.fields() if timing else None}
        self._is_draining = False
        culprit, attempt = self._culprit, run.attempt
        timing = _filled(self._timing or Timing(attempt=attempt, resume_step=0, launched=self._verdict_at), run)
        ended, what = _end_of(run, attempt, culprit, self._verdict_at)
        is_orderly = culprit is not None and culprit.kind == "moved"
        if is_orderly:
            ended = min(self._verdict_at, max((at.ended for at in _ranks(run, attempt) if at.ended is not None), default=ended))
        ended = min(max(ended, timing.last_step or ended), run.now)
        verdict = max(ended, self._verdict_at)
        last_step = timing.last_step if timing.forked is not None else ended  # a script that is not attached tells no steps
        timing = replace(timing, last_step=last_step, ended=ended, verdict=verdict, is_orderly=is_orderly)
        self._loss = _Loss(what=what, ended=ended, verdict=verdict, dead=run.now)
        self._timing = None
        return {"timing": timing.fields()}


@dataclass(frozen=True, slots=True)
class _RankAt:
    """A rank's report, and where its agent's order lies on our clock."""

    report: RankReport
    ordered_at: float

    def mark(self, index: int) -> tuple[float, int] | None:
        marks = self.report.marks_s
        at = marks[index] if index < len(marks) else None
        return None if at is None else (self.ordered_at + at, self.report.rank)

    @property
    def stepped(self) -> float | None:
        return None if self.report.stepped_s is None else self.ordered_at + self.report.stepped_s

    @property
    def ended(self) -> float | None:
        return None if self.report.ended_s is None else self.ordered_at + self.report.ended_s


def _ranks(run: Run, attempt: int) -> Iterator[_RankAt]:
    for node in run.members.nodes.values():
        if node.report.attempt == attempt:
            for rank in node.report.ranks:
                yield _RankAt(rank, node.heard_at - node.report.ordered_s)


def _filled(timing: Timing, run: Run) -> Timing:
    ranks = list(_ranks(run, timing.attempt))
    forked, joined, built, loaded, stepped = (_last([at.mark(index) for at in ranks]) for index in range(len(MARKS)))
    return replace(
        timing,
        forked=forked,
        joined=joined,
        built=built,
        loaded=loaded if loaded is not None else (timing.loaded if stepped is None else stepped),
        stepped=stepped,
        last_step=max((at.stepped for at in ranks if at.stepped is not None), default=None),
        step=max((at.report.step for at in ranks), default=timing.resume_step),
        stalled_s=max((at.report.stalled_s for at in ranks), default=0.0),
        is_finishing=any(at.report.phase >= Phase.FINISH for at in ranks),
    )


def _last(marks: list[tuple[float, int] | None]) -> float | None:
    """When all ranks were there; None while one is not."""
    known = [mark[0] for mark in marks if mark is not None]
    return max(known) if known and len(known) == len(marks) else None


def _end_of(run: Run, attempt: int, culprit: Say | None, verdict_at: float) -> tuple[float, str]:
    """(when it happened, what): an exit that its agent saw, or the last sign of progress."""
    if culprit is None:
        return verdict_at, f"attempt {attempt} ended"
    for at in _ranks(run, attempt):
        if at.report.rank == culprit.rank and at.ended is not None and not at.report.stopped_by_agent:
            return at.ended, f"rank {culprit.rank} died"
    if culprit.kind == "moved":
        return verdict_at, f"attempt {attempt} was left"
    node = run.members.nodes.get(culprit.node)
    if node is None:
        return verdict_at, f"{culprit.node or 'a node'} was lost"
    quiet = [rank.quiet_s for rank in node.report.ranks if rank.rank == culprit.rank and node.report.attempt == attempt]
    what = f"rank {culprit.rank}'s last sign of progress" if quiet else f"the last word of {culprit.node}"
    return node.heard_at - max(quiet, default=0.0), what


def _recovery(loss: _Loss, timing: Timing, run: Run) -> Recovery:
    choosing = loss.choosing or loss.dead
    ends: list[tuple[str, float | None, int]] = [
        ("detect", loss.verdict, -1),
        ("stop", loss.dead, -1),
        ("wait", choosing, -1),
        ("choose", loss.logged, -1),
        ("fence", timing.launched, -1),
    ]
    ranks = list(_ranks(run, timing.attempt))
    for index, name in enumerate(MARKS):
        marks = [mark for at in ranks if (mark := at.mark(index)) is not None]
        at, rank = max(marks, default=(None, -1))
        ends.append((_OF_MARK[name], at, rank))
    spans, before = [], loss.ended
    for name, known, rank in ends:
        if known is not None:  # what nobody marked is part of the next span
            end = max(known, before)
            spans.append(Span(name=name, seconds=round(end - before, 4), rank=rank))
            before = end
    seconds = round(before - loss.ended, 4)
    parts = ", ".join(f"{span.name} {span.seconds:.2f}" for span in spans if span.seconds >= _TOLD_S or span.name not in ("wait", "fence"))
    why = f"attempt {timing.attempt} trains again {seconds:.2f} s after {loss.what}: {parts}"
    return Recovery(attempt=timing.attempt, seconds=seconds, why=why, spans=tuple(spans))
