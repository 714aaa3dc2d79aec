"""Ranges of positions that are left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.storage.skips import cover, parse, position_of, ranges, union

SKIPS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)).map(lambda one: f"{one[0]}:{one[0] + one[1]}"), max_size=6)


def positions(skips: list[str] | tuple[str, ...]) -> set[int]:
    return {position for text in skips for position in range(*parse(text))}


@pytest.mark.parametrize("text", ["", "7", "7:", "7:7", "8:7", "-1:3", "a:b", "1:2:3", "1.0:2", f"1:{'9' * 17}"])
def test_what_is_no_range_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="FIRST:LAST"):
        parse(text)


@given(SKIPS, SKIPS)
def test_a_union_has_one_spelling_and_all_positions(one: list[str], other: list[str]) -> None:
    both = union(one, other)
    assert positions(both) == positions(one) | positions(other)
    assert both == union(both) == union(other, one)
    assert all(last < first for (_, last), (first, _) in zip(ranges(both), ranges(both)[1:], strict=False)), "neighbours are merged"


@given(SKIPS, SKIPS)
def test_to_cover_is_to_hold_every_position(one: list[str], other: list[str]) -> None:
    assert cover(one, other) == (positions(one) >= positions(other))


@given(SKIPS, st.integers(0, 120))
def test_turns_count_what_is_left(skips: list[str], turn: int) -> None:
    left = [position for position in range(200) if position not in positions(skips)]
    assert position_of(turn, skips) == left[turn]
