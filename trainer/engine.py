"""What computes a step: forward and backward over this rank's share of the batch, and the update that follows.

The loop knows an engine by this interface alone; which one a run has is decided in run.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from .evaluate import nll_sum
from .loader import MicroBatch
from .models import Gpt
from .optim import ShardOptimizer


class Sums(NamedTuple):
    """What a rank brings to the exchange of a step."""

    nll: float  # summed over its share, nats
    tokens: int
    gradient_square: float  # of its part of the reduced gradient; over all ranks it is the square of the global norm


class Engine(Protocol):
    @property
    def model(self) -> nn.Module:
        """As it is evaluated."""

    @property
    def optimizer(self) -> ShardOptimizer: ...
    def backward(self, parts: Sequence[MicroBatch]) -> Sums:
        """Collective. Afterwards the optimizer's shards hold the gradient of the mean over the global batch."""

    def update(self, *, lr: float, scale: float) -> None:
        """One update with gradients times `scale`; clears them."""


class FsdpEngine:
    """FSDP2: parameters are gathered block by block, gradients are reduced once, with the last micro-batch."""

    def __init__(self, model: Gpt, optimizer: ShardOptimizer, *, batch_tokens: int, device: torch.device) -> None:
        assert isinstance(model, FSDPModule)
        self.model, self.optimizer = model, optimizer
        self._sharded: FSDPModule = model
        self._batch_tokens, self._device = batch_tokens, device

    def backward(self, parts: Sequence[MicroBatch]) -> Sums:
        total, tokens = torch.zeros((), dtype=torch.float64, device=self._device), 0
        for i, part in enumerate(parts):
            rows = torch.from_numpy(part.rows).to(self._device)
            inputs_BT, targets_BT = rows[:, :-1], rows[:, 1:]
            nll = nll_sum(self.model(inputs_BT), targets_BT) * float(part.counts)
            self._sharded.set_requires_gradient_sync(i == len(parts) - 1)
            torch.autograd.backward(nll / self._batch_tokens)
            total += nll.detach()
            tokens += targets_BT.numel() * part.counts
        self.optimizer.take_gradients()
        return Sums(float(total), tokens, self.optimizer.gradient_square())

    def update(self, *, lr: float, scale: float) -> None:
        self.optimizer.update(lr=lr, scale=scale)
