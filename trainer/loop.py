"""The training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from keepstep.storage.faults import fault_point

from .contract import Phase, Request
from .evaluate import nll_sum
from .finish import evaluate_run, finish
from .loader import MicroBatch, batches
from .optim import clip_scale, learning_rate
from .run import Run

log = logging.getLogger("keepstep.trainer")


def train(run: Run) -> None:
    """Collective. From the step that `run` stands at to the last one, or to the step at which all ranks agree to stop."""
    config, steps = run.config, run.config.run.steps
    run.me.report(Phase.STEP, run.step)
    with batches(run.share, range(run.step + 1, steps + 1), config.train.loader_workers) as shares:
        while run.step < steps:
            started_at = time.monotonic()
            step = run.step + 1

            nll, tokens = backward(run, next(shares))  # this rank's summed loss; its shards hold the gradient of the global mean
            agreed = agree(run, step, nll, tokens)  # the one exchange of a step: every rank goes on with the same numbers
            agreed.check_finite(step)

            lr = learning_rate(config.optimizer, step, steps)
            run.optimizer.update(lr=lr, scale=clip_scale(agreed.grad_norm, config.optimizer.clip_norm))
            run.step, run.loss_hex = step, agreed.loss.hex()
            run.me.report(Phase.STEP, step)
            record_step(run, agreed, lr, time.monotonic() - started_at)
            fault_point("rank.step", rank=run.world.rank, step=step)
            run.checkpointer.get_ready(run.tensors)  # once, after the first step: a restart is over before it plans its saves

            if agreed.stop or step == steps:
                break
            if agreed.save:
                save(run)
            if config.evaluate.interval and step % config.evaluate.interval == 0:
                evaluate_run(run)
                run.me.report(Phase.STEP, step)
    finish(run)


def backward(run: Run, parts: Sequence[MicroBatch]) -> tuple[float, int]:
    """Forward and backward over this rank's share of the batch, in micro-batches. Gradients are reduced once, with the last one.

    Returns (summed loss in nats, tokens).
    """
    batch_tokens, device = run.feed.samples_per_step * run.config.model.context, run.world.device
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for i, part in enumerate(parts):
        rows = torch.from_numpy(part.rows).to(device)
        inputs_BT, targets_BT = rows[:, :-1], rows[:, 1:]
        nll = nll_sum(run.model(inputs_BT), targets_BT) * float(part.counts)
        run.sharded.set_requires_gradient_sync(i == len(parts) - 1)
        torch.autograd.backward(nll / batch_tokens)
        total += nll.detach()
        tokens += targets_BT.numel() * part.counts
    run.optimizer.take_gradients()
    return float(total), tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What all ranks know after the exchange of a step, bit by bit the same."""

    loss: float  # mean over the global batch, nats per token
    grad_norm: float
    save: bool
    stop: bool
    losses: tuple[float, ...]  # sums, by rank
    grad_squares: tuple[float, ...]  # by rank

    def check_finite(self, step: int) -> None:
        """Raises NonFinite before anything is updated: the state is still that of the step before."""
        for what, values in (("loss", self.losses), ("gradient", self.grad_squares)):
            if wrong := [rank for rank, value in enumerate(values) if not math.isfinite(value)]:
                raise NonFinite(step, what, wrong, values[wrong[0]])


class NonFinite(ArithmeticError):
    """A loss or gradient became infinite or not a number."""

    def __init__(self, step: int, what: str, ranks: Sequence[int], value: float) -> None:
        self.step, self.ranks = step, tuple(ranks)
        super().__init__(f"step {step}: the {what} of rank {', '.join(map(str, ranks))} is {value}")


def agree(run: Run, step: int, nll: float, tokens: int) -> Agreed:
    """Collective. Sums run in rank order, so they are the same everywhere and in every repetition."""
    due = run.world.rank == 0 and run.cadence.is_due(step, time.monotonic())
    rows = run.world.gather([nll, tokens, run.optimizer.gradient_square(), run.me.request(), due, run.checkpointer.busy])
    losses, counts, squares, requests, dues, busy = rows.T.tolist()
    request = Request(int(max(requests)))
    asked = run.save_requests.is_new(request is Request.SAVE)
    save = run.checkpointer.can_save and not any(busy) and (any(dues) or asked)
    return Agreed(
        loss=sum(losses) / sum(counts),
        grad_norm=math.sqrt(sum(squares)) if all(map(math.isfinite, squares)) else math.nan,
        save=save,
        stop=request is Request.STOP,
        losses=tuple(losses),
        grad_squares=tuple(squares),
    )


def save(run: Run) -> None:
    """Stages this rank's part of a checkpoint of the current step; training goes on while it is written."""
    run.me.report(Phase.SAVE, run.step)
    if not run.checkpointer.save(run.step, run.tensors, run.rank_state().to_json()):
        log.warning("step %d: nothing was staged: %s", run.step, run.checkpointer.last_error)
    run.cadence = run.cadence.saved(run.step, time.monotonic(), run.checkpointer.stall_s)
    run.save_requests.served()
    run.me.report(Phase.STEP, run.step)


def record_step(run: Run, agreed: Agreed, lr: float, seconds: float) -> None:
    if run.world.rank != 0:
        return
    tokens = run.feed.samples_per_step * run.config.model.context
    record = {
        "step": run.step,
        "loss": agreed.loss,
        "loss_hex": run.loss_hex,
        "lr": lr,
        "grad_norm": agreed.grad_norm,
        "tokens": tokens,
        "samples": list(run.feed.positions(run.step)),
        "seconds": round(seconds, 6),
    }
    run.me.record_step(record)
    log.info("step %d/%d  loss %.4f  %.0f tokens/s", run.step, run.config.run.steps, agreed.loss, tokens / max(seconds, 1e-9))
