"""What computes a step: forward and backward over this rank's share of the batch, and the update that follows.

The loop knows an engine by this interface alone; which one a run has is decided in engines.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .evaluate import nll_sum
from .loader import MicroBatch
from .models import Gpt
from .optim import ShardOptimizer
from .parallel import World
from .samples import IGNORED
from .scaler import LossScaler
from .sums import Sums


class Engine(Protocol):
    @property
    def model(self) -> nn.Module:
        """As it computes and is evaluated."""

    @property
    def sharded(self) -> nn.Module:
        """Its parameters are this rank's shards, DTensors by rows: what is initialised, saved and restored."""

    @property
    def optimizer(self) -> ShardOptimizer: ...

    @property
    def shares(self) -> tuple[range, int]:
        """Which parts of a batch this rank computes, of how many."""

    def settle(self) -> None:
        """Collective. Once, when the shards have their values: the model takes them."""

    def backward(self, parts: Sequence[MicroBatch], *, step: int) -> Sums:
        """Collective. Afterwards the optimizer's shards hold the gradient of the mean over the global batch, times the loss's scale."""

    def update(self, *, lr: float, scale: float) -> None:
        """One update with gradients times `scale`; clears them."""


class FsdpEngine:
    """FSDP2: parameters are gathered block by block, gradients are reduced once, with the last micro-batch."""

    def __init__(self, model: Gpt, optimizer: ShardOptimizer, *, world: World, batch_tokens: int, scaler: LossScaler) -> None:
        assert isinstance(model, FSDPModule)
        self.model, self.optimizer = model, optimizer
        self.sharded: Gpt = model
        self._fsdp: FSDPModule = model
        self._world, self._batch_tokens, self._scaler = world, batch_tokens, scaler

    @property
    def shares(self) -> tuple[range, int]:
        return range(self._world.rank, self._world.rank + 1), self._world.size

    def settle(self) -> None:
        """There is one copy of the values: nothing to do."""

    def backward(self, parts: Sequence[MicroBatch], *, step: int) -> Sums:
        total, tokens = torch.zeros((), dtype=torch.float64, device=self._world.device), 0
        for i, part in enumerate(parts):
            nll, num_targets = nll_of(self.model, part, self._world.device)
            self._fsdp.set_requires_gradient_sync(i == len(parts) - 1)
            torch.autograd.backward(nll * self._scaler.scale / self._batch_tokens)
            total += nll.detach()
            tokens += num_targets
        self.optimizer.take_gradients()
        return Sums(float(total), tokens, self.optimizer.gradient_square())

    def update(self, *, lr: float, scale: float) -> None:
        self.optimizer.update(lr=lr, scale=scale)


def nll_of(model: nn.Module, part: MicroBatch, device: torch.device) -> tuple[Tensor, int]:
    """(summed over the targets of a micro-batch, in nats; number of targets); both 0 where it does not count."""
    rows = torch.from_numpy(part.rows).to(device)
    inputs_BT, targets_BT = rows[:, :-1].clamp(min=0), rows[:, 1:]  # padding is IGNORED as a target, and any id as an input
    return nll_sum(model(inputs_BT), targets_BT) * float(part.counts), int((part.rows[:, 1:] != IGNORED).sum()) * part.counts
