"""The end of a run: evaluation, digests of the whole state, and the final checkpoint that carries them."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch.distributed as dist

from . import rng, state, translation
from .contract import Phase
from .evaluate import evaluate
from .figures import Evaluation
from .run import Run
from .state import RankState

if TYPE_CHECKING:
    from .models import LanguageModel

log = logging.getLogger("keepstep.trainer")


def evaluate_run(run: Run) -> bool:
    """Collective. The current model on the held-out text; whether it is the best one so far."""
    config = run.config.evaluate
    result = evaluate(
        run.engine.model,
        run.held_out,
        vocabulary=run.tokens.index.vocabulary,
        top_k=config.top_k,
        company=run.world.data,
        alive=lambda: run.me.report(Phase.EVALUATE, run.step),
    )
    if run.step > run.best.seen:
        run.best = run.best.after(run.step, result.nats_per_token, config.min_delta)
    run.evaluation = result
    if run.world.rank == 0:
        run.me.record_step({"evaluation": {"step": run.step, **result.figures()}})
        log.info("step %d: held-out loss %.4f nats per token, perplexity %.2f", run.step, result.nats_per_token, result.perplexity)
    return run.best.step == run.step


def finish(run: Run) -> None:
    """Collective. Leaves with the final checkpoint durable and the progress page at DONE, or STOPPED before the last step.

    Where evaluations got no better the training is over before its last step, and DONE says so.
    """
    is_done = run.is_over
    if not run.is_finished:  # else the result was committed with the checkpoint that this attempt began with
        final = _complete(run) if is_done else _halfway(run)
        if run.checkpointer.can_save:
            save_final(run, final)
    run.me.report(Phase.DONE if is_done else Phase.STOPPED, run.step)


def _complete(run: Run) -> RankState:
    """Collective. The state after the last step; rank 0's carries the result."""
    if run.evaluation is None or run.best.seen < run.step:
        evaluate_run(run)
    assert run.evaluation
    texts = _completed(run)
    run.me.report(Phase.FINISH, run.step)
    final = run.rank_state()
    result = make_result(run, final, run.evaluation) | texts
    if run.world.rank != 0:
        return final
    log.info("step %d: result %s", run.step, result)
    return replace(final, result=result)


def _completed(run: Run) -> dict[str, Any]:
    """Collective. What completing held-out prompts came to, for rank 0; nothing where nobody asks for it."""
    if not run.config.evaluate.generate:
        return {}
    model = cast("LanguageModel", run.engine.model)
    run.me.report(Phase.EVALUATE, run.step)
    alive = lambda: run.me.report(Phase.EVALUATE, run.step)  # noqa: E731
    return translation.translate(model, run.tokens, run.config.evaluate.generate, run.world.data, alive)


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
        **evaluation.figures(),
        **({"classes": evaluation.by_class()} if evaluation.classes else {}),
        **_ending(run),
    }


def _ending(run: Run) -> dict[str, Any]:
    """Of early stopping: which step was the best, and why there are no more of them."""
    if not (patience := run.config.evaluate.patience):
        return {}
    why = {"stopped_early": run.best.explain(patience)} if run.step < run.config.run.steps else {}
    return {"best_step": run.best.step, **why}


def save_final(run: Run, final: RankState) -> None:
    """Collective. Waits until this rank's part is durable."""
    run.checkpointer.save_and_wait(run.step, run.tensors, final.to_json(), alive=lambda: run.me.report(Phase.FINISH, run.step))
