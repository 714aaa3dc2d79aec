"""Where a run's wall time went, folded from its events one by one. Pure.

The events of all coordinators lie on one axis: seconds of the wall clock at which a term began, and within the term its monotonic clock.
The axis never goes back. Every second of it is booked exactly once, so the classes sum to the wall time:

    productive   steps that count, and what belongs to training between them: batches, evaluation
    redone       the same for steps that were lost and had to be computed again, the step in which a rank died included
    detect       from a death, or from the last sign of progress before a silence, to the verdict
    stop         until every old rank was known dead, fences included
    start        choosing a checkpoint, the pause after failures, launching, process group, model
    restore      loading the checkpoint
    stall        training held up by saves
    wait         not enough nodes
    finish       after the last step: evaluation, final checkpoint, the end of the run; an orderly leave
    away         nobody ran the run: after its end until somebody went on, or after all of it had died

An attempt's time is booked when it is over, from its `Timing`; whether its steps count is known for good only at the end, so that is asked
of the lineage each time (`totals`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, TypeAlias

from .timing import Timing

CLASSES: Final = ("productive", "redone", "detect", "stop", "start", "restore", "stall", "wait", "finish", "away")
_ENDS: Final = frozenset({"succeeded", "stopped", "failed"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """The training of one attempt: steps after `resume_step` up to `step` took `seconds`, stalls left out."""

    resume_step: int
    step: int
    seconds: float


Share: TypeAlias = Callable[[int, Trained, int], float]
"""(attempt, its training, the last of its steps that counts) -> the part of its training that counts, in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """An attempt whose time is not booked yet."""

    attempt: int
    since: float
    resume_step: int
    known: Timing | None = None  # the best that was told, on the axis
    alive_at: float = 0.0  # the last sign of life of whoever watched it
    reopened_at: float | None = None  # a successor began then, and has not adopted it


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    began_at: float = 0.0
    upto: float = 0.0  # all before is booked, or held
    current: str = "away"  # the class of what comes next, while no attempt is held
    held: _Held | None = None
    term: int = 0
    offset: float = 0.0  # of this term: axis - the coordinator's monotonic clock
    seconds: Mapping[str, float] = field(default_factory=dict)
    trained: Mapping[int, Trained] = field(default_factory=dict)
    recovery: Mapping[str, Any] | None = None  # the newest, as its event told

    @property
    def wall_s(self) -> float:
        return self.upto - self.began_at


def fold(ledger: Ledger, event: Mapping[str, Any]) -> Ledger:
    """One more event; those that say nothing about time change nothing."""
    if "term" not in event or "at_s" not in event:
        return ledger
    ledger = _same_term(ledger, event)
    at = max(ledger.upto, event["at_s"] + ledger.offset)
    attempt = event.get("attempt", 0)
    match event["kind"]:
        case "waiting":
            return replace(_booked(_settled(ledger, event, at), at), current="wait" if event.get("is_short") else "start")
        case "choosing":
            return replace(_booked(ledger, at), current="start")
        case "fencing":
            return replace(_booked(ledger, at), current="stop" if event.get("fences") else "start")
        case "starting" if ledger.held and ledger.held.attempt == attempt:  # a successor has adopted it
            return _told(replace(ledger, held=replace(ledger.held, reopened_at=None)), None, at)
        case "starting":
            ledger = _booked(_settled(ledger, {}, at), at)
            return replace(ledger, held=_Held(attempt=attempt, since=at, resume_step=event.get("resume_step", 0), alive_at=at))
        case "training" if event.get("timing"):
            return _told(ledger, _timing(ledger, event), at)
        case "ending":
            return replace(_booked(_settled(ledger, event, at), at), current="finish")
        case "trains-again":
            ledger = replace(ledger, recovery=event.get("recovery"))
        case kind if kind in _ENDS:
            return replace(_booked(ledger, at), current="away")
    return _told(ledger, None, at)


def settled(ledger: Ledger, timing: Timing | None, at: float) -> Ledger:
    """As if the run were looked at for the last time `at` this moment of the term's clock; what runs goes on as it did."""
    now = max(ledger.upto, at + ledger.offset)
    if ledger.held is None:
        return _booked(ledger, now)
    timing = _shifted(timing, ledger.offset) if timing else ledger.held.known
    if timing and timing.loaded is not None and timing.verdict is None and not timing.is_finishing:
        timing = replace(timing, last_step=now)  # it steps at this moment
    return _book_attempt(ledger, timing, now)


def totals(ledger: Ledger, kept: Mapping[int, int | None], share: Share) -> dict[str, float]:
    """Seconds by class.

    Args:
        kept: attempt -> the last of its steps that counts; None: all of them do. An attempt that is missing has none.
        share: asked where only some of an attempt's steps count.
    """
    seconds = {name: ledger.seconds.get(name, 0.0) for name in CLASSES}
    for attempt, trained in ledger.trained.items():
        last = kept.get(attempt, trained.resume_step)
        part = 1.0 if last is None or last >= trained.step else min(1.0, max(0.0, share(attempt, trained, last)))
        seconds["productive"] += trained.seconds * part
        seconds["redone"] += trained.seconds * (1.0 - part)
    return seconds


def even_share(attempt: int, trained: Trained, last: int) -> float:
    """Where nothing better is known: all steps took the same time."""
    return (last - trained.resume_step) / max(1, trained.step - trained.resume_step)


def lost_steps(ledger: Ledger, kept: Mapping[int, int | None]) -> int:
    """Steps that were computed and do not count."""
    lost = 0
    for attempt, trained in ledger.trained.items():
        last = kept.get(attempt, trained.resume_step)
        lost += 0 if last is None else max(0, trained.step - max(last, trained.resume_step))
    return lost


def ratio(seconds: Mapping[str, float]) -> float:
    """Goodput: productive / (all - away); 0 while there is nothing to divide by."""
    present_s = math.fsum(seconds.values()) - seconds["away"]
    return seconds["productive"] / present_s if present_s > 0 else 0.0


# The axis.


def _same_term(ledger: Ledger, event: Mapping[str, Any]) -> Ledger:
    if event["term"] == ledger.term:
        return ledger
    at = datetime.fromisoformat(event["at"]).timestamp()
    if not ledger.term:
        return replace(ledger, term=event["term"], offset=at - event["at_s"], began_at=at, upto=at)
    at = max(at, ledger.upto)
    held = replace(ledger.held, reopened_at=at) if ledger.held else None
    return replace(ledger, term=event["term"], offset=at - event["at_s"], held=held)


def _timing(ledger: Ledger, event: Mapping[str, Any]) -> Timing | None:
    fields = event.get("timing")
    return _shifted(Timing.from_fields(fields), ledger.offset) if fields else None


_INSTANTS: Final = ("launched", "forked", "joined", "built", "loaded", "stepped", "last_step", "ended", "verdict")


def _shifted(timing: Timing, offset: float) -> Timing:
    moved = {name: at + offset for name in _INSTANTS if (at := getattr(timing, name)) is not None}
    return replace(timing, **moved)


# Booking.


def _booked(ledger: Ledger, at: float) -> Ledger:
    return _added(replace(ledger, upto=at), ledger.current, at - ledger.upto) if ledger.held is None else replace(ledger, upto=at)


def _added(ledger: Ledger, name: str, seconds: float) -> Ledger:
    return replace(ledger, seconds={**ledger.seconds, name: ledger.seconds.get(name, 0.0) + seconds})


def _told(ledger: Ledger, timing: Timing | None, at: float) -> Ledger:
    """Whoever writes an event watches the attempt that is held."""
    if ledger.held is None:
        return _booked(ledger, at)
    held = ledger.held
    alive_at = at if held.reopened_at is None else held.alive_at
    return replace(ledger, upto=at, held=replace(held, alive_at=alive_at, known=timing or held.known))


def _settled(ledger: Ledger, event: Mapping[str, Any], at: float) -> Ledger:
    if ledger.held is None:
        return ledger
    return _book_attempt(ledger, _timing(ledger, event), at)


def _book_attempt(ledger: Ledger, timing: Timing | None, at: float) -> Ledger:
    """Its time up to `at`, cut at the instants of its timing, each of them held within what is left."""
    held = ledger.held
    assert held is not None
    if held.reopened_at is not None and (timing is None or timing.loaded is None):
        timing = _lost_sight(held, timing)
    cuts, steps_s = _cuts(held, timing, at)
    ledger = replace(ledger, held=None, upto=at)
    for name, seconds in cuts:
        ledger = _added(ledger, name, seconds)
    if not steps_s:
        return ledger
    trained = Trained(resume_step=held.resume_step, step=max(timing.step if timing else 0, held.resume_step), seconds=steps_s)
    return replace(ledger, trained={**ledger.trained, held.attempt: trained})


def _lost_sight(held: _Held, timing: Timing | None) -> Timing:
    """Its coordinator died, and nobody is left who could tell: it trained, as far as is known, until the last sign of life."""
    known = held.known or Timing(attempt=held.attempt, resume_step=held.resume_step, launched=held.since)
    last = max(held.alive_at, known.last_step or 0.0)
    return replace(known, last_step=last, ended=last, verdict=timing.verdict if timing else None)


def _cuts(held: _Held, timing: Timing | None, at: float) -> tuple[list[tuple[str, float]], float]:
    """([(class, seconds)], seconds of training): together all that passed from `held.since` to `at`."""
    reached, cuts = held.since, list[tuple[str, float]]()

    def until(instant: float | None) -> float:
        """The seconds up to there, which are not to be booked again."""
        nonlocal reached
        end = reached if instant is None else min(max(instant, reached), at)
        passed, reached = end - reached, end
        return passed

    if timing is None:
        return [("start", until(at))], 0.0
    restores, steps_s = held.resume_step > 0, 0.0
    cuts.append(("start", until(timing.built if restores else timing.loaded)))
    opening = "restore" if restores and timing.built is not None else "start"
    cuts.append((opening, until(timing.loaded)))
    if timing.loaded is None:
        cuts.append((opening, until(timing.ended)))
    else:
        steps_s = until(timing.last_step)
        stalled_s = min(timing.stalled_s, steps_s)
        steps_s -= stalled_s
        cuts += [("stall", stalled_s), ("finish" if timing.is_orderly else "redone", until(timing.ended))]
    if held.reopened_at is not None:
        cuts.append(("away", until(held.reopened_at)))
    cuts.append(("detect", until(timing.verdict)))
    rest = "stop" if timing.ended is not None else (opening if timing.loaded is None else "finish")
    return [*cuts, (rest, until(at))], steps_s
