"""When a training that gets no better is over."""

from __future__ import annotations

import math
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.trainer.best import Best

LOSSES = st.lists(st.one_of(st.floats(0, 10), st.just(math.nan), st.just(math.inf)), max_size=12)


def after(*losses: float, min_delta: float = 0.0) -> Best:
    """Evaluations at steps 10, 20, ..."""
    return reduce(lambda best, pair: best.after(10 * (pair[0] + 1), pair[1], min_delta), enumerate(losses), Best())


def test_it_is_over_after_so_many_evaluations_that_were_not_better() -> None:
    assert [after(*[3.0, 2.0, 2.5, 2.1, 2.0][:count]).is_over(3) for count in range(6)] == [False] * 5 + [True]
    assert after(3.0, 2.0, 2.5, 2.1, 2.0) == Best(step=20, nats=2.0, worse=3, seen=50)


def test_a_better_one_begins_the_count_anew() -> None:
    assert after(3.0, 3.5, 3.4, 2.9, 3.0) == Best(step=40, nats=2.9, worse=1, seen=50)


def test_better_by_less_than_min_delta_is_not_better() -> None:
    assert after(3.0, 2.95, 2.9, min_delta=0.1).step == 10
    assert after(3.0, 2.95, 2.85, min_delta=0.1).step == 30


def test_without_patience_it_is_never_over() -> None:
    assert not after(*[1.0] * 100).is_over(0)


def test_what_is_no_number_is_never_better() -> None:
    assert after(math.nan, 2.0, math.nan, math.inf) == Best(step=20, nats=2.0, worse=2, seen=40)


def test_a_step_is_due_once() -> None:
    assert [step for step in range(1, 31) if after(1.0).is_due(step, 10)] == [20, 30]
    assert not any(Best().is_due(step, 0) for step in range(100))


@given(LOSSES, st.floats(0, 1))
def test_it_survives_a_restart(losses: list[float], min_delta: float) -> None:
    best = after(*losses, min_delta=min_delta)
    assert Best.from_json(best.to_json()) == best


@given(LOSSES)
def test_the_best_has_the_lowest_loss_and_the_rest_came_after_it(losses: list[float]) -> None:
    best = after(*losses)
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert best.nats == min(finite, default=math.inf)
    assert best.worse == len(losses) - best.step // 10


@pytest.mark.parametrize("change", [{"step": -1}, {"worse": 1.5}, {"seen": 0}, {"nats": "two"}, {"step": True}])
def test_what_it_never_gave_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Best.from_json(after(2.0).to_json() | change)
