"""The one exchange of a step: every rank tells a row of numbers, and all go on with the same ones."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from .contract import Request
from .engine import Sums
from .run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What all ranks know after the exchange of a step, bit by bit the same."""

    loss: float  # mean over the global batch, nats per token
    grad_norm: float  # before clipping; NaN where it is not finite
    save: bool
    stop: bool
    losses: tuple[float, ...]  # sums, by rank
    gradient_squares: tuple[float, ...]  # by rank


def agree(run: Run, step: int, sums: Sums) -> Agreed:
    """Collective. Sums run in rank order, so they are the same everywhere and in every repetition."""
    due = run.world.rank == 0 and run.cadence.is_due(step, time.monotonic())
    rows = run.world.gather([*sums, run.me.request(), due, run.checkpointer.busy])
    losses, counts, squares, requests, dues, busy = rows.T.tolist()
    request = Request(int(max(requests)))
    asked = run.save_requests.is_new(request is Request.SAVE)
    return Agreed(
        loss=sum(losses) / sum(counts),
        grad_norm=math.sqrt(sum(squares)) if all(map(math.isfinite, squares)) else math.nan,
        save=run.checkpointer.can_save and not any(busy) and (any(dues) or asked),
        stop=request is Request.STOP,
        losses=tuple(losses),
        gradient_squares=tuple(squares),
    )
