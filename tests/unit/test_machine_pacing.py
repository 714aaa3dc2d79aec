"""Where the machine's word on how often to save comes from, and who hears it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from machine_parts import play, rank, report, starting

from keepstep.orchestrator import events as ev
from keepstep.orchestrator.machine import Run, begin, directive
from keepstep.orchestrator.policy import Policy
from keepstep.orchestrator.standing import standing
from keepstep.trainer.contract import Pacing, SaveCosts

COSTS = SaveCosts(step_s=0.25, stall_s=0.05, drag_s=0.01, persist_s=0.5)
AUTO = {"save_share": 0.05, "needs_final_commit": True}
GANG = ("node0#a", "node1#b")


def told(run: Run, node: str = "node1#b") -> Pacing:
    launch = directive(run, node).launch
    assert launch
    return launch.pacing


def said(requests: tuple[ev.Request, ...]) -> list[str]:
    return [request.why for request in requests if isinstance(request, ev.Say) and request.kind == "interval"]


def measured(at: float, sequence: int, *, node: str = "node0#a", age_s: float = 0.0, **fields: Any) -> ev.Reported:
    number = GANG.index(node)
    ranks = (rank(number, **({"costs": COSTS} | fields)),)
    return ev.Reported(at, report(node, sequence, attempt=1, ranks=ranks, ordered_s=age_s))


def test_all_are_told_as_soon_as_rank_0_has_measured() -> None:
    run = starting(**AUTO)
    assert told(run) == Pacing(0, soon=True)
    run, requests = play(run, measured(1.0, 2))
    [why] = said(requests)
    assert told(run, "node0#a") == told(run, "node1#b") == Pacing(run.pace.steps, soon=True)
    assert why.startswith(f"checkpoint every {run.pace.steps} steps (")
    assert said(play(run, measured(1.1, 3))[1]) == []


def test_nobody_else_is_listened_to() -> None:
    run, requests = play(starting(**AUTO), measured(1.0, 2, node="node1#b"))
    assert (told(run).every, said(requests)) == (0, [])


def test_where_run_toml_says_how_often_nothing_is_decided() -> None:
    run, requests = play(starting(), measured(1.0, 2))
    assert (told(run).every, said(requests)) == (0, [])


def test_quiet_hours_make_it_longer_and_a_word_is_said_when_it_matters() -> None:
    run, _ = play(starting(**AUTO), measured(1.0, 2))
    first = run.pace.steps
    run, requests = play(run, measured(2.0, 3, age_s=5.0))
    assert (run.pace.steps, said(requests)) == (first, [])
    run, requests = play(run, measured(3.0, 4, age_s=36000.0))
    assert told(run).every > 5 * first
    assert said(requests)[0].endswith("no failures in 10 h")


def failed(run: Run, at: float, **fields: Any) -> Run:
    """All ranks of the attempt end, rank 1 first, by itself unless `fields` say otherwise."""
    killed = {"exit_code": -9, "why": "SIGKILL", "kind": "signal", "exit_order": 0} | fields
    stopped = measured(at, 90, age_s=100.0, exit_code=-9, stopped_by_agent=True)
    return play(run, measured(at, 90, node="node1#b", age_s=100.0, **killed), stopped)[0]


def again(run: Run, at: float) -> Run:
    resume = run.saves.newest
    nodes = [ev.Reported(at, report(node, 99)) for node in GANG]
    record = ev.AttemptRecord(attempt=2, gang=GANG, world_size=2, nonce="m", resume=resume, standing=standing(run))
    return play(run, *nodes, ev.Found(at, resume), ev.Logged(at, record))[0]


def test_after_a_failure_it_is_shorter_and_what_died_early_is_followed_by_a_save_at_once() -> None:
    run, _ = play(starting(**AUTO), measured(1.0, 2), measured(2.0, 3, age_s=100.0))
    before = run.pace.steps
    after = again(failed(run, 3.0), 10.0)
    assert 0 < told(after).every < before
    assert told(after).soon
    assert len(after.pace.history.process.gaps) == 1
    assert after.pace.history.process.gaps == (200.0,)


@pytest.mark.parametrize(("step", "soon"), [(10_000, False), (1, True)])
def test_what_lived_long_enough_to_save_in_time_was_no_crash_loop(step: int, soon: bool) -> None:
    run, _ = play(starting(steps=20_000, **AUTO), measured(1.0, 2))
    run, _ = play(run, ev.Committed(at=2.0, attempt=1, step=step, directory="data/x", manifest_sha256="m"))
    assert told(again(failed(run, 3.0), 10.0)).soon == soon


def test_a_lost_node_is_a_failure_of_a_node() -> None:
    run, _ = play(starting(**AUTO), measured(1.0, 2, age_s=100.0), measured(1.0, 2, node="node1#b", age_s=100.0))
    run, _ = play(run, *(ev.Tick(at / 4) for at in range(5, 60)))
    assert (len(run.pace.history.node.gaps), len(run.pace.history.process.gaps)) == (1, 0)


def test_a_successor_goes_on_with_what_was_known() -> None:
    run = failed(play(starting(**AUTO), measured(1.0, 2))[0], 3.0)
    opened = ev.Opened(at=1.0, term=2, last_attempt=2, last_gang=GANG, last_world_size=2, last_nonce="m", last_standing=standing(run))
    heir, _ = play(begin(replace(Policy(steps=100, nodes=2), save_share=0.05)), opened)
    assert heir.pace == replace(run.pace, steps=0)
    running = [
        ev.Reported(1.1, report(node, 2, term=2, attempt=2, ranks=(rank(number),), ordered_s=50.0)) for number, node in enumerate(GANG)
    ]
    heir, requests = play(heir, *running)
    assert told(heir).every > 0
    assert said(requests)
