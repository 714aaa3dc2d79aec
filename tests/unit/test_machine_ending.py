"""How a run ends: with its last step, or before it when the training itself is done."""

from __future__ import annotations

from typing import Any

import pytest
from machine_parts import play, rank, report, starting

from keepstep.orchestrator import events as ev
from keepstep.orchestrator.machine import Run, describe
from keepstep.orchestrator.wire import Persisted
from keepstep.trainer.contract import Phase

STEP = 40  # of 100


def left(phase: Phase, *, persisted: bool = True, step: int = STEP) -> tuple[Run, tuple[ev.Request, ...]]:
    """Both ranks have left at a step."""
    run, _ = play(
        starting(),
        *(ev.Reported(1.0 + i, report(node, 2, attempt=1, ranks=(rank(i, step=step),))) for i, node in enumerate(("node0#a", "node1#b"))),
    )
    requests: tuple[ev.Request, ...] = ()
    for i, node in enumerate(("node0#a", "node1#b")):
        parts = (part(i, step),) if persisted else ()
        told = report(node, 3, attempt=1, ranks=(rank(i, step=step, phase=phase, exit_code=0),), persisted=parts)
        run, requests = play(run, ev.Reported(3.0 + i, told))
    return run, requests


def part(number: int, step: int, **fields: Any) -> Persisted:
    return Persisted(attempt=1, step=step, rank=number, directory=f"d{step}", index_sha256="x", num_bytes=1, **fields)


def committed(run: Run, step: int = STEP) -> tuple[Run, tuple[ev.Request, ...]]:
    return play(run, ev.Committed(at=6.0, attempt=1, step=step, directory=f"d{step}", manifest_sha256="m"))


def test_a_training_that_is_done_before_its_last_step_has_succeeded() -> None:
    run, requests = committed(left(Phase.DONE)[0])
    (end,) = (request for request in requests if isinstance(request, ev.LogEnd))
    assert (end.outcome, end.step, end.requeue) == ("succeeded", STEP, False)
    assert end.why == "the training ended by itself at step 40 of 100, which is committed: its evaluations got no better"
    assert describe(run)[0] == "ENDING"


def test_what_it_ended_with_must_be_committed() -> None:
    run, requests = left(Phase.DONE)
    assert not [request for request in requests if isinstance(request, ev.LogEnd)]
    assert [request.step for request in requests if isinstance(request, ev.Commit)] == [STEP]
    assert describe(run)[0] == "TRAINING"
    late, _ = play(left(Phase.DONE, persisted=False)[0], ev.Tick(10_000.0))
    assert describe(late)[0] not in {"ENDING", "SUCCEEDED"}


def test_ranks_that_only_stopped_are_launched_again() -> None:
    run, requests = committed(left(Phase.STOPPED)[0])
    assert not [request for request in requests if isinstance(request, ev.LogEnd)]
    assert describe(run)[0] == "CHOOSING", "the next attempt goes on"


def test_a_run_that_people_stop_while_it_ends_by_itself_has_succeeded() -> None:
    run, _ = play(left(Phase.DONE)[0], ev.StopAsked(5.0, "enough"))
    _, requests = committed(run)
    assert [request.outcome for request in requests if isinstance(request, ev.LogEnd)] == ["succeeded"]


@pytest.mark.parametrize("phase", [Phase.DONE, Phase.STOPPED])
def test_after_the_last_step_it_has_succeeded_as_ever(phase: Phase) -> None:
    _, requests = committed(left(phase, step=100)[0], 100)
    assert [request.why for request in requests if isinstance(request, ev.LogEnd)] == ["all 100 steps are done and committed"]


def test_the_checkpoint_of_the_best_evaluation_is_committed_before_a_newer_one() -> None:
    """A coordinator that was away finds both complete: committing the newer one first would leave the best one out for ever."""
    run, _ = play(
        starting(),
        *(ev.Reported(1.0 + i, report(node, 2, attempt=1, ranks=(rank(i, step=60),))) for i, node in enumerate(("node0#a", "node1#b"))),
    )
    asked: list[int] = []
    for i, node in enumerate(("node0#a", "node1#b")):
        parts = (part(i, 20, best_step=20), part(i, 40, best_step=20), part(i, 60, best_step=20))
        run, requests = play(run, ev.Reported(3.0 + i, report(node, 3, attempt=1, ranks=(rank(i, step=60),), persisted=parts)))
        asked += [request.step for request in requests if isinstance(request, ev.Commit)]
    run, requests = committed(run, 20)
    assert [*asked, *(request.step for request in requests if isinstance(request, ev.Commit))] == [20, 60]
