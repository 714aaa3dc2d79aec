"""Exact reduction: the same bits of losses, gradients and parameters at every world size.

A batch has a fixed number of parts, the *logical ranks*. A rank computes a range of them one after the other, each with its own samples
and its own random streams, derived from (seed, step, logical rank), and each gives a gradient of its own. Gradients are added along one
fixed tree (tree.py): a rank adds up what it has, ranks exchange those partial sums cut by shards, and each adds up the rest of the tree
for its own rows. The model is a plain replica on every rank; parameters and optimizer state live in shards, cut and named as FSDP2 cuts and
names them, and the replica takes the parameters after each update. The idea is EasyScale's (Li et al. 2022).

Whatever depends on how rows are spread is made of operations on single elements, each rounded once: kernels of sums, and those that take
a few elements at a time, round otherwise at the end of a tensor.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import rng
from .engine import nll_of
from .loader import MicroBatch
from .models import LanguageModel
from .optim import ShardOptimizer
from .parallel import World, whole
from .rows import RowLayout
from .scaler import LossScaler
from .sums import Sums, exact
from .tree import Node, add_up, nodes_within, owned

log = logging.getLogger("keepstep.trainer")


class ExactEngine:
    """An `Engine` whose results do not depend on the world size.

    Args:
        replica: the whole model, on this rank alone, in the precision of forward and backward pass; its values are overwritten.
        sharded: the same model under FSDP2, which holds the shards and is never called.
        optimizer: of `sharded`, not fused.
        logical_ranks: ranks beyond these have nothing to compute, and only hold their shards.
    """

    def __init__(
        self,
        replica: LanguageModel,
        sharded: LanguageModel,
        optimizer: ShardOptimizer,
        *,
        world: World,
        seed: int,
        logical_ranks: int,
        batch_tokens: int,
        scaler: LossScaler,
        label_smoothing: float = 0.0,
    ) -> None:
        self._label_smoothing = label_smoothing
        self.model, self.sharded, self.optimizer = replica, sharded, optimizer
        self._world, self._seed, self._leaves = world, seed, logical_ranks
        self._batch_tokens, self._scaler = batch_tokens, scaler
        self._whole: Mapping[str, nn.Parameter] = {name: each for name, each in replica.named_parameters() if each.requires_grad}
        self._layout = RowLayout({name: parameter.shape for name, parameter in self._whole.items()}, world.size)
        self._nodes = [nodes_within(owned(rank, world.size, logical_ranks), logical_ranks) for rank in range(world.size)]
        self._spare: list[Tensor] = []  # gradient vectors to use again: fresh memory is slow

    @property
    def shares(self) -> tuple[range, int]:
        return owned(self._world.rank, self._world.size, self._leaves), self._leaves

    def settle(self) -> None:
        """Collective. Also sees to it that one thread computes: sums over several threads depend on how many there are."""
        if self._world.device.type == "cpu" and torch.get_num_threads() != 1:
            log.info("cluster.exact_reduction: computing with 1 thread, not %d", torch.get_num_threads())
            torch.set_num_threads(1)
        if self._world.size > self._leaves and self._world.rank == 0:
            idle = self._world.size - self._leaves
            log.warning("%d of %d ranks have nothing to compute: cluster.logical_ranks = %d", idle, self._world.size, self._leaves)
        self._take_frozen()
        self._take_parameters()

    def backward(self, parts: Sequence[MicroBatch], *, step: int) -> Sums:
        """Collective."""
        by_share = {share: list(group) for share, group in itertools.groupby(parts, key=lambda part: part.share)}
        losses: list[float] = []
        tokens = 0

        def leaf(node: Node) -> Tensor | None:
            nonlocal tokens
            first, last = node
            if last - first > 1:
                return None
            gradient, loss, num_targets = self._leaf(by_share[first], step)
            losses.append(loss)
            tokens += num_targets
            return gradient

        mine = [add_up(node, leaf, self._add) for node in self._nodes[self._world.rank]]
        rng.seed_everything(self._seed, step)  # between steps the streams are the same on all ranks, and in any world
        elements = self._exchange(mine)
        self._spare += mine
        for name, gradient in self._layout.shards(elements, self.optimizer.shards).items():
            self.optimizer.shards[name].grad = gradient
        nll, nll_rests = exact(losses)
        square, square_rests = exact(_row_squares(self.optimizer.shards.values()))
        return Sums(nll, tokens, square, nll_rests, square_rests)

    def update(self, *, lr: float, scale: float) -> None:
        self.optimizer.update(lr=lr, scale=scale)
        self._take_parameters()

    def discard(self) -> None:
        self.optimizer.discard_gradients()

    def _leaf(self, parts: Sequence[MicroBatch], step: int) -> tuple[Tensor, float, int]:
        """(gradient as a vector, sum of the losses, number of targets) of one logical rank."""
        rng.seed_everything(self._seed, step, parts[0].share)
        gradient = self._spare.pop() if self._spare else torch.zeros(self._layout.numel, device=self._world.device)
        nll_sum, num_targets = torch.zeros((), dtype=torch.float64, device=self._world.device), 0
        counting = [part for part in parts if part.counts]
        if not counting:
            gradient.zero_()
        for i, part in enumerate(counting):
            nll, count = nll_of(self.model, part, self._world.device, label_smoothing=self._label_smoothing)
            torch.autograd.backward(nll * self._scaler.scale / self._batch_tokens)
            self._layout.pack(gradient, {name: _taken(parameter) for name, parameter in self._whole.items()}, add=i > 0)
            nll_sum += nll.detach()
            num_targets += count
        return gradient, float(nll_sum), num_targets

    def _add(self, left: Tensor, right: Tensor) -> Tensor:
        self._spare.append(right)
        return _add_in_place(left, right)

    def _exchange(self, mine: Sequence[Tensor]) -> Tensor:
        """Collective. This rank's elements of the sum over all logical ranks; `mine` are the sums at its nodes."""
        size, elements = self._world.size, self._layout.shard_numel
        counts = [len(nodes) for nodes in self._nodes]
        received = torch.empty(sum(counts), elements, device=self._world.device)
        dist.all_to_all_single(
            received.view(-1),
            self._to_send(mine),
            output_split_sizes=[count * elements for count in counts],
            input_split_sizes=[len(mine) * elements] * size,
        )
        sums: dict[Node, Tensor] = dict(zip(itertools.chain.from_iterable(self._nodes), received, strict=True))
        return add_up((0, self._leaves), sums.get, _add_in_place)

    def _to_send(self, mine: Sequence[Tensor]) -> Tensor:
        """For each rank in turn: its elements of each sum. One sum is already laid out so."""
        if len(mine) == 1:
            return mine[0]
        vectors = [vector.view(self._world.size, self._layout.shard_numel) for vector in mine]
        return torch.stack(vectors, dim=1).view(-1) if vectors else torch.empty(0, device=self._world.device)

    def _take_frozen(self) -> None:
        """Collective. What is not trained, and so stays what it is now."""
        shards = dict(self.sharded.named_parameters())
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if not parameter.requires_grad:
                    parameter.copy_(whole(shards[name]))

    def _take_parameters(self) -> None:
        """Collective. The replica's trained parameters become those of the shards of all ranks, in its own precision."""
        with torch.no_grad():
            dtype = next(iter(self._whole.values())).dtype
            mine = torch.zeros(self._layout.shard_numel, dtype=dtype, device=self._world.device)
            shards = self.optimizer.shards
            torch._foreach_copy_(list(self._layout.shards(mine, shards).values()), list(shards.values()))
            vector = mine.new_empty(self._layout.numel)
            dist.all_gather_single(vector, mine)
            self._layout.unpack(vector, self._whole)


def _add_in_place(left: Tensor, right: Tensor) -> Tensor:
    left += right
    return left


def _taken(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None, "every parameter of the model takes part in every forward pass"
    parameter.grad = None
    return gradient


def _row_squares(shards: Iterable[nn.Parameter]) -> list[float]:
    """The sum of squares of each row of the gradients, float64. A row is never cut, so this does not depend on the world size."""
    rows = [row_sums(shard.grad.double().square()) for shard in shards if shard.grad is not None and shard.numel()]
    return [square for squares in rows for square in squares.tolist()]


def row_sums(values: Tensor) -> Tensor:
    """Of each row of dimension 0, added by halves: the same bits whatever the other rows are, and however many."""
    columns = values.reshape(values.shape[0], -1)
    while columns.shape[1] > 1:
        half = columns.shape[1] // 2
        folded = columns[:, :half] + columns[:, half : 2 * half]
        columns = torch.cat((folded, columns[:, 2 * half :]), dim=1)
    return columns[:, 0]
