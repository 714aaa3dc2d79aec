"""Where the shards of all parameters lie in one flat vector, cut by rows as FSDP2 cuts them (`Shard(0)`).

vector (W, S): for each of W ranks S elements: its rows of the first parameter, of the second, ...; a parameter of n rows gives each
rank ceil(n / W) of them, the last ranks fewer or none. What is left of their S elements is padding, which nobody reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Place:
    """Of one parameter, in each rank's S elements."""

    start: int
    num_rows: int
    row_numel: int
    chunk_rows: int  # of each rank, but the last ones


class RowLayout:
    """For `world_size` ranks and the whole parameters' shapes, in their order."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], world_size: int) -> None:
        self.world_size, self.shard_numel = world_size, 0
        self._places: dict[str, _Place] = {}
        for name, (num_rows, *rest) in shapes.items():
            place = _Place(self.shard_numel, num_rows, math.prod(rest), -(-num_rows // world_size))
            self._places[name] = place
            self.shard_numel += place.chunk_rows * place.row_numel

    @property
    def numel(self) -> int:
        return self.world_size * self.shard_numel

    def pack(self, vector: Tensor, whole: Mapping[str, Tensor], *, add: bool = False) -> None:
        """Copies whole tensors into the vector, or adds them to what it holds."""
        pairs = [pair for name, tensor in whole.items() for pair in self._pairs(vector, name, tensor)]
        places, values = [place for place, _ in pairs], [value for _, value in pairs]
        if add:
            torch._foreach_add_(places, values)
        else:
            torch._foreach_copy_(places, values)

    def unpack(self, vector: Tensor, whole: Mapping[str, Tensor]) -> None:
        """Copies the vector into whole, contiguous tensors."""
        pairs = [pair for name, tensor in whole.items() for pair in self._pairs(vector, name, tensor)]
        torch._foreach_copy_([value for _, value in pairs], [place for place, _ in pairs])

    def shards(self, elements: Tensor, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Views of one rank's S elements, shaped like its local shards."""
        return {
            name: elements[self._places[name].start : self._places[name].start + shard.numel()].view(shard.shape)
            for name, shard in local.items()
        }

    def _pairs(self, vector: Tensor, name: str, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(place in the vector, part of the tensor): one pair for the ranks that have all their rows, one for the rank that has fewer."""
        place, ranks = self._places[name], vector.view(self.world_size, self.shard_numel)
        rows = tensor.reshape(place.num_rows, place.row_numel)
        full, left = divmod(place.num_rows, place.chunk_rows)
        chunk = place.chunk_rows * place.row_numel
        yield ranks[:full, place.start : place.start + chunk], rows[: full * place.chunk_rows].view(full, chunk)
        if left:
            yield ranks[full, place.start : place.start + left * place.row_numel], rows[full * place.chunk_rows :].view(-1)
