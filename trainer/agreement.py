"""The one exchange of a step: every rank tells a row of numbers, and all go on with the same ones."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .contract import Request
from .ledger import Entry, entry_of
from .loader import MicroBatch
from .run import Run
from .sums import Sums, total


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What all ranks know after the exchange of a step, bit by bit the same."""

    loss: float  # mean over the global batch, nats per token
    tokens: int  # of the global batch that count: padding does not
    gradient_scale: float  # from the gradient that the engine holds to that of `loss`; 1 if every token counts and nothing is scaled
    grad_norm: float  # of the gradient of `loss`, before clipping; NaN where it is not finite
    save: bool
    stop: bool
    writing: bool  # some rank's part of the last checkpoint is not durable yet
    losses: tuple[float, ...]  # sums, by rank
    gradient_squares: tuple[float, ...]  # by rank
    ledger: tuple[Entry, ...]  # which samples were consumed, by rank; a tensor-parallel group is one
    param_norm: float  # of the parameters that this step computed with; NaN where they are not finite
    update_ratio_before: float  # norm of the update before this step, over that of the parameters it changed; NaN where unknown


def gradient_scale_of(run: Run, tokens: float) -> float:
    """From the gradient that the engine holds to that of the mean loss over a batch's `tokens`."""
    return run.config.train.batch_tokens / tokens / run.scaler.scale


def agree(run: Run, step: int, sums: Sums, parts: Sequence[MicroBatch]) -> Agreed:
    """Collective. Sums are rounded once, so they are the same everywhere, in every repetition, and in whatever order."""
    due = run.world.rank == 0 and run.cadence.is_due(step, time.monotonic(), run.me.pacing())
    of_share = [sums.nll, sums.tokens, *sums.nll_rests, *entry_of(parts)]  # alike on the ranks of a tensor-parallel group
    traced = run.trace.parameter_square(), run.trace.ratio_square()
    own = [sums.gradient_square, *sums.gradient_square_rests, *traced, run.me.request(), due, run.checkpointer.busy]
    rows = run.world.gather([*of_share, *own])
    losses, counts, loss_rest, loss_rest2, *entries = run.world.of_data_ranks(rows)[:, : len(of_share)].T.tolist()
    squares, square_rest, square_rest2, parameter_squares, ratio_squares, requests, dues, busy = rows[:, len(of_share) :].T.tolist()
    square = total((*squares, *square_rest, *square_rest2))
    request = Request(int(max(requests)))
    asked = run.save_requests.is_new(request is Request.SAVE)
    gradient_scale = gradient_scale_of(run, sum(counts))
    return Agreed(
        loss=total((*losses, *loss_rest, *loss_rest2)) / sum(counts),
        tokens=int(sum(counts)),
        gradient_scale=gradient_scale,
        grad_norm=math.sqrt(square) * gradient_scale if math.isfinite(square) else math.nan,
        save=run.checkpointer.can_save and not any(busy) and (any(dues) or asked),
        stop=request is Request.STOP,
        writing=any(busy),
        losses=tuple(rows[:, 0].tolist()),
        gradient_squares=tuple(squares),
        ledger=tuple((int(first), int(last), int(crc)) for first, last, crc in zip(*entries, strict=True)),
        param_norm=math.sqrt(total(parameter_squares)),
        update_ratio_before=math.sqrt(total(ratio_squares)),
    )
