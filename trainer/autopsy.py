"""What was wrong with a step that is no part of the training: which samples, which module. Collective, once, before the attempt ends.

The step's micro-batches pass through the model again, with the parameters that they met: in evaluation mode, so that no random number is
drawn, and each sample judged by its own row of the batch. Nothing is updated. It costs about one forward pass, and a backward pass when
it is about gradients, so it is bounded by the step itself; every rank makes equally many passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Final, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from keepstep.storage.skips import ranges, union

from .config import SpikeSection
from .contract import Phase
from .data import Feed
from .loader import MicroBatch
from .run import Run
from .samples import IGNORED
from .spikes import Finding, Spike
from .tracer import Traced, traced

_MAX_ALONE: Final = 256  # samples of a rank that pass one by one
_MAX_AGAIN: Final = 1000  # later positions of the samples to blame; every rank is told of them, and every checkpoint
_PASS_S: Final = 120.0  # one pass may take so long without a word; a step of a large model takes seconds


class Sample(NamedTuple):
    """One sample of the bad step, judged alone."""

    position: int
    rank: int
    loss: float  # mean, nats per token
    gradient: float  # norm where the backward pass ends; NaN where one that is this sample's own was not finite; 0: not asked for


class Witness(NamedTuple):
    """What a rank saw."""

    samples: list[Sample]
    module: str
    order: int
    bad_parameters: list[str]  # that were not finite before the step
    bad_gradients: list[str]  # parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Autopsy:
    """The same on every rank."""

    samples: tuple[Sample, ...]  # those to blame, worst first; empty: none alone
    module: str  # where a value was first not finite, "" if none was seen
    positions: tuple[int, ...]  # of the whole step
    later: tuple[int, ...] = ()  # where the samples to blame come again before the run's end, in later epochs
    bad_parameter: str  # was not finite before the step, so it is nobody's fault in it; "": all were

    def here(self, how: str) -> tuple[str, ...]:
        """What of the step to leave out ("FIRST:LAST"): nothing where that cannot help."""
        if self.bad_parameter:
            return ()
        blamed = [sample.position for sample in self.samples] if how == "samples" else []
        return union(f"{position}:{position + 1}" for position in blamed or self.positions)

    def skips(self, how: str) -> tuple[str, ...]:
        """The same, and where the blamed samples come again."""
        again = self.later if how == "samples" else ()
        return union((*self.here(how), *(f"{position}:{position + 1}" for position in again)))


def examine(run: Run, step: int, parts: Sequence[MicroBatch], finding: Finding) -> Autopsy:
    """Collective. Why `step`, which `run` has just computed and not carried out, is what `finding` says."""
    shards = run.engine.optimizer.shards
    bad_gradients = [name for name, shard in shards.items() if shard.grad is not None and not _is_finite(shard.grad)]
    bad_parameters = [name for name, shard in shards.items() if not _is_finite(shard)]
    for shard in shards.values():
        shard.grad = None  # makes room for those of the passes
    with_gradients = finding.what == "gradient"
    samples, found = _passes(run, parts, with_gradients=with_gradients)
    if with_gradients and not run.world.gather([any(math.isnan(sample.gradient) for sample in samples)]).any():
        samples = _alone(run, parts) or samples
    mine = Witness(samples, found.module, found.order, bad_parameters, bad_gradients)
    witnesses: list[Witness] = [mine] * run.world.size
    dist.all_gather_object(witnesses, mine)
    autopsy = conclude(witnesses, finding, run.config.train.spike, list(shards))
    blamed = [sample.position for sample in autopsy.samples]
    return replace(autopsy, later=come_again(run.feed, blamed, run.config.run.steps)) if blamed else autopsy


def come_again(feed: Feed, positions: Sequence[int], steps: int) -> tuple[int, ...]:
    """Where else the samples at `positions` stand up to the last step, the next `_MAX_AGAIN`: what spoils one epoch spoils the next.

    What is left out moves the run's end, so it looks again until nothing new comes into sight.
    """
    samples = sorted(set(feed.order.samples(np.array(positions, dtype=np.uint64)).tolist()))
    found, known = set(positions), set[int]()
    while found - known:
        known |= found
        left_out = ranges(f"{first}:{last}" for first, last in (*feed.skips, *((position, position + 1) for position in known)))
        end = replace(feed, skips=left_out).end(steps)
        found = {p for sample in samples for p in feed.order.positions_of(sample, min(positions), end)[:_MAX_AGAIN].tolist()}
    return tuple(sorted(known.difference(positions))[:_MAX_AGAIN])


def conclude(witnesses: Sequence[Witness], finding: Finding, limits: SpikeSection, names: Sequence[str]) -> Autopsy:
    """From what all ranks saw. `names` are those of the parameters, in forward order."""
    samples = [sample for witness in witnesses for sample in witness.samples]
    seen = min((witness for witness in witnesses if witness.module), key=lambda witness: witness.order, default=None)
    bad_parameters = {name for witness in witnesses for name in witness.bad_parameters}
    bad_gradients = {name for witness in witnesses for name in witness.bad_gradients}
    backward_order = [name.rpartition(".")[0] for name in reversed(names) if name in bad_gradients]
    return Autopsy(
        samples=tuple(sorted(to_blame(samples, finding, limits), key=_badness)),
        module=seen.module if seen else next(iter(backward_order), ""),
        positions=tuple(sorted(sample.position for sample in samples)),
        bad_parameter=next((name for name in names if name in bad_parameters), ""),
    )


def to_blame(samples: Iterable[Sample], finding: Finding, limits: SpikeSection) -> list[Sample]:
    """Those that show alone what the step showed; of several, none if that takes all."""
    samples = list(samples)
    if finding.what == "loss":
        bound = finding.bound if isinstance(finding, Spike) else math.inf
        bad = [sample for sample in samples if not sample.loss < bound]
    else:
        norms = [sample.gradient for sample in samples if math.isfinite(sample.gradient)]
        bound = limits.gradient_factor * median(norms) if isinstance(finding, Spike) and norms else math.inf
        if not bound:
            return []  # too small to be compared
        bad = [sample for sample in samples if not sample.gradient < bound]
    return bad if len(bad) < len(samples) or len(samples) == 1 else []


def _badness(sample: Sample) -> tuple[float, float, int]:
    """Sorts the worst first."""
    gradient, loss = (value if math.isfinite(value) else math.inf for value in (sample.gradient, sample.loss))
    return -gradient, -loss, sample.position


def _alone(run: Run, parts: Sequence[MicroBatch]) -> list[Sample]:
    """Collective. Each sample's own gradient of the parameters: what is not seen where samples lie side by side, before they are added up.

    Empty where there are too many.
    """
    single = [
        MicroBatch(part.rows.part(i, i + 1), (turn, turn + 1), part.share) for part in parts for i, turn in enumerate(range(*part.turns))
    ]
    if int(run.world.gather([len(single)]).max()) > _MAX_ALONE:
        return []
    return _passes(run, single or parts[:1], with_gradients=True)[0]


def _passes(run: Run, parts: Sequence[MicroBatch], *, with_gradients: bool) -> tuple[list[Sample], Traced]:
    """Collective. This rank's samples, and the first module of all its passes that made a value that is not finite."""
    count = int(run.world.gather([float(len(parts))]).max())
    model, samples, first = run.engine.model, list[Sample](), Traced()
    was_training = model.training
    model.eval()
    for i in range(count):  # equally many on every rank: a pass communicates
        run.me.report(Phase.STEP, run.step, within_s=_PASS_S)
        part = parts[min(i, len(parts) - 1)]
        losses_B, found = _one_pass(run, part, with_gradients=with_gradients)
        if i >= len(parts) or not part.counts:
            continue
        if not run.world.tensor_rank:  # the ranks of a tensor-parallel group have the same samples
            positions, ranks = run.feed.at(*part.turns).tolist(), [run.world.rank] * len(losses_B)
            samples += map(Sample, positions, ranks, losses_B.tolist(), _gradients(found, len(positions), run.scaler.scale))
        if found.module and not (first.module and first.order <= found.order):
            first = found
    model.train(was_training)
    model.zero_grad(set_to_none=True)
    run.me.report(Phase.STEP, run.step)
    return samples, first


def _one_pass(run: Run, part: MicroBatch, *, with_gradients: bool) -> tuple[Tensor, Traced]:
    """Collective. (mean loss of each sample, what was seen on the way)."""
    inputs_BT, targets_BT = (torch.from_numpy(rows).to(run.world.device) for rows in part.rows)
    with traced(run.engine.model) as found, torch.set_grad_enabled(with_gradients):
        nll_B = sample_nll(run.engine.model(inputs_BT), targets_BT)
        if with_gradients:
            torch.autograd.backward(nll_B.sum() / run.config.train.batch_tokens * run.scaler.scale)
    return nll_B.detach().double() / (targets_BT != IGNORED).sum(1).clamp(min=1), found


def sample_nll(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """(B,) sums of -ln p(target), float32."""
    nll = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED, reduction="none")
    return nll.view(targets_BT.shape).sum(1)


def _gradients(found: Traced, count: int, scale: float) -> list[float]:
    """Of the unscaled loss."""
    if found.magnitudes_B is None or found.bad_B is None:
        return [0.0] * count
    if count == 1 and found.is_bad_weight:
        return [math.nan]
    return torch.where(found.bad_B, math.nan, found.magnitudes_B / scale).tolist()


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())
