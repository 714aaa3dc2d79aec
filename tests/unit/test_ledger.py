"""Where the wall time of a run went: synthetic histories whose truth is known, and whatever hypothesis makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import reduce
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.orchestrator.ledger import CLASSES, Ledger, even_share, fold, lost_steps, ratio, settled, totals
from keepstep.orchestrator.timing import Timing

DAY_S = 86_400.0


class History:
    """Events as coordinators write them: a wall clock that goes on, and a monotonic clock of its own for each term."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.events: list[dict[str, Any]] = []
        self.truth = dict.fromkeys(CLASSES, 0.0)
        self._term = 0
        self._zero = 0.0

    def open(self, kind: str = "waiting") -> None:
        self._term += 1
        self._zero = self.now - 17.0 * self._term
        self.say(kind)

    def say(self, kind: str, attempt: int = 0, **beside: Any) -> None:
        at = datetime.fromtimestamp(self.now, UTC).isoformat()
        self.events.append({"at": at, "term": self._term, "at_s": self.now - self._zero, "kind": kind, "attempt": attempt, **beside})

    def spend(self, name: str, seconds: float) -> float:
        """Returns the instant at its end, by the term's clock."""
        self.truth[name] += seconds
        self.now += seconds
        return self.clock

    @property
    def clock(self) -> float:
        return self.now - self._zero

    def launch(self, attempt: int, resume_step: int, *, start_s: float = 1.0, restore_s: float = 0.0) -> dict[str, Any]:
        self.say("choosing", attempt - 1)
        self.spend("start", 0.25)
        self.say("fencing", attempt)
        self.say("starting", attempt, resume_step=resume_step)
        timing: dict[str, Any] = {"attempt": attempt, "resume_step": resume_step, "launched": self.clock}
        timing["built"] = self.spend("start", start_s)
        timing["loaded"] = self.spend("restore", restore_s) if resume_step else timing["built"]
        return timing

    def train(self, timing: dict[str, Any], *, productive_s: float, redone_s: float, stall_s: float, steps: int) -> None:
        self.spend("productive", productive_s)
        self.spend("redone", redone_s)
        timing["stepped"] = timing["last_step"] = self.spend("stall", stall_s)
        timing |= {"forked": timing["launched"], "step": timing["resume_step"] + steps, "stalled_s": stall_s}

    def lose(self, timing: dict[str, Any], *, partial_s: float = 0.5, detect_s: float = 0.25, stop_s: float = 0.5) -> None:
        timing["ended"] = self.spend("redone", partial_s)
        timing["verdict"] = self.spend("detect", detect_s)
        self.say("draining", timing["attempt"])
        self.spend("stop", stop_s)
        self.say("failure", timing["attempt"])
        self.say("waiting", timing["attempt"], timing=self.told(timing))

    def finish(self, timing: dict[str, Any], *, finish_s: float = 2.0) -> None:
        self.spend("finish", finish_s / 2)
        self.say("ending", timing["attempt"], timing=self.told(timing))
        self.spend("finish", finish_s / 2)
        self.say("succeeded", timing["attempt"])

    @staticmethod
    def told(timing: Mapping[str, Any]) -> dict[str, Any]:
        return Timing.from_fields(timing).fields()

    def ledger(self) -> Ledger:
        return reduce(fold, self.events, Ledger())

    def check(self, kept: Mapping[int, int | None]) -> None:
        ledger = self.ledger()
        found = totals(ledger, kept, even_share)
        assert found == pytest.approx(self.truth, abs=0.01)
        assert math.fsum(found.values()) == pytest.approx(ledger.wall_s, rel=1e-9)


def test_a_run_with_a_failure_is_split_as_it_happened() -> None:
    run = History()
    run.open()
    run.say("waiting", is_short=True)
    run.spend("wait", 30.0)
    first = run.launch(1, 0)
    run.train(first, productive_s=80.0, redone_s=20.0, stall_s=1.0, steps=100)
    run.lose(first)
    second = run.launch(2, 80, restore_s=3.0)
    run.train(second, productive_s=40.0, redone_s=0.0, stall_s=0.5, steps=40)
    run.finish(second)
    run.check({1: 80, 2: None})
    assert lost_steps(run.ledger(), {1: 80, 2: None}) == 20


def test_a_run_that_goes_on_a_day_later_was_away_and_its_goodput_does_not_suffer() -> None:
    run = History()
    run.open()
    first = run.launch(1, 0)
    run.train(first, productive_s=60.0, redone_s=0.0, stall_s=0.0, steps=60)
    run.finish(first)
    before = ratio(totals(run.ledger(), {1: 60}, even_share))
    run.spend("away", DAY_S)
    run.open()
    second = run.launch(2, 60, restore_s=1.0)
    run.train(second, productive_s=60.0, redone_s=0.0, stall_s=0.0, steps=60)
    run.finish(second)
    run.check({1: 60, 2: 120})
    assert ratio(totals(run.ledger(), {1: 60, 2: 120}, even_share)) == pytest.approx(before, abs=0.05)


def test_while_nobody_coordinates_training_goes_on_and_counts() -> None:
    run = History()
    run.open()
    timing = run.launch(1, 0)
    run.say("training", 1, timing=run.told({**timing, "forked": timing["launched"]}))
    run.spend("productive", 50.0)  # its coordinator dies here
    run.spend("productive", 20.0)
    shift = run.clock
    run.open("adopting")
    shift = run.clock - shift
    run.say("starting", 1, resume_step=0)
    for name in ("launched", "built", "loaded"):
        timing[name] += shift
    run.train(timing, productive_s=30.0, redone_s=0.0, stall_s=0.0, steps=100)
    run.finish(timing)
    run.check({1: None})


def test_when_all_died_with_their_coordinator_it_trained_until_its_last_sign_of_life_and_then_nobody_ran_it() -> None:
    run = History()
    run.open()
    timing = run.launch(1, 0)
    run.say("training", 1, timing=run.told({**timing, "forked": timing["launched"], "step": 1}))
    run.spend("productive", 50.0)
    run.say("committed", 1)
    run.spend("away", 500.0)
    run.open("adopting")
    run.spend("detect", 5.0)
    nothing: dict[str, Any] = {"attempt": 1, "resume_step": 0, "launched": run.clock, "ended": run.clock, "verdict": run.clock}
    run.say("draining", 1)
    run.say("failure", 1)
    run.spend("stop", 1.0)
    run.say("waiting", 1, timing=nothing)
    second = run.launch(2, 50, restore_s=1.0)
    run.train(second, productive_s=10.0, redone_s=0.0, stall_s=0.0, steps=10)
    run.finish(second)
    run.check({1: 50, 2: None})


def test_what_runs_now_is_booked_as_it_stands() -> None:
    run = History()
    run.open()
    timing = run.launch(1, 0)
    run.say("training", 1, timing=run.told({**timing, "forked": timing["launched"]}))
    run.spend("productive", 12.0)
    now = settled(run.ledger(), Timing.from_fields(timing), run.clock)
    assert totals(now, {1: None}, even_share) == pytest.approx(run.truth, abs=0.01)
    run.spend("finish", 3.0)
    timing |= {"last_step": run.clock - 3.0, "is_finishing": True}
    finishing = settled(run.ledger(), Timing.from_fields(timing), run.clock)
    assert totals(finishing, {1: None}, even_share) == pytest.approx(run.truth, abs=0.01)
    still = settled(run.ledger(), Timing(attempt=1, resume_step=0, launched=timing["launched"]), run.clock)
    assert totals(still, {1: None}, even_share)["start"] == pytest.approx(16.25, abs=0.01)


def test_a_rewind_makes_steps_of_older_attempts_redone() -> None:
    run = History()
    run.open()
    first = run.launch(1, 0)
    run.train(first, productive_s=40.0, redone_s=60.0, stall_s=0.0, steps=100)
    run.lose(first)
    second = run.launch(2, 100, restore_s=1.0)
    run.train(second, productive_s=0.0, redone_s=30.0, stall_s=0.0, steps=30)
    run.lose(second)
    third = run.launch(3, 40, restore_s=1.0)
    run.train(third, productive_s=90.0, redone_s=0.0, stall_s=0.0, steps=90)
    run.finish(third)
    run.check({1: 40, 3: None})


def test_an_attempt_that_never_came_to_train_has_no_training() -> None:
    run = History()
    run.open()
    run.say("choosing")
    run.spend("start", 0.5)
    run.say("starting", 1, resume_step=0)
    launched = run.clock
    ended = run.spend("start", 4.0)
    verdict = run.spend("detect", 1.0)
    run.say("draining", 1)
    run.spend("stop", 1.0)
    timing = {"attempt": 1, "resume_step": 0, "launched": launched, "ended": ended, "verdict": verdict}
    run.say("ending", 1, timing=timing)
    run.spend("finish", 1.0)
    run.say("failed", 1)
    run.check({})


def test_a_clock_that_goes_back_between_coordinators_takes_nothing_away() -> None:
    run = History()
    run.open()
    run.say("waiting", is_short=True)
    run.now += 100.0
    run.say("node-joined")
    run.now -= 40.0
    run.open()
    run.say("waiting", is_short=True)
    run.now += 10.0
    run.say("choosing")
    found = totals(run.ledger(), {}, even_share)
    assert found["wait"] == pytest.approx(110.0, abs=0.01)
    assert run.ledger().wall_s == pytest.approx(110.0, abs=0.01)


PHASES = "waiting choosing fencing starting training draining ending succeeded stopped failed adopting"
KINDS = f"{PHASES} trains-again failure moved committed degraded".split()
INSTANT = st.none() | st.floats(-1e5, 1e5)


@st.composite
def timings(draw: st.DrawFn) -> dict[str, Any]:
    instants = ("forked", "joined", "built", "loaded", "stepped", "last_step", "ended", "verdict")
    return {
        "attempt": draw(st.integers(1, 4)),
        "resume_step": draw(st.integers(0, 9)),
        "launched": draw(st.floats(-1e5, 1e5)),
        **{name: draw(INSTANT) for name in instants},
        "step": draw(st.integers(0, 20)),
        "stalled_s": draw(st.floats(0, 1e4)),
        "is_orderly": draw(st.booleans()),
    }


@st.composite
def events(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Any order, clocks that jump: what is left of a file after events were lost."""
    wall, term, clock, found = 1e9, 1, 0.0, []
    for _ in range(draw(st.integers(0, 25))):
        if draw(st.booleans()):
            term += draw(st.integers(0, 1))
        wall += draw(st.floats(-100, 1000))
        clock += draw(st.floats(-100, 1000))
        event = {"at": datetime.fromtimestamp(wall, UTC).isoformat(), "term": term, "at_s": clock, "kind": draw(st.sampled_from(KINDS))}
        event |= {"attempt": draw(st.integers(0, 4)), "is_short": draw(st.booleans()), "fences": draw(st.booleans())}
        found.append(event | {"resume_step": draw(st.integers(0, 9)), "timing": draw(st.none() | timings())})
    return found


@given(history=events(), kept=st.dictionaries(st.integers(1, 4), st.none() | st.integers(0, 20)), timing=st.none() | timings())
def test_every_second_is_booked_once_whatever_was_written(
    history: list[dict[str, Any]], kept: dict[int, int | None], timing: dict[str, Any] | None
) -> None:
    ledger = reduce(fold, history, Ledger())
    seen = settled(ledger, Timing.from_fields(timing) if timing else None, 10.0)
    found = totals(seen, kept, even_share)
    assert set(found) == set(CLASSES)
    assert min(found.values()) >= 0
    assert math.fsum(found.values()) == pytest.approx(seen.wall_s, rel=1e-6, abs=1e-3)
    assert 0 <= ratio(found) <= 1 + 1e-9
    assert lost_steps(seen, kept) >= 0
