"""When a checkpoint is due."""

from __future__ import annotations

import pytest

from keepstep.trainer.cadence import Auto, Cadence, EverySeconds, EverySteps, Interval, parse_interval
from keepstep.trainer.run import SaveRequests


def cadence(interval: Interval) -> Cadence:
    return Cadence(interval=interval, saved_step=0, saved_at=100.0)


def test_steps_fall_due_on_multiples_whatever_was_postponed() -> None:
    every = cadence(EverySteps(10))
    assert [step for step in range(1, 25) if every.is_due(step, 0.0)] == list(range(10, 25))
    late = every.saved(13, 0.0, 0.0)
    assert [step for step in range(14, 25) if late.is_due(step, 0.0)] == [20, 21, 22, 23, 24]


def test_seconds_fall_due_after_the_last_save() -> None:
    every = cadence(EverySeconds(30.0))
    assert not every.is_due(1, 129.0)
    assert every.is_due(2, 130.0)
    assert not every.saved(2, 131.0, 0.0).is_due(3, 160.0)


def test_auto_follows_young() -> None:
    assert Auto(attempt=1).seconds(stall_s=0.02) == pytest.approx((2 * 0.02 * 3600) ** 0.5)
    assert Auto(attempt=4).seconds(stall_s=0.02) == pytest.approx((2 * 0.02 * 900) ** 0.5)
    assert Auto(attempt=1).seconds(stall_s=1e9) == 600
    assert Auto(attempt=1).seconds(stall_s=0) == 1
    measured = cadence(Auto(attempt=1)).saved(5, 200.0, 0.125)
    assert not measured.is_due(6, 229.0)
    assert measured.is_due(7, 230.0)


@pytest.mark.parametrize(("text", "interval"), [(20, EverySteps(20)), ("2.5s", EverySeconds(2.5)), ("auto", Auto(3))])
def test_intervals_are_steps_seconds_or_auto(text: int | str, interval: Interval) -> None:
    assert parse_interval(text, attempt=3) == interval


@pytest.mark.parametrize("text", [0, -1, "0s", "20", "s", "soon", "-3s"])
def test_anything_else_is_refused(text: int | str) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.interval"):
        parse_interval(text, attempt=1)


def test_one_showing_of_a_save_request_is_one_save() -> None:
    requests = SaveRequests()
    owed = []
    for is_shown, can_save in [(False, True), (True, False), (True, True), (True, True), (False, True), (True, True)]:
        owed.append(requests.is_new(is_shown))
        if owed[-1] and can_save:
            requests.served()
    assert owed == [False, True, True, False, False, True]
