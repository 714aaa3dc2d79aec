"""The end of a run: evaluation, digests of the whole state, and the final checkpoint that carries them."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from . import rng, state
from .contract import Phase
from .evaluate import Evaluation, evaluate
from .run import Run
from .state import RankState

log = logging.getLogger("keepstep.trainer")


def evaluate_run(run: Run) -> Evaluation:
    """Collective. Perplexity of the current model on the held-out text."""
    result = evaluate(
        run.engine.model,
        run.tokens.held_out,
        context=run.config.model.context,
        max_tokens=run.config.evaluate.max_tokens,
        company=run.world,
        alive=lambda: run.me.report(Phase.EVALUATE, run.step),
    )
    if run.world.rank == 0:
        run.me.record_step({"evaluation": {"step": run.step, **_figures(result)}})
        log.info("step %d: held-out loss %.4f nats per token, perplexity %.2f", run.step, result.nats_per_token, result.perplexity)
    return result


def finish(run: Run) -> None:
    """Collective. Leaves with the final checkpoint durable and the progress page at DONE, or STOPPED before the last step."""
    is_done = run.step >= run.config.run.steps
    if not run.is_finished:  # else the result was committed with the checkpoint that this attempt began with
        final = _complete(run) if is_done else _halfway(run)
        if run.checkpointer.can_save:
            save_final(run, final)
    run.me.report(Phase.DONE if is_done else Phase.STOPPED, run.step)


def _complete(run: Run) -> RankState:
    """Collective. The state after the last step; rank 0's carries the result."""
    evaluation = evaluate_run(run)
    run.me.report(Phase.FINISH, run.step)
    final = run.rank_state()
    result = make_result(run, final, evaluation)
    if run.world.rank != 0:
        return final
    log.info("step %d: result %s", run.step, result)
    return replace(final, result=result)


def _halfway(run: Run) -> RankState:
    """A node that was told to leave has time for its checkpoint and for nothing else: no evaluation, no digests of the whole state."""
    run.me.report(Phase.FINISH, run.step)
    return run.rank_state()


def make_result(run: Run, final: RankState, evaluation: Evaluation) -> dict[str, Any]:
    """Collective. The trainer's part of result.json."""
    digests = state.digest(run.tensors, alive=lambda: run.me.report(Phase.FINISH, run.step))
    streams: list[str] = [""] * run.world.size
    dist.all_gather_object(streams, rng.digest(rng.streams_in(final.parts)))
    if len(set(streams)) == 1:  # exact reduction: those of all ranks, however many there are
        del streams[1:]
    return {
        "step": run.step,
        "model_sha256": digests["model"],
        "optimizer_sha256": digests["optimizer"],
        "state_sha256": state.state_digest(digests, streams, **final.parts["position"]),
        "final_loss_hex": run.loss_hex,
        "unigram_nats": run.tokens.index.held_out.unigram_nats,
        **_figures(evaluation),
    }


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    """None for what is not finite: JSON has no such numbers."""
    nats, perplexity = (value if math.isfinite(value) else None for value in (evaluation.nats_per_token, evaluation.perplexity))
    return {"held_out_nats": nats, "held_out_tokens": evaluation.tokens, "perplexity": perplexity}


def save_final(run: Run, final: RankState) -> None:
    """Collective. Waits until this rank's part is durable."""
    run.checkpointer.save_and_wait(run.step, run.tensors, final.to_json(), alive=lambda: run.me.report(Phase.FINISH, run.step))
