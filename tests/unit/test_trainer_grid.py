"""How ranks share a model: by what run.toml says and where they sit."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from keepstep.trainer.config import TrainSection
from keepstep.trainer.grid import Grid, Seat, grid_of


def seats(*sizes: int) -> list[Seat]:
    """Of nodes with so many ranks."""
    return [Seat(local, size) for size in sizes for local in range(size)]


def grid(sharding: str, tensor: int, *sizes: int) -> Grid:
    return grid_of(TrainSection.model_validate({"sharding": sharding, "tensor_parallel": tensor}), seats(*sizes))


@pytest.mark.parametrize(
    ("sharding", "tensor", "sizes", "expected"),
    [
        ("full", 1, (2, 2), (1, 4, 1)),
        ("full", 1, (3, 1), (1, 4, 1)),  # nodes may differ
        ("node", 1, (2, 2, 2), (3, 2, 1)),
        ("node", 1, (4,), (1, 4, 1)),
        ("none", 1, (2, 2), (4, 1, 1)),
        ("none", 1, (2, 1), (3, 1, 1)),
        ("full", 2, (4, 4), (1, 4, 2)),
        ("node", 2, (4, 4), (2, 2, 2)),
        ("none", 2, (4, 4), (4, 1, 2)),
        ("node", 4, (4, 4), (2, 1, 4)),
    ],
)
def test_the_grid_follows_from_the_ranks_and_their_nodes(
    sharding: str, tensor: int, sizes: tuple[int, ...], expected: tuple[int, int, int]
) -> None:
    found = grid(sharding, tensor, *sizes)
    assert (found.replicas, found.shards, found.tensor) == expected
    assert found.is_plain == (expected[0] == expected[2] == 1)


@given(st.sampled_from(["full", "node", "none"]), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_every_rank_has_a_place(sharding: str, tensor: int, num_nodes: int, ranks_per_node: int) -> None:
    assume(ranks_per_node % tensor == 0)
    found = grid(sharding, tensor, *[ranks_per_node] * num_nodes)
    assert found.replicas * found.shards * found.tensor == num_nodes * ranks_per_node


def test_a_tensor_parallel_group_never_spans_nodes() -> None:
    with pytest.raises(ValueError, match=r"train.tensor_parallel = 4 must divide the 2 ranks of a node \(cluster.ranks_per_node\)"):
        grid("full", 4, 2, 2)


@pytest.mark.parametrize(("sharding", "tensor", "key"), [("node", 1, 'train.sharding = "node"'), ("full", 2, "train.tensor_parallel = 2")])
def test_nodes_with_different_numbers_of_ranks_are_refused(sharding: str, tensor: int, key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} needs as many ranks on every node, and nodes have 2, 4: set cluster.ranks_per_node"):
        grid(sharding, tensor, 2, 4)


def test_ranks_of_a_node_that_are_no_neighbours_are_refused() -> None:
    mixed = [Seat(0, 2), Seat(0, 2), Seat(1, 2), Seat(1, 2)]
    with pytest.raises(ValueError, match="needs the ranks of a node to be neighbours, and rank 1 is number 0"):
        grid_of(TrainSection(sharding="node"), mixed)
