"""The canonical order: a permutation per epoch and source, sources by weight, each position in O(1), the same in every version."""

from __future__ import annotations

import json
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.trainer.order import SLOTS, Order, Positions, apportion, in_blocks, shuffled

GOLDEN = Path(__file__).with_name("canonical_order.json")
FAR = 10**15
KINDS = ("shuffled", "blocks", "sequential")
weights = st.lists(st.floats(1e-3, 1e3) | st.integers(1, 1000), min_size=1, max_size=6).map(tuple)


def positions(first: int, last: int) -> Positions:
    return np.arange(first, last, dtype=np.uint64)


@st.composite
def orders(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> Order:
    sizes = draw(st.lists(st.integers(1, 200), min_size=1, max_size=4).map(tuple))
    quotas = draw(st.tuples(*(st.integers(1, 9) for _ in sizes)))
    kind = draw(st.sampled_from(kinds))
    return Order(seed=draw(st.integers(0, 2**63 - 1)), sizes=sizes, quotas=quotas, kind=kind, block_samples=draw(st.integers(1, 50)))  # type: ignore[arg-type]


class TestOneSource:
    @given(
        size=st.integers(1, 2000),
        seed=st.integers(0, 2**63 - 1),
        kind=st.sampled_from(KINDS),
        block=st.integers(1, 300),
        epoch=st.integers(0, 5),
    )
    def test_an_epoch_has_each_sample_once(self, size: int, seed: int, kind: Any, block: int, epoch: int) -> None:
        order = Order(seed=seed, sizes=(size,), kind=kind, block_samples=block)
        assert sorted(order.samples(positions(epoch * size, (epoch + 1) * size)).tolist()) == list(range(size))

    @given(count=st.integers(1, 2000), key=st.integers(0, 2**64 - 1))
    def test_shuffling_is_a_permutation(self, count: int, key: int) -> None:
        assert sorted(shuffled(positions(0, count), count, np.full(count, key, dtype=np.uint64)).tolist()) == list(range(count))

    @given(count=st.integers(1, 2000), block=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
    def test_blocks_stay_together_and_are_shuffled_inside(self, count: int, block: int, key: int) -> None:
        order = in_blocks(positions(0, count), count, block, np.full(count, key, dtype=np.uint64))
        assert sorted(order.tolist()) == list(range(count))
        jumps = int((np.diff(order // block) != 0).sum())
        assert jumps == -(-count // block) - 1

    @given(order=orders(), first=st.integers(0, 2000) | st.just(FAR), count=st.integers(0, 600))
    def test_a_sample_is_found_wherever_it_stands(self, order: Order, first: int, count: int) -> None:
        there = order.samples(positions(first, first + count)).tolist()
        for sample in {*there[:5], 0, sum(order.sizes) - 1}:
            found = order.positions_of(sample, first, first + count).tolist()
            assert found == [first + i for i, each in enumerate(there) if each == sample]

    def test_epochs_and_seeds_have_orders_of_their_own(self) -> None:
        for kind in ("shuffled", "blocks"):
            one, two = (Order(seed=seed, sizes=(1000,), kind=kind, block_samples=30) for seed in (1, 2))  # type: ignore[arg-type]
            found = [np.arange(1000), one.samples(positions(0, 1000)), one.samples(positions(1000, 2000)), two.samples(positions(0, 1000))]
            for i, order in enumerate(found):
                assert all((order == other).mean() < 0.05 for other in found[:i]), kind

    def test_no_block_has_the_order_of_another(self) -> None:
        order = in_blocks(positions(0, 3000), 3000, 1000, np.full(3000, 5, dtype=np.uint64)).reshape(3, 1000) % np.uint64(1000)
        assert all((order[i] == order[j]).mean() < 0.02 for i in range(3) for j in range(i))

    def test_sequential_is_the_sources_own_order(self) -> None:
        assert Order(seed=9, sizes=(4,), kind="sequential").samples(positions(2, 10)).tolist() == [2, 3, 0, 1, 2, 3, 0, 1]


class TestSources:
    @given(order=orders(), first=st.integers(0, 2000))
    def test_each_source_has_its_own_epochs(self, order: Order, first: int) -> None:
        """The samples of a source, in the order in which they come, are its epochs one after the other, each complete."""
        samples = order.samples(positions(0, 2500))
        start = 0
        for source, size in enumerate(order.sizes):
            mine = samples[(samples >= start) & (samples < start + size)] - np.uint64(start)
            alone = [mine[epoch * size : (epoch + 1) * size].tolist() for epoch in range(len(mine) // size)]
            assert all(sorted(epoch) == list(range(size)) for epoch in alone), source
            start += size
        assert samples.max() < start

    @given(order=orders(), first=st.integers(0, FAR), cut=st.integers(0, 40), more=st.integers(0, 40))
    def test_a_sample_depends_on_its_position_alone(self, order: Order, first: int, cut: int, more: int) -> None:
        whole = order.samples(positions(first, first + cut + more)).tolist()
        assert (
            whole
            == order.samples(positions(first, first + cut)).tolist() + order.samples(positions(first + cut, first + cut + more)).tolist()
        )

    @given(weights=weights, first=st.integers(0, 2 * SLOTS), length=st.integers(1, SLOTS))
    def test_every_window_has_the_sources_by_weight_within_the_bound(self, weights: tuple[float, ...], first: int, length: int) -> None:
        quotas = apportion(weights)
        order = Order(seed=0, sizes=(7,) * len(weights), quotas=quotas)
        sources, _ = order.sources(positions(first, first + length))
        for source, weight in enumerate(weights):
            share = Fraction(quotas[source], sum(quotas))
            assert abs(share - Fraction(weight) / sum(map(Fraction, weights))) < Fraction(1, SLOTS)
            assert abs(int((sources == source).sum()) - length * share) <= 1 + len(weights) * share

    @given(order=orders(), position=st.integers(0, 1000))
    def test_what_was_drawn_of_a_source_is_counted_from_the_start(self, order: Order, position: int) -> None:
        sources, drawn = order.sources(positions(0, 1000))
        assert order.drawn(position) == tuple(int((sources[:position] == source).sum()) for source in range(len(order.sizes)))
        for source in range(len(order.sizes)):
            mine = drawn[sources == source]
            assert mine.tolist() == list(range(len(mine)))

    def test_two_sources_of_one_size_have_orders_of_their_own(self) -> None:
        samples = Order(seed=3, sizes=(500, 500), quotas=(1, 1)).samples(positions(0, 1000))
        assert (samples[samples < 500] == samples[samples >= 500] - 500).mean() < 0.02

    @pytest.mark.parametrize(
        ("weights", "quotas"),
        [
            ((1,), (1,)),
            ((3, 1), (3, 1)),
            ((0.5, 0.25, 0.25), (2, 1, 1)),
            ((1, 1, 1), (1, 1, 1)),
            ((0.7, 0.2, 0.1), (7, 2, 1)),
            ((1e-3, 3.5e-3), (2, 7)),
            ((100_000, 1), (65535, 1)),
            ((0.33333, 0.33333, 0.33334), (21845, 21845, 21846)),
            ((99_999, 100_000, 100_001), (21845, 21845, 21846)),
            ((1e9, 1), (1, 0)),
        ],
    )
    def test_weights_are_taken_as_written_and_else_rounded_by_largest_remainders(
        self, weights: tuple[float, ...], quotas: tuple[int, ...]
    ) -> None:
        assert apportion(weights) == quotas


@pytest.mark.parametrize("kind", KINDS)
def test_a_far_position_costs_what_a_near_one_costs(kind: Any) -> None:
    """Nothing is walked or materialised: this set of samples has no table, and this position no predecessor."""
    order = Order(seed=1, sizes=(10**12, 10**13), quotas=(2, 5), kind=kind, block_samples=10**6)
    assert order.samples(positions(FAR, FAR + 50)).max() < 11 * 10**12
    assert len(set(order.samples(positions(FAR, FAR + 5000)).tolist())) == 5000


CASES = (
    # Before sources, blocks and skips existed; no run that was begun then may see another order.
    *(Order(seed=seed, sizes=(size,)) for seed, size in ((0, 1000), (0, 100), (0, 37), (7, 10), (123456789, 5000), (0, 2**33 + 5))),
    *(Order(seed=5, sizes=(1000,), kind=kind, block_samples=64) for kind in ("blocks", "sequential")),
    Order(seed=5, sizes=(1000, 70, 300), quotas=apportion((0.6, 0.1, 0.3))),
    Order(seed=5, sizes=(1000, 70, 300), quotas=apportion((1000, 70, 300)), kind="blocks", block_samples=16),
    Order(seed=5, sizes=(1000, 70, 300), quotas=apportion((99_999, 100_000, 100_001)), kind="sequential"),
)


def pinned(order: Order) -> dict[str, Any]:
    return {
        "order": f"{order.kind}, seed {order.seed}, sizes {order.sizes}, quotas {order.quotas}, blocks of {order.block_samples}",
        "first 100": " ".join(map(str, order.samples(positions(0, 100)).tolist())),
        "10 at 10^15": " ".join(map(str, order.samples(positions(FAR, FAR + 10)).tolist())),
        "crc32 of 5000": zlib.crc32(order.samples(positions(0, 5000)).astype("<u8").tobytes()),
    }


def test_the_order_is_the_same_in_every_version(rewrite: bool) -> None:
    """A changed line would reorder the data of runs that exist: only accept it with `--rewrite` for a case that is new."""
    actual = json.dumps([pinned(order) for order in CASES], indent=1) + "\n"
    if rewrite:
        GOLDEN.write_text(actual)
    assert actual == GOLDEN.read_text()
