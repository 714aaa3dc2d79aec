"""The machine as a whole: its table, its purity, its manners."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from machine_parts import play, rank, report, starting

from keepstep.orchestrator import events as ev
from keepstep.orchestrator import phases
from keepstep.orchestrator.machine import Run, begin, describe, directive, may_answer, step
from keepstep.orchestrator.policy import Policy
from keepstep.trainer.contract import Phase, Request

README = Path(__file__).parents[2] / "orchestrator" / "README.md"


def test_the_state_diagram_in_the_readme_equals_the_table() -> None:
    drawn = README.read_text().split("```mermaid\n", 1)[1].split("```", 1)[0].strip()
    assert drawn == phases.mermaid(), "copy phases.mermaid() into orchestrator/README.md"


def test_every_phase_is_reached_and_only_terminal_ones_are_never_left() -> None:
    every = set(phases.Phase.__args__)
    assert {new for _, new in phases.TRANSITIONS} == every - {phases.Opening}
    assert {old for old, _ in phases.TRANSITIONS} == every - set(phases.TERMINAL)


def test_a_step_changes_nothing_but_what_it_returns() -> None:
    run = starting()
    before, told = repr(run), report("node0#a", 2, attempt=1, ranks=(rank(0),))
    assert repr(step(run, ev.Reported(1.0, told))) == repr(step(run, ev.Reported(1.0, told)))
    assert repr(run) == before


def test_after_the_end_nothing_happens() -> None:
    run, _ = play(starting(), ev.Fenced(1.0, 2, "elsewhere"))
    assert step(run, ev.Tick(2.0)) == (run, ())
    assert describe(run) == ("SUPERSEDED", "term 2 was opened by elsewhere")


def test_nobody_is_answered_before_the_log_was_read_nor_long_after() -> None:
    run = starting(outage_s=10)
    assert not may_answer(run, 0.4)
    run, _ = play(run, ev.LogRead(1.0, began=0.9))
    assert may_answer(run, 10.9)
    assert not may_answer(run, 11.0)


def test_a_superseded_coordinator_answers_nobody() -> None:
    run, _ = play(starting(), ev.LogRead(1.0, began=0.9), ev.Fenced(1.1, 2, "elsewhere"))
    assert not may_answer(run, 1.2)


def test_a_directive_carries_term_attempt_and_seat() -> None:
    told = directive(starting(), "node1#b")
    assert told.launch is not None
    assert (told.term, told.launch.attempt, told.launch.first_rank, told.launch.group_rank, told.launch.world_size) == (1, 1, 1, 1, 2)
    assert told.launch.store is None
    assert directive(starting(), "stranger#1").launch is None


def test_nodes_have_as_many_ranks_as_they_have_slots() -> None:
    run, _ = play(begin(Policy(steps=9, nodes=2)), ev.Opened(at=0, term=1))
    run, requests = play(
        run, ev.Reported(0.1, report("node0#a", slots=3)), ev.Reported(0.2, report("node1#b", slots=1)), ev.Found(0.3, None)
    )
    (wanted,) = (request for request in requests if isinstance(request, ev.LogAttempt))
    record = ev.AttemptRecord(attempt=1, gang=wanted.gang, world_size=wanted.world_size, nonce="n", resume=None)
    launch = directive(play(run, ev.Logged(0.4, record))[0], "node1#b").launch
    assert launch is not None
    assert (launch.world_size, launch.first_rank, launch.num_ranks) == (4, 3, 1)


def test_every_decision_has_a_newer_revision() -> None:
    run, revisions = starting(), []
    for event in (
        ev.Reported(1.0, report("node0#a", 2, attempt=1, ranks=(rank(0),))),
        ev.Reported(1.1, report("node1#b", 2, attempt=1, ranks=(rank(1),))),
        ev.SaveAsked(1.2),
        ev.StopAsked(1.3, "enough"),
        ev.Reported(1.4, report("node0#a", 3, attempt=1, ranks=(rank(0, exit_code=-9, kind="signal", why="SIGKILL"),))),
    ):
        run, _ = step(run, event)
        revisions.append(directive(run, "node0#a").revision)
    assert revisions == sorted(revisions)
    assert len(set(revisions)) == 5  # the first report decided nothing: 4, then 5 to 8


def test_a_save_request_survives_a_restart() -> None:
    run, _ = play(starting(), ev.SaveAsked(0.5))
    launch = directive(run, "node0#a").launch
    assert launch is not None
    assert launch.request == Request.SAVE
    drained, _ = play(run, ev.Reported(1.0, report("node0#a", 2, attempt=1, ranks=(rank(0, exit_code=1),))))
    assert drained.save_above == 0


def test_a_rank_that_leaves_early_with_0_is_a_failure() -> None:
    run, _ = play(starting(), ev.Reported(1.0, report("node0#a", 2, attempt=1, ranks=(rank(0, exit_code=0, phase=Phase.STEP),))))
    assert describe(run) == ("DRAINING", "rank 0 on node0#a left in phase STEP with exit code 0, before it had finished at step 5")


def test_unanswered_requests_are_repeated() -> None:
    run = begin(Policy(steps=9, max_retry_s=5))
    run, requests = play(run, ev.Opened(at=0, term=1), ev.Reported(0.1, report("node0#a")))
    assert ev.FindCheckpoint() in requests
    quiet = [step(run, ev.Tick(at))[1] for at in (1.0, 5.0)]
    assert quiet == [(), ()]
    assert ev.FindCheckpoint() in step(run, ev.Tick(5.2))[1]


@pytest.mark.parametrize("seed", range(60))
def test_no_sequence_of_events_breaks_the_machine(seed: int) -> None:
    """Nonsense included: answers to nothing, repeated records, reports from anywhere."""
    rng = random.Random(seed)
    run: Run = begin(Policy(steps=20, nodes=2, max_failures=3, lease_s=2, wait_for_nodes_s=5))
    run, _ = step(run, ev.Opened(at=0, term=1))
    for i in range(400):
        run, requests = step(run, _anything(rng, run, i))
        for request in requests:
            assert not isinstance(request, ev.LogAttempt) or run.attempt < request.attempt <= max(run.attempt, run.taken) + 1
        directive(run, "node0#a")


def _anything(rng: random.Random, run: Run, i: int) -> ev.Event:
    at, attempt = i * 0.3, run.attempt + rng.choice((-1, 0, 0, 0, 1))
    node = rng.choice(("node0#a", "node1#b", "node0#c", "node2#d"))
    resume = rng.choice((None, ev.Checkpoint(step=4, directory="data/x", manifest_sha256="m")))
    ended = {"exit_code": rng.choice((0, 1, -9)), "kind": rng.choice(("", "peer-lost", "damaged-checkpoint")), "why": "oh"}
    state = {"phase": rng.choice(list(Phase)), "step": rng.randrange(21)} | (ended if rng.random() < 0.3 else {})
    ranks = (rank(rng.randrange(3), **state),) if rng.random() < 0.8 else ()
    buried = ("node0#a",) if node == "node0#c" else ()
    told = report(node, i, attempt=attempt, ranks=ranks, buried=buried, obeyed=rng.choice((0, run.revision)), term=rng.choice((0, 1)))
    asked = [ask.request for ask in run.asks] or [ev.FindCheckpoint()]
    record = ev.AttemptRecord(attempt=attempt, gang=("node0#a", "node1#b"), world_size=2, nonce="n", resume=resume)
    commit = {"at": at, "attempt": attempt, "step": rng.randrange(21), "directory": "data/y"}
    return rng.choice(
        (
            ev.Tick(at),
            ev.Reported(at, told),
            ev.Reported(at, told),
            ev.Disconnected(at, node),
            ev.Found(at, resume),
            ev.Logged(at, record),
            ev.Logged(at, ev.QuarantineRecord("data/x")),
            ev.LogFailed(at, rng.choice(asked), "503"),
            ev.LogRead(at, at),
            ev.Committed(**commit, manifest_sha256="m"),
            ev.CommitFailed(**commit, why="no", damaged=rng.random() < 0.5),
            ev.SaveAsked(at),
            ev.DrainAsked(at, node, "kernel") if rng.random() < 0.1 else ev.Tick(at),
            ev.StopAsked(at, "enough") if rng.random() < 0.05 else ev.Tick(at),
        )
    )
