"""Sums whose bits do not depend on who adds: the tree of logical ranks, exact sums, rows in a vector."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keepstep.trainer.config import OptimizerSection
from keepstep.trainer.exact import row_sums
from keepstep.trainer.optim import ShardOptimizer
from keepstep.trainer.rows import RowLayout
from keepstep.trainer.sums import exact, total
from keepstep.trainer.tree import add_up, halves, nodes_within, owned

LEAVES = st.integers(1, 40)
WORLDS = st.integers(1, 50)
FLOATS = st.floats(-1e30, 1e30, allow_nan=False)


class TestTree:
    @given(LEAVES, WORLDS)
    def test_every_leaf_is_computed_once_in_order_and_evenly(self, leaves: int, world_size: int) -> None:
        parts = [owned(rank, world_size, leaves) for rank in range(world_size)]
        assert [leaf for part in parts for leaf in part] == list(range(leaves))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1

    @given(LEAVES, WORLDS)
    def test_what_ranks_add_and_what_is_left_make_the_same_tree_at_any_world_size(self, leaves: int, world_size: int) -> None:
        def leaf(node: tuple[int, int]) -> str | None:
            return str(node[0]) if node[1] - node[0] == 1 else None

        def add(left: str, right: str) -> str:
            return f"({left}+{right})"

        alone = add_up((0, leaves), leaf, add)
        nodes = [node for rank in range(world_size) for node in nodes_within(owned(rank, world_size, leaves), leaves)]
        partial = {node: add_up(node, leaf, add) for node in nodes}
        assert add_up((0, leaves), partial.get, add) == alone

    @given(LEAVES, st.integers(0, 39), st.integers(1, 40))
    def test_nodes_are_few_and_cover_their_part(self, leaves: int, first: int, count: int) -> None:
        part = range(min(first, leaves - 1), min(first + count, leaves))
        nodes = nodes_within(part, leaves)
        assert [leaf for node in nodes for leaf in range(*node)] == list(part)
        assert len(nodes) <= 2 * math.ceil(math.log2(leaves + 1))

    def test_the_order_is_this_one(self) -> None:
        """Another one would be another training: the bits of all runs depend on it."""
        assert halves((0, 6)) == ((0, 4), (4, 6))
        assert [halves((0, n))[0][1] for n in range(2, 10)] == [1, 2, 2, 4, 4, 4, 4, 8]
        assert nodes_within(range(1, 6), 8) == [(1, 2), (2, 4), (4, 6)]
        assert nodes_within(range(0), 8) == []


class TestSums:
    @given(st.lists(FLOATS, max_size=30), st.randoms(use_true_random=False), st.integers(1, 6))
    def test_any_order_and_any_grouping_gives_the_same_bits(self, terms: list[float], chance: object, groups: int) -> None:
        shuffled = list(terms)
        chance.shuffle(shuffled)  # type: ignore[attr-defined]
        parts = [exact(shuffled[i::groups]) for i in range(groups)]
        assert total([x for first, rests in parts for x in (first, *rests)]) == total(terms) == math.fsum(terms)

    def test_plain_sums_would_not(self) -> None:
        terms = [0.1] * 3 + [1e16, 1.0, -1e16]
        assert sum(terms) != sum(reversed(terms))
        assert total(terms) == total(reversed(terms))

    @pytest.mark.parametrize("terms", [[math.inf], [math.inf, -math.inf], [math.nan, 1.0], [1e308, 1e308]])
    def test_what_is_not_finite_stays_so(self, terms: list[float]) -> None:
        assert not math.isfinite(total(terms))
        first, rests = exact(terms)
        assert not math.isfinite(first)
        assert rests == (0.0, 0.0)


SHAPES = st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), min_size=1)


class TestRows:
    @given(SHAPES, st.integers(1, 12))
    def test_shards_are_the_rows_that_fsdp_gives_each_rank(self, shapes: dict[str, tuple[int, ...]], world_size: int) -> None:
        whole = {name: torch.randn(shape) for name, shape in shapes.items()}
        layout = RowLayout(shapes, world_size)
        vector = torch.full((layout.numel,), torch.nan)
        layout.pack(vector, whole)
        for rank, elements in enumerate(vector.view(world_size, -1)):
            chunks = {name: [*tensor.chunk(world_size), *[tensor[:0]] * world_size][rank] for name, tensor in whole.items()}
            for name, shard in layout.shards(elements, chunks).items():
                assert torch.equal(shard, chunks[name])

    @given(SHAPES, st.integers(1, 12))
    def test_unpacking_is_the_inverse_and_packing_can_add(self, shapes: dict[str, tuple[int, ...]], world_size: int) -> None:
        whole = {name: torch.randn(shape) for name, shape in shapes.items()}
        layout = RowLayout(shapes, world_size)
        vector = torch.zeros(layout.numel)
        layout.pack(vector, whole)
        layout.pack(vector, whole, add=True)
        back = {name: torch.empty(shape) for name, shape in shapes.items()}
        layout.unpack(vector, back)
        assert all(torch.equal(back[name], whole[name] * 2) for name in whole)

    @given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 8))
    def test_the_sum_of_a_row_does_not_depend_on_its_company(self, rows: int, columns: int, world_size: int) -> None:
        values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)).double().square()
        sums = torch.cat([row_sums(chunk) for chunk in values.chunk(world_size)])
        assert sums.tolist() == row_sums(values).tolist()
        assert sums.tolist() == pytest.approx(values.sum(1).tolist(), rel=1e-12)


def updated(values: torch.Tensor, gradients: list[torch.Tensor], *, fused: bool) -> torch.Tensor:
    """Values and moments of one matrix after some updates."""
    model = torch.nn.ParameterDict({"w": torch.nn.Parameter(values.clone())})
    optimizer = ShardOptimizer(model, OptimizerSection(), fused=fused)
    for gradient in gradients:
        optimizer.shards["w"].grad = gradient.clone()
        optimizer.update(lr=1e-2, scale=0.37)
    state = optimizer.state()["w"]
    return torch.stack([optimizer.shards["w"].detach(), state["exp_avg"], state["exp_avg_sq"]])


@pytest.mark.parametrize("world_size", [2, 3, 5, 7, 64])
def test_an_update_without_the_fused_kernel_does_not_depend_on_where_a_shard_is_cut(world_size: int) -> None:
    chance = torch.Generator().manual_seed(0)
    values = torch.randn(251, 13, generator=chance)
    gradients = [torch.randn(251, 13, generator=chance) * 10.0**-i for i in range(4)]
    whole = updated(values, gradients, fused=False)
    rows = -(-len(values) // world_size)
    parts = [
        updated(values[i : i + rows], [gradient[i : i + rows] for gradient in gradients], fused=False) for i in range(0, len(values), rows)
    ]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_the_nodes_of_all_ranks_lie_in_the_order_of_their_leaves() -> None:
    """Ranks send them so, and none is named on the wire."""
    for leaves in range(1, 30):
        for world_size in range(1, 9):
            nodes = [node for rank in range(world_size) for node in nodes_within(owned(rank, world_size, leaves), leaves)]
            assert all(left[1] == right[0] for left, right in pairwise(nodes))
