"""What an agent learns about silences, on a clock of its own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepstep.orchestrator.patience import LATE_S, PERIOD_S, Activity, Patience, Silence, Silences, Watch
from keepstep.trainer.contract import Phase, Progress, Request

HANG_S = 4.0
seconds = st.floats(min_value=1e-4, max_value=2e4)


@given(st.lists(seconds, min_size=1, max_size=200), st.floats(min_value=0.01, max_value=1.0))
def test_percentiles_are_right_within_a_bucket_and_never_above_the_longest(samples: list[float], share: float) -> None:
    silences = Silences()
    for sample in samples:
        silences.add(sample)
    exact = sorted(samples)[math.ceil(share * len(samples)) - 1]
    found = silences.percentile(share)
    assert min(exact, 0.001) <= found <= max(samples)
    assert exact * 0.999999 <= max(found, 0.001) <= max(0.001, exact * 1.100001)


class Rank:
    """A rank and its agent's watch. `run` lets time go by in looks; the rank reports when it is told to."""

    def __init__(self, patience: Patience | None = None, *, world_size: int = 2, resume_step: int = 0) -> None:
        self.now = 100.0
        self.patience = patience or Patience(HANG_S)
        self.patience.begin(world_size)
        self.page = Progress(Phase.INIT, Request.NONE, resume_step, beats=0, at=self.now)
        self.watch = Watch(self.patience, self.page, self.now)

    def report(self, phase: Phase, step: int, within_s: float = 0.0) -> None:
        self.page = replace(self.page, phase=phase, step=step, beats=self.page.beats + 1, at=self.now, limit_s=within_s)

    def run(self, duration_s: float, period_s: float = PERIOD_S) -> Silence:
        """The last look."""
        for _ in range(round(duration_s / period_s)):
            self.now += period_s
            silence = self.watch.look(self.page, self.now)
        return silence

    def steps(self, count: int, step_s: float) -> Silence:
        if self.page.phase is not Phase.STEP:
            self.report(Phase.STEP, self.page.step)
        for _ in range(count):
            self.run(step_s)
            self.report(Phase.STEP, self.page.step + 1)
        return self.run(PERIOD_S)


def test_nothing_is_known_before_eight_steps_the_first_not_counted() -> None:
    rank = Rank()
    assert rank.steps(8, 0.5).limit_s == 0
    assert rank.steps(1, 0.5).limit_s == HANG_S


def test_long_steps_get_four_times_their_usual_length() -> None:
    rank = Rank()
    limit_s = rank.steps(40, 3.0).limit_s
    assert 12 <= limit_s <= 4 * 3.0 * 1.1
    assert rank.patience.step_s == pytest.approx(3.0, rel=0.1)


@settings(max_examples=30, deadline=None)
@given(st.floats(min_value=0.1, max_value=20), st.integers(min_value=9, max_value=40))
def test_a_hang_is_noticed_within_five_seconds_or_five_times_the_99th_percentile(step_s: float, count: int) -> None:
    rank = Rank()
    rank.steps(count, step_s)
    silent_since = rank.page.at
    while not rank.run(PERIOD_S).is_too_long:
        assert rank.now - silent_since < max(5.0, 5 * step_s)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(min_value=0.05, max_value=3.9), min_size=10, max_size=60))
def test_silences_below_the_floor_are_never_hangs(lengths: list[float]) -> None:
    rank = Rank()
    rank.report(Phase.STEP, 0)
    for length in lengths:
        assert not rank.run(length).is_too_long
        rank.report(Phase.STEP, rank.page.step + 1)


def test_an_announced_silence_may_last_and_is_no_measure_of_what_is_usual() -> None:
    rank = Rank()
    rank.steps(20, 0.5)
    rank.report(Phase.STEP, rank.page.step, within_s=600)
    assert not rank.run(599).is_too_long
    assert rank.run(2).is_too_long
    rank.report(Phase.STEP, rank.page.step)
    assert rank.run(0.1).limit_s == HANG_S


def test_a_rare_silence_that_ended_by_itself_is_not_cut_short_when_it_comes_again() -> None:
    rank = Rank()
    rank.steps(4, 0.5)
    rank.steps(1, 30.0)  # a script that saves without a word
    assert rank.steps(1000, 0.1).limit_s >= 30


def test_phases_are_learnt_apart_and_rare_ones_have_a_higher_floor() -> None:
    rank = Rank()
    rank.steps(20, 0.1)
    rank.report(Phase.SAVE, rank.page.step)
    assert rank.run(0.1).limit_s == 0
    rank.steps(1, 0.1)
    rank.report(Phase.SAVE, rank.page.step)
    assert rank.run(0.1).limit_s == 2.5 * HANG_S
    for _ in range(32):
        rank.steps(1, 0.1)
        rank.report(Phase.SAVE, rank.page.step)
        rank.run(0.1)
    assert rank.run(0.1).limit_s == HANG_S, "by now it is known as well as a step"
    rank.report(Phase.EVALUATE, rank.page.step)
    assert rank.run(0.1).limit_s == 0


def test_a_slow_start_says_nothing_about_steps() -> None:
    rank = Rank(resume_step=40)
    rank.run(50)  # INIT
    rank.report(Phase.LOAD, 40)
    rank.run(70)
    rank.report(Phase.STEP, 40)
    rank.run(30)
    assert rank.watch.activity is Activity.FIRST_STEP
    rank.report(Phase.STEP, 41)
    assert rank.steps(20, 0.1).limit_s == HANG_S


def test_what_was_learnt_is_shared_and_outlives_attempts_of_the_same_world_size() -> None:
    patience = Patience(HANG_S)
    Rank(patience).steps(20, 0.1)
    again = Rank(patience)
    again.report(Phase.STEP, 0)
    again.steps(1, 0.1)
    assert again.run(0.1).limit_s == HANG_S
    other = Rank(patience, world_size=1)
    assert other.steps(2, 0.1).limit_s == 0


def test_an_agent_that_was_frozen_with_its_ranks_sees_no_hang() -> None:
    rank = Rank()
    rank.steps(20, 0.1)
    rank.now += 3600
    silence = rank.watch.look(rank.page, rank.now)
    assert silence.quiet_s <= 4 * PERIOD_S
    rank.now += 0.01
    rank.report(Phase.STEP, rank.page.step + 1)
    assert rank.run(PERIOD_S).limit_s == HANG_S, "it learnt nothing from that hour"


def test_an_agent_without_processor_time_is_patient() -> None:
    """Each look comes half a second late: they count as one period each."""
    rank = Rank()
    rank.steps(20, 0.1)
    assert not rank.run(30, period_s=LATE_S * 2).is_too_long


def test_looks_on_a_busy_machine_count_in_full() -> None:
    rank = Rank()
    rank.steps(20, 0.1)
    assert rank.run(HANG_S + 1, period_s=0.2).is_too_long


def test_fast_steps_between_two_looks_count_as_many() -> None:
    rank = Rank()
    rank.report(Phase.STEP, 0)
    rank.run(0.1)
    for _ in range(10):
        rank.now += 0.005
        rank.report(Phase.STEP, rank.page.step + 1)
    assert rank.run(PERIOD_S).limit_s == 0  # those ten ended the first step
    for _ in range(10):
        rank.now += 0.005
        rank.report(Phase.STEP, rank.page.step + 1)
    assert rank.run(PERIOD_S).limit_s == HANG_S
    assert rank.patience.step_s < PERIOD_S


def test_a_step_that_was_cut_short_gets_twice_the_time_when_it_comes_again() -> None:
    """A script whose hundredth step really takes 6 s is killed once, and not for ever."""
    patience = Patience(HANG_S)
    first = Rank(patience)
    first.steps(100, 0.1)
    assert first.run(4.1).is_too_long
    first.watch.give_up()
    second = Rank(patience)
    second.steps(100, 0.1)
    assert not second.run(6.0).is_too_long
    second.report(Phase.STEP, 101)
    assert second.run(0.1).limit_s >= 6


def test_who_was_not_overdue_gets_no_more_time() -> None:
    patience = Patience(HANG_S)
    first = Rank(patience)
    first.steps(100, 0.1)
    first.run(1.0)
    first.watch.give_up()
    second = Rank(patience)
    assert second.steps(100, 0.1).limit_s == HANG_S


def test_what_is_reported_at_the_crossing_is_above_the_limit() -> None:
    rank = Rank()
    rank.steps(20, 0.1)
    while not (silence := rank.run(PERIOD_S, period_s=0.0123)).is_too_long:
        pass
    assert round(silence.quiet_s, 3) > silence.limit_s
