"""What is written down of every step: one JSON line in the run's steps file, made by rank 0."""

from __future__ import annotations

import logging
from typing import Any

from .agreement import Agreed
from .run import Run

log = logging.getLogger("keepstep.trainer")


def record_step(run: Run, agreed: Agreed, *, lr: float, seconds: float) -> None:
    """Of the step that was just finished; other ranks do nothing."""
    if run.world.rank != 0:
        return
    tokens = run.feed.samples_per_step * run.config.model.context
    record: dict[str, Any] = {
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
