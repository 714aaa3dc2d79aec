"""What computes a step: forward and backward over this rank's share of the batch, and the update that follows.

The loop knows an engine by this interface alone; which one a run has is decided in engines.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .carried import Carried
from .loader import MicroBatch
from .models import LanguageModel, Memory
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
    def sharded(self) -> LanguageModel:
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

    def discard(self) -> None:
        """The step is over without an update; clears the gradients."""


class FsdpEngine:
    """FSDP2: parameters are gathered block by block, gradients are reduced once, with the last micro-batch. Or one rank that has all.

    Attributes:
        carried: what the model carries from step to step, if it does.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: ShardOptimizer,
        *,
        world: World,
        batch_tokens: int,
        scaler: LossScaler,
        label_smoothing: float = 0.0,
    ) -> None:
        self.carried: Carried | None = None
        self._label_smoothing = label_smoothing
        self.model, self.optimizer = model, optimizer
        self.sharded: LanguageModel = model
        self._fsdp = model if isinstance(model, FSDPModule) else None
        self._world, self._batch_tokens, self._scaler = world, batch_tokens, scaler

    @property
    def shares(self) -> tuple[range, int]:
        return range(self._world.data_rank, self._world.data_rank + 1), self._world.data_size

    def settle(self) -> None:
        """There is one copy of the values: nothing to do."""

    def backward(self, parts: Sequence[MicroBatch], *, step: int) -> Sums:
        total, tokens = torch.zeros((), dtype=torch.float64, device=self._world.device), 0
        for i, part in enumerate(parts):
            memory = self.carried.before(part) if self.carried else None
            nll, num_targets = nll_of(self.model, part, self._world.device, label_smoothing=self._label_smoothing, memory=memory)
            if self.carried and memory:
                self.carried.after(part, memory)
            if self._fsdp:
                self._fsdp.set_requires_gradient_sync(i == len(parts) - 1)
            torch.autograd.backward(nll * self._scaler.scale / self._batch_tokens)
            total += nll.detach()
            tokens += num_targets
        self.optimizer.take_gradients()
        return Sums(float(total), tokens, self.optimizer.gradient_square())

    def update(self, *, lr: float, scale: float) -> None:
        self.optimizer.update(lr=lr, scale=scale)
        if self.carried:
            self.carried.take()

    def discard(self) -> None:
        self.optimizer.discard_gradients()
        if self.carried:
            self.carried.take()


def nll_of(
    model: nn.Module, part: MicroBatch, device: torch.device, *, label_smoothing: float = 0.0, memory: Memory | None = None
) -> tuple[Tensor, int]:
    """(summed over the targets of a micro-batch, in nats; number of targets); both 0 where it does not count.

    Args:
        memory: what the rows go on from; afterwards it is what they ended with.
    """
    inputs_BT, targets_BT = (torch.from_numpy(rows).to(device) for rows in part.rows)
    logits_BTV = model(inputs_BT) if memory is None else model(inputs_BT, memory)
    nll = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing
    )
    return nll * float(part.counts), part.rows.num_targets * part.counts
