"""Several ranks' work on one process: their shares one after the other, each with its rank's random streams, summed in rank order.

The sums over ranks are those of the run; what differs is the order in which the gradients of more than two ranks are added, and, where a
rank has several micro-batches, nothing else: each share's gradient is complete before it is added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from . import rng
from .engine import Engine
from .loader import MicroBatch
from .models import LanguageModel
from .optim import ShardOptimizer
from .sums import Sums, exact


class SerialEngine:
    """An engine that takes every share of a batch in turn.

    Args:
        engine: of a world of one process; computes one share.
        streams: captured random streams, by rank of the run.
    """

    def __init__(self, engine: Engine, streams: Sequence[Mapping[str, Any]]) -> None:
        self._engine = engine
        self.streams = list(streams)

    @property
    def model(self) -> nn.Module:
        return self._engine.model

    @property
    def sharded(self) -> LanguageModel:
        return self._engine.sharded

    @property
    def optimizer(self) -> ShardOptimizer:
        return self._engine.optimizer

    @property
    def shares(self) -> tuple[range, int]:
        return range(len(self.streams)), len(self.streams)

    def settle(self) -> None:
        """The engine behind this one has settled."""

    def backward(self, parts: Sequence[MicroBatch], *, step: int) -> Sums:
        """Afterwards the optimizer's shards, which are whole here, hold the sum of the shares' gradients."""
        shards = self.optimizer.shards
        added: dict[str, Tensor] = {}
        done = []
        for rank, share in groupby(parts, key=lambda part: part.share):
            rng.restore(self.streams[rank])
            done.append(self._engine.backward(list(share), step=step))
            self.streams[rank] = rng.capture()
            for name, shard in shards.items():
                if shard.grad is not None:
                    added[name] = added[name].add_(shard.grad) if name in added else shard.grad.clone()
        for name, shard in shards.items():
            shard.grad = added.get(name)
        nll, nll_rests = exact(sums.nll for sums in done)
        square, square_rests = exact(_squares(added, len(self.streams)))
        return Sums(nll, sum(sums.tokens for sums in done), square, nll_rests, square_rests)

    def update(self, *, lr: float, scale: float) -> None:
        self._engine.update(lr=lr, scale=scale)

    def discard(self) -> None:
        self._engine.discard()


def _squares(gradients: Mapping[str, Tensor], num_ranks: int) -> list[float]:
    """Each rank's sum of squares, over the rows that FSDP2 gives it: a float32 norm depends on how it is cut."""
    cut = [gradient.chunk(num_ranks) for gradient in gradients.values()]  # fewer chunks where there are fewer rows
    shards = ([chunks[rank] for chunks in cut if rank < len(chunks)] for rank in range(num_ranks))
    return [float(torch.stack(torch._foreach_norm(own)).double().square().sum()) if own else 0.0 for own in shards]


def streams_after_resume(saved: Sequence[Mapping[str, Any]], num_ranks: int, *, seed: int, step: int) -> list[Mapping[str, Any]]:
    """What each of `num_ranks` ranks draws from when it goes on from a checkpoint with these streams: they, or, for another number of
    ranks and at the beginning, those that follow from (seed, step, rank)."""
    if len(saved) == num_ranks:
        return list(saved)
    derived = list[Mapping[str, Any]]()
    for rank in range(num_ranks):
        rng.seed_everything(seed, step, rank)
        derived.append(rng.capture())
    return derived
