"""The training loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Final

from keepstep.storage.faults import fault_point

from . import guard, translation
from .agreement import Agreed, agree
from .blocks import COMPILE_S
from .contract import Phase
from .finish import evaluate_run, finish
from .loader import MicroBatch, batches
from .optim import clip_scale
from .recorder import record_step, record_surroundings
from .run import Run
from .schedule import learning_rate

log = logging.getLogger("keepstep.trainer")

_STREAM_S: Final = 600.0  # a batch of streamed tokens: a few calls of the store, each with its deadline (storage.timeout_s)
_BEST_WAIT_S: Final = 600  # for the save before it, and how long the persister tries


def train(run: Run) -> None:
    """Collective. From the step that `run` stands at to the last one, or to the step at which all ranks agree to stop."""
    config, steps = run.config, run.config.run.steps
    run.me.report(Phase.STEP, run.step, within_s=COMPILE_S if config.train.compile else 0.0)  # the first step compiles
    run.began_at = time.monotonic()
    record_surroundings(run)
    if config.evaluate.generate:
        translation.require(config)  # now, not when it is too late
    fault_point("rank.begin", rank=run.world.rank, step=run.step)
    slow = lambda: run.me.report(Phase.STEP, run.step, within_s=_STREAM_S)  # noqa: E731
    with batches(run.share, range(run.step + 1, steps + 1), config.train.loader_workers, slow) as shares:
        while not run.is_over:
            agreed = advance(run, next(shares))
            fault_point("rank.step", rank=run.world.rank, step=run.step)
            run.checkpointer.get_ready(run.tensors)  # once, after the first step: a restart is over before it plans its saves

            if run.step == steps or (agreed.stop and not config.evaluate.patience):
                break
            is_best = evaluate_if_due(run)  # before the save: whoever goes on from that does not come by here again
            if run.is_over or agreed.stop:
                break
            if is_best:
                save_best(run)
            elif agreed.save:
                save(run)
    finish(run)


def advance(run: Run, parts: Sequence[MicroBatch]) -> Agreed:
    """Collective. One step: `run` stands at the next one afterwards. Raises BadStep, and nothing has changed."""
    started_at = time.monotonic()
    config, step = run.config, run.step + 1

    with run.trace.activations(step, run.engine.model, parts):
        sums = run.engine.backward(parts, step=step)
    agreed = agree(run, step, sums, parts)
    overflowed = run.scaler.overflows(agreed.loss, agreed.grad_norm)
    if not overflowed:
        guard.check(run, step, agreed, parts)

    run.checkpointer.end_save()  # what the last save still copies from a GPU must not change yet
    lr = learning_rate(config.optimizer, step, config.run.steps)
    with run.trace.update(step, agreed.param_norm):
        if overflowed:
            run.engine.discard()
        else:
            run.engine.update(lr=lr, scale=agreed.gradient_scale * clip_scale(agreed.grad_norm, config.optimizer.clip_norm))
            run.window.add(agreed.loss, agreed.grad_norm)
    run.step, run.loss_hex = step, agreed.loss.hex()
    run.me.report(Phase.STEP, step)
    record_step(run, agreed, lr=lr, started_at=started_at)
    now = time.monotonic()
    run.me.cost(run.costs.stepped(now - started_at, now, writing=agreed.writing))
    run.scaler.stepped(overflowed=overflowed)
    return agreed


def evaluate_if_due(run: Run) -> bool:
    """Collective. Whether the current step was evaluated, is the best one so far, and its checkpoint is to stay."""
    if not run.best.is_due(run.step, run.config.evaluate.interval):
        return False
    is_best = evaluate_run(run)
    run.me.report(Phase.STEP, run.step)
    return is_best and run.config.evaluate.patience > 0


def save_best(run: Run) -> None:
    """Collective. A checkpoint of this very step, which has no successor: it waits for the one before it, and its persister tries again."""
    if not run.checkpointer.can_save:
        return
    for _ in range(_BEST_WAIT_S):  # ranks wait together, and all of them show that they live
        run.me.report(Phase.SAVE, run.step)
        if not run.world.gather([float(run.checkpointer.busy)]).any():
            break
        run.checkpointer.wait(1.0)
    save(run, patience_s=_BEST_WAIT_S)


def save(run: Run, *, patience_s: float = 0.0) -> None:
    """Stages this rank's part of a checkpoint of the current step; training goes on while it is written."""
    run.me.report(Phase.SAVE, run.step)
    is_staged = run.checkpointer.begin_save(run.step, run.tensors, run.rank_state().to_json(), patience_s=patience_s)
    now = time.monotonic()
    run.cadence = run.cadence.saved(run.step, now)
    if is_staged:
        run.costs.saved(now, run.checkpointer.stall_s)
    else:
        log.warning("step %d: nothing was staged: %s", run.step, run.checkpointer.last_error)
    run.save_requests.served()
    run.me.report(Phase.STEP, run.step)
