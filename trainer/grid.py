"""How the ranks of a run share a model: replicas of it, each cut into shards, each computed by a group of tensor-parallel ranks. Pure.

    rank = (replica x shards + shard) x tensor + its number in the tensor-parallel group

So the ranks of a tensor-parallel group are neighbours, and with sharding = "node" those of a replica are the ranks of a node. The grid
follows from the world size, which may change at every restart, and from run.toml; it is never saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .config import TrainSection


class Seat(NamedTuple):
    """Of a rank, on its node."""

    local_rank: int
    local_size: int  # ranks of that node


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """`replicas` x `shards` x `tensor` ranks."""

    replicas: int
    shards: int
    tensor: int

    @property
    def is_plain(self) -> bool:
        """Shards alone, over all ranks."""
        return self.replicas == self.tensor == 1


def grid_of(train: TrainSection, seats: Sequence[Seat]) -> Grid:
    """For ranks at these seats, in rank order. Raises ValueError where run.toml does not fit them; it names both."""
    size, tensor = len(seats), train.tensor_parallel
    if train.sharding == "node" or tensor > 1:
        _check_seats(train, seats)
    local_size = seats[0].local_size
    if local_size % tensor:
        raise ValueError(
            f"run.toml: train.tensor_parallel = {tensor} must divide the {local_size} ranks of a node (cluster.ranks_per_node): a "
            "group computes each layer together, so it never spans nodes"
        )
    replicas = {"full": 1, "node": size // local_size, "none": size // tensor}[train.sharding]
    return Grid(replicas=replicas, shards=size // tensor // replicas, tensor=tensor)


def _check_seats(train: TrainSection, seats: Sequence[Seat]) -> None:
    """Of what needs nodes alike, with neighbouring ranks."""
    key = 'train.sharding = "node"' if train.sharding == "node" else f"train.tensor_parallel = {train.tensor_parallel}"
    if len(sizes := {seat.local_size for seat in seats}) > 1:
        shown = ", ".join(map(str, sorted(sizes)))
        raise ValueError(f"run.toml: {key} needs as many ranks on every node, and nodes have {shown}: set cluster.ranks_per_node")
    (local_size,) = sizes
    if odd := [rank for rank, seat in enumerate(seats) if seat.local_rank != rank % local_size]:
        rank = odd[0]
        raise ValueError(f"run.toml: {key} needs the ranks of a node to be neighbours, and rank {rank} is number {seats[rank].local_rank}")
