"""Which samples are consumed when."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.trainer.data import Feed, feed_for, micro_batches, rows, shuffled

feeds = st.builds(Feed, seed=st.integers(0, 2**62), num_samples=st.integers(1, 300), samples_per_step=st.integers(1, 40))
world_sizes = st.integers(1, 50)


@given(feed=feeds, step=st.integers(1, 100), world_size=world_sizes)
def test_the_ranks_of_a_step_cover_its_positions_once_at_any_world_size(feed: Feed, step: int, world_size: int) -> None:
    shares = [feed.share(step, rank, world_size) for rank in range(world_size)]
    assert [position for share in shares for position in range(*share)] == list(range(*feed.positions(step)))
    sizes = [last - first for first, last in shares]
    assert max(sizes) - min(sizes) <= 1


@given(feed=feeds)
def test_an_epoch_consumes_each_sample_once_and_the_next_one_again(feed: Feed) -> None:
    for epoch in range(2):
        seen = feed.samples(epoch * feed.num_samples, (epoch + 1) * feed.num_samples)
        assert sorted(seen.tolist()) == list(range(feed.num_samples))


@given(feed=feeds, first=st.integers(0, 1000), cut=st.integers(0, 30), more=st.integers(0, 30))
def test_a_sample_depends_on_its_position_alone(feed: Feed, first: int, cut: int, more: int) -> None:
    whole = feed.samples(first, first + cut + more).tolist()
    assert whole == feed.samples(first, first + cut).tolist() + feed.samples(first + cut, first + cut + more).tolist()


def test_steps_follow_each_other_without_gap() -> None:
    feed = Feed(seed=1, num_samples=7, samples_per_step=5)
    assert feed.positions(1) == (0, 5)
    assert feed.positions(2) == (5, 10)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    feed = Feed(seed=1, num_samples=1000, samples_per_step=1)
    orders = [feed.samples(0, 1000), feed.samples(1000, 2000), Feed(seed=2, num_samples=1000, samples_per_step=1).samples(0, 1000)]
    for i, order in enumerate(orders):
        for other in [np.arange(1000), *orders[:i]]:
            assert (order == other).mean() < 0.02


def test_the_order_is_the_same_in_every_version() -> None:
    assert Feed(seed=7, num_samples=10, samples_per_step=1).samples(0, 12).tolist() == [8, 4, 6, 2, 5, 7, 1, 3, 9, 0, 2, 7]


@given(count=st.integers(1, 2000), key=st.integers(0, 2**64 - 1))
def test_shuffling_is_a_permutation(count: int, key: int) -> None:
    assert sorted(shuffled(np.arange(count, dtype=np.uint64), count, key=key).tolist()) == list(range(count))


@given(first=st.integers(0, 50), size=st.integers(0, 20), extra=st.integers(0, 1), micro=st.integers(0, 8))
def test_micro_batches_cover_the_share_in_equally_many_parts_on_every_rank(first: int, size: int, extra: int, micro: int) -> None:
    largest = max(1, size + extra)
    parts = micro_batches(first, first + size, largest, micro)
    assert [position for part in parts for position in range(*part)] == list(range(first, first + size))
    assert len(parts) == len(micro_batches(0, largest, largest, micro))
    assert all(last - start <= (micro or largest) for start, last in parts)


def test_rows_hold_inputs_and_the_token_after_each() -> None:
    tokens = np.arange(100, dtype=np.uint16)
    assert rows(tokens, np.array([0, 3], dtype=np.uint64), context=4).tolist() == [[0, 1, 2, 3, 4], [12, 13, 14, 15, 16]]


def test_a_text_shorter_than_a_sample_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fewer than one sample \(model.context = 16\)"):
        feed_for(np.zeros(16, dtype=np.uint16), seed=0, context=16, batch_tokens=32)


def test_the_last_sample_has_its_target() -> None:
    feed = feed_for(np.zeros(33, dtype=np.uint16), seed=0, context=16, batch_tokens=32)
    assert (feed.num_samples, feed.samples_per_step) == (2, 2)


def test_a_batch_of_no_whole_number_of_samples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.batch_tokens = 40 must be a multiple of model\.context = 16"):
        feed_for(np.zeros(99, dtype=np.uint16), seed=0, context=16, batch_tokens=40)
