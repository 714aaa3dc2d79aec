"""Recorded losses against computed ones."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from keepstep.orchestrator.comparing import compare, likely_causes, ulps_between

finite = st.floats(allow_nan=False, allow_infinity=False)


def records(*losses: float, **more: object) -> dict[int, dict[str, object]]:
    return {step: {"loss_hex": loss.hex(), **more} for step, loss in enumerate(losses, start=1)}


@given(finite, finite)
def test_ulps_count_the_floats_between(left: float, right: float) -> None:
    assert ulps_between(left, math.nextafter(left, math.inf)) == 1
    assert ulps_between(left, right) == ulps_between(right, left)
    assert (ulps_between(left, right) == 0) == (left == right)


@given(finite, finite, finite)
def test_ulps_add_up_along_the_line(one: float, two: float, three: float) -> None:
    low, middle, high = sorted((one, two, three))
    assert ulps_between(low, middle) + ulps_between(middle, high) == ulps_between(low, high)


def test_the_first_difference_is_named_with_both_values() -> None:
    found = compare(records(1.0, 2.0, 3.0), records(1.0, math.nextafter(2.0, 3.0), 4.0))
    assert (found.holds, found.num_compared) == (False, 3)
    assert found.first
    assert (found.first.step, found.first.ulps) == (2, 1)
    assert [difference.step for difference in found.differences] == [2, 3]
    assert "0x1.0000000000000p+1 (2), the computed one 0x1.0000000000001p+1 (2): 1 ulp apart" in found.first.sentence()


def test_a_tolerance_allows_what_is_near_and_never_what_is_not_finite() -> None:
    near, far, infinite = (compare(records(1.0), records(value), tolerance=1e-4) for value in (1.00005, 1.0003, math.inf))
    assert (near.holds, far.holds, infinite.holds) == (True, False, False)
    assert 4e-5 < near.widest < 6e-5
    assert compare(records(math.inf), records(math.inf)).holds, "the same bits"


def test_steps_that_one_side_lacks_are_not_compared() -> None:
    assert compare({}, records(1.0)).num_compared == 0
    assert compare(records(1.0, 2.0), records(1.0)).num_compared == 1


def test_causes_name_what_else_differs() -> None:
    mine, theirs = records(1.0, samples=[0, 8], lr=0.1)[1], records(2.0, samples=[8, 16], lr=0.2)[1]
    causes = list(likely_causes(mine, theirs, {"torch": "2.12", "threads": "1"}, {"torch": "2.13", "threads": "1"}))
    assert causes == [
        "other samples were consumed: recorded [0, 8], computed [8, 16]",
        "the learning rate differs: recorded 0.1, computed 0.2",
        "what computes is not what computed: torch was 2.12, is 2.13",
    ]
    assert "not recorded" in next(likely_causes({}, {}, {}, {"torch": "2.13"}))
    assert "a part of the state was not restored" in next(likely_causes({}, {}, {"torch": "2.13"}, {"torch": "2.13"}))
