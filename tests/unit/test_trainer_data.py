"""Which samples are consumed when."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.storage.skips import Range
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.data import Feed, feed_for, micro_batches
from keepstep.trainer.order import Order

FAR = 10**15
world_sizes = st.integers(1, 50)
orders = st.builds(
    Order,
    seed=st.integers(0, 2**62),
    sizes=st.integers(1, 300).map(lambda size: (size,)),
    kind=st.sampled_from(["shuffled", "blocks", "sequential"]),
    block_samples=st.integers(1, 40),
)


@st.composite
def skips(draw: st.DrawFn) -> tuple[Range, ...]:
    """Ranges that are apart from each other."""
    position, found = 0, []
    for gap, length in draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=6)):
        first = position + gap - (position == 0)
        position = first + length
        found.append((first, position))
    return tuple(found)


feeds = st.builds(Feed, order=orders, samples_per_step=st.integers(1, 40), skips=skips())


def a_feed(samples_per_step: int, *skipped: Range) -> Feed:
    return Feed(order=Order(seed=1, sizes=(7,)), samples_per_step=samples_per_step, skips=skipped)


def config(**sections: Any) -> TrainerConfig:
    return TrainerConfig.model_validate(sections)


@given(feed=feeds, step=st.integers(1, 100), world_size=world_sizes, micro=st.integers(0, 9))
def test_the_ranks_and_micro_batches_of_a_step_cover_its_turns_once_at_any_world_size(
    feed: Feed, step: int, world_size: int, micro: int
) -> None:
    shares = [feed.share(step, rank, world_size) for rank in range(world_size)]
    sizes = [last - first for first, last in shares]
    largest = -(-feed.samples_per_step // world_size)
    parts = [micro_batches(first, last, largest, micro) for first, last in shares]
    assert [turn for rank in parts for part in rank for turn in range(*part)] == list(range(*feed.turns(step)))
    assert len({len(rank) for rank in parts}) == 1, "each forward pass communicates"
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == largest


@given(feed=feeds, turns=st.integers(0, 300))
def test_turns_are_the_positions_that_are_not_skipped_in_order(feed: Feed, turns: int) -> None:
    end = turns + sum(last - first for first, last in feed.skips)
    kept = [position for position in range(end) if not any(first <= position < last for first, last in feed.skips)]
    assert feed.at(0, turns).tolist() == kept[:turns]
    assert [feed.turn(position) for position in kept[:turns]] == list(range(turns))
    assert {feed.turn(position) for first, last in feed.skips for position in range(first, last)} <= {None}


@given(feed=feeds, step=st.integers(0, 12), later=skips(), apart=st.integers(1, 9))
def test_a_skip_at_or_behind_the_end_of_a_step_changes_nothing_before_it(
    feed: Feed, step: int, later: tuple[Range, ...], apart: int
) -> None:
    """What a rewind relies on: it skips what was not consumed yet, and the steps before it stay as they were."""
    end = feed.end(step)
    before = tuple((first, last) for first, last in feed.skips if last < end)
    changed = replace(feed, skips=(*before, *((first + end, last + end) for first, last in later)))
    consumed = feed.turns(step)[1]
    assert changed.end(step) == end
    assert changed.at(0, consumed).tolist() == feed.at(0, consumed).tolist()
    assert changed.samples(0, consumed).tolist() == feed.samples(0, consumed).tolist()


@given(feed=feeds, step=st.integers(1, 50))
def test_the_span_of_a_step_is_from_its_first_position_to_behind_its_last(feed: Feed, step: int) -> None:
    positions = feed.at(*feed.turns(step)).tolist()
    assert feed.positions(step) == (positions[0], positions[-1] + 1)
    assert feed.end(step) == positions[-1] + 1


@given(feed=feeds, first=st.integers(0, 1000), cut=st.integers(0, 30), more=st.integers(0, 30))
def test_a_sample_depends_on_its_turn_alone(feed: Feed, first: int, cut: int, more: int) -> None:
    whole = feed.samples(first, first + cut + more).tolist()
    assert whole == feed.samples(first, first + cut).tolist() + feed.samples(first + cut, first + cut + more).tolist()


def test_steps_follow_each_other_without_gap() -> None:
    assert [a_feed(5).positions(step) for step in (1, 2)] == [(0, 5), (5, 10)]
    assert [a_feed(5, (3, 6), (10, 11)).positions(step) for step in (1, 2)] == [(0, 8), (8, 14)]
    assert a_feed(5, (0, 4)).end(0) == 0


def test_many_skips_and_far_positions_cost_what_few_and_near_ones_cost() -> None:
    """By bisection: with 50,000 skips in front, a walk over them would take this test minutes."""
    many = tuple((10 * i, 10 * i + 3) for i in range(50_000))
    feed = Feed(order=Order(seed=1, sizes=(10**9,)), samples_per_step=10, skips=many)
    for step in range(10**14, 10**14 + 200):
        first, last = feed.positions(step)
        assert last - first == 10
        assert first == 10 * (step - 1) + 150_000
        assert feed.turn(first) == 10 * (step - 1)


@given(first=st.integers(0, 50), size=st.integers(0, 20), extra=st.integers(0, 1), micro=st.integers(0, 8))
def test_micro_batches_are_no_larger_than_asked(first: int, size: int, extra: int, micro: int) -> None:
    largest = max(1, size + extra)
    parts = micro_batches(first, first + size, largest, micro)
    assert [position for part in parts for position in range(*part)] == list(range(first, first + size))
    assert len(parts) == len(micro_batches(0, largest, largest, micro))
    assert all(last - start <= (micro or largest) for start, last in parts)


class TestOfConfig:
    def test_it_says_everything(self) -> None:
        data = {"sources": ["a", "b"], "weights": [1, 3], "order": "blocks", "block_samples": 5, "skip": ["8:9", "0:2"]}
        made = feed_for((10, 20), config(run={"seed": 4}, data=data, model={"context": 16}, train={"batch_tokens": 64}), skips=["9:12"])
        order = Order(seed=4, sizes=(10, 20), quotas=(1, 3), kind="blocks", block_samples=5)
        assert made == Feed(order=order, samples_per_step=4, skips=((0, 2), (8, 12)))

    def test_a_single_source_needs_no_cycle(self) -> None:
        assert feed_for((1234,), config()).order == Order(seed=0, sizes=(1234,))

    def test_sources_without_weights_come_by_their_size(self) -> None:
        assert feed_for((300, 100), config(data={"sources": ["a", "b"]})).order.quotas == (3, 1)

    def test_a_batch_of_no_whole_number_of_samples_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"train\.batch_tokens = 40 must be a multiple of model\.context = 16"):
            feed_for((9,), config(model={"context": 16}, train={"batch_tokens": 40}))

    def test_a_source_that_would_never_come_is_named(self) -> None:
        with pytest.raises(
            ValueError, match=r"data\.weights: the share of data\.sources\[1\] is below 1/65536 .*; give it a larger weight"
        ):
            feed_for((5, 5), config(data={"sources": ["a", "b"], "weights": [1, 1e-6]}))

    @pytest.mark.parametrize("text", ["5", "5:5", "7:5", "-1:5", "a:b", "1:2:3", ""])
    def test_a_malformed_skip_is_refused_with_an_example(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"FIRST:LAST, .* for example 1024:1040"):
            feed_for((9,), config(data={"skip": [text]}))
