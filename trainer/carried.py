"""The state that a recurrent model carries from one step to the next (truncated back-propagation through time, Williams and Peng 1990).

With data.order = "streams" each row of a batch goes on where that row of the batch before ended, so the state of the layers at its end is
part of the training's state: a tensor of a row for each row of the batch, spread over the ranks as the rows are, and saved like any other.
A row that goes on from nothing, at the start of an epoch or behind samples that were skipped, begins with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from .data import Feed
from .loader import MicroBatch
from .models import Memory
from .parallel import World


class Carried:
    """Of this rank's rows, float32.

    Args:
        shape: layers, tensors of a layer's state, and width.

    Attributes:
        tensors: "<layer>.<which>" -> (rows of the batch, width), DTensors by rows.
    """

    def __init__(self, shape: tuple[int, int, int], feed: Feed, world: World) -> None:
        layers, count, width = shape
        self._feed, self._count = feed, count
        rows = feed.samples_per_step
        first, last = feed.share(1, world.rank, world.size)
        self._first_row = first
        is_flat = world.mesh.ndim == 1 and world.mesh.size() == world.size  # else parameters have replicas; rows have none
        mesh = world.mesh if is_flat else init_device_mesh(world.device.type, (world.size,))
        self._rows: dict[tuple[int, int], Tensor] = {
            (layer, which): torch.zeros(last - first, width, device=world.device) for layer in range(layers) for which in range(count)
        }
        self.tensors: Mapping[str, DTensor] = {
            f"{layer}.{which}": DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=torch.Size((rows, width)), stride=(width, 1)
            )
            for (layer, which), local in self._rows.items()
        }
        self._next: list[tuple[slice, Sequence[tuple[Tensor, ...]]]] = []

    def before(self, part: MicroBatch) -> Memory:
        """What a micro-batch goes on from."""
        memory = Memory()
        if part.counts:
            goes_on = torch.from_numpy(self._feed.goes_on(*part.turns))[:, None]
            rows = self._place(part)
            for layer in {layer for layer, _ in self._rows}:
                states = (self._rows[layer, which][rows] for which in range(self._count))
                memory.layers[layer] = tuple((state * goes_on.to(state.device))[None] for state in states)
        return memory

    def after(self, part: MicroBatch, memory: Memory) -> None:
        """Of a micro-batch that went through the model; counts from `take` on."""
        if part.counts:
            memory.detach()
            self._next.append((self._place(part), [memory.layers[layer] for layer in sorted(memory.layers)]))

    def take(self) -> None:
        """The step is finished: what its micro-batches ended with is what the next one goes on from."""
        for rows, layers in self._next:
            for layer, states in enumerate(layers):
                for which, state in enumerate(states):
                    self._rows[layer, which][rows] = state[0].float()
        self._next.clear()

    def forget(self) -> None:
        """As at the start of a training."""
        self._next.clear()
        for rows in self._rows.values():
            rows.zero_()

    def _place(self, part: MicroBatch) -> slice:
        first, last = part.turns
        batch = first - first % self._feed.samples_per_step + self._first_row
        return slice(first - batch, last - batch)
