"""What is written down of every step: one JSON line in the run's steps file, made by rank 0. README.md says what each key means."""

from __future__ import annotations

import logging
import time
from typing import Any

from .agreement import Agreed
from .run import Run
from .surroundings import KIND, surroundings
from .traceback import known

log = logging.getLogger("keepstep.trainer")


def record_surroundings(run: Run) -> None:
    """Once per attempt, before its first step: what computes it."""
    if run.world.rank == 0:
        run.me.record_step({KIND: surroundings()})


def record_step(run: Run, agreed: Agreed, *, lr: float, started_at: float) -> None:
    """Collective in steps whose layers are looked at. Of the step that was just finished."""
    layers = run.trace.layers(run.step, agreed.gradient_scale)
    now = time.monotonic()
    seconds = now - started_at
    if run.world.rank != 0:
        return
    tokens_per_s = agreed.tokens / max(seconds, 1e-9)
    record: dict[str, Any] = {
        "step": run.step,
        "loss": agreed.loss,
        "loss_hex": run.loss_hex,
        "lr": lr,
        "grad_norm": known(agreed.grad_norm),  # null where it overflowed at this scale of the loss, and nothing was updated
        "param_norm": known(agreed.param_norm),
        "update_ratio_before": known(agreed.update_ratio_before),
        "tokens": agreed.tokens,
        "tokens_per_s": round(tokens_per_s, 3),
        "samples": list(run.feed.positions(run.step)),
        "ledger": [list(entry) for entry in agreed.ledger],
        "seconds": round(seconds, 6),
        "trained_s": round(now - run.began_at - run.me.stalled_s, 6),
    }
    if run.scaler.dynamic:
        record["loss_scale"] = run.scaler.scale
    run.me.record_step(record | ({"layers": layers} if layers else {}))
    log.info("step %d/%d  loss %.4f  %.0f tokens/s", run.step, run.config.run.steps, agreed.loss, tokens_per_s)
