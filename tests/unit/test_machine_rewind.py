"""Going back, as the machine sees it; whole stories of it are in tests/scenarios (bad_step*, rewind*)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from machine_parts import play, rank, report, starting

from keepstep.orchestrator import asking, phases
from keepstep.orchestrator import events as ev
from keepstep.orchestrator.machine import Run, begin, directive
from keepstep.orchestrator.policy import Policy
from keepstep.orchestrator.rewinds import overridden, want
from keepstep.orchestrator.wire import Persisted

NODES = ("node0#a", "node1#b")
TARGET = ev.Checkpoint(step=20, directory="data/a000001/s000000020", manifest_sha256="m")
REFUSED = {"exit_code": 1, "kind": "bad-step", "why": "BadStep: step 6: the loss of rank 1 is nan", "bad_step": 6, "bad_ranks": (1,)}


def refused(run: Run, at: float = 1.0, skips: tuple[str, ...] = ("40:42",), bad_step: int = 6) -> Run:
    for place, node in enumerate(NODES):
        found = rank(place, **(REFUSED | {"bad_step": bad_step}), skips=skips)
        said = report(node, int(10 * at), attempt=run.attempt, ranks=(found,))
        run = play(run, ev.Reported(at, said))[0]
    return run


def rewound(run: Run, at: float = 1.5, resume: ev.Checkpoint | None = TARGET) -> Run:
    """The log's answer to what was asked for."""
    (asked,) = [ask.request for ask in run.asks if isinstance(ask.request, ev.LogRewind)]
    found = {"skips": asked.skips, "overrides": asked.overrides, "bad_step": asked.bad_step, "why": asked.why}
    return play(run, ev.Logged(at, ev.RewindRecord(resume=resume, **found)))[0]


def wanted(**fields: object) -> ev.LogRewind:
    return ev.LogRewind(**({"to": 20, "why": "x"} | fields))  # type: ignore[arg-type]


def test_a_bad_step_costs_no_strike_and_no_failure() -> None:
    run = refused(starting())
    assert (run.failures, run.last_error, run.members.strikes) == (0, None, {})
    assert [(failure.culprit.rank, failure.culprit.node) for failure in run.failed] == [(1, "node1#b")]
    assert isinstance(run.phase, phases.Waiting)
    assert run.phase.not_before == run.now, "no pause either"


def test_nothing_is_chosen_before_the_log_knows_of_the_rewind() -> None:
    run = refused(starting())
    assert [type(ask.request) for ask in run.asks] == [ev.LogRewind]
    assert isinstance(play(run, ev.Tick(1.2))[0].phase, phases.Waiting)
    run = rewound(run)
    assert isinstance(run.phase, phases.Choosing)
    assert (run.skips, run.rewinds, run.reached) == (("40:42",), 1, 20)


def test_an_answer_that_comes_twice_counts_once() -> None:
    run = refused(starting())
    (asked,) = [ask.request for ask in run.asks if isinstance(ask.request, ev.LogRewind)]
    record = ev.RewindRecord(resume=None, skips=asked.skips, overrides=(), bad_step=asked.bad_step, why=asked.why)
    run, _ = play(run, ev.Logged(1.5, record), ev.Logged(1.6, record))
    assert run.rewinds == 1


@pytest.mark.parametrize(("done", "outcome"), [(1, phases.Waiting), (2, phases.Ending)])
def test_a_successor_goes_on_counting(done: int, outcome: type) -> None:
    opened = ev.Opened(at=0.0, term=1, last_attempt=1, last_gang=NODES, last_world_size=2, rewinds=done, skips=("0:4",))
    run = refused(play(begin(Policy(steps=100, nodes=2, min_nodes=2, rewinds=2)), opened)[0])
    assert isinstance(run.phase, outcome)
    if isinstance(run.phase, phases.Ending):
        assert not run.phase.end.requeue, "exit code 4"
        assert "2 rewinds left out the samples at 0:4, and train.spike.budget = 2 allows no more" in run.phase.why


def test_a_budget_of_none_allows_no_rewind() -> None:
    run = refused(starting(rewinds=0))
    assert isinstance(run.phase, phases.Ending)
    assert "train.spike.budget = 0 allows no rewind" in run.phase.why


@pytest.mark.parametrize("nonsense", [{"skips": ()}, {"skips": ("4",)}, {"skips": ("42:40",)}, {"bad_step": -1}, {"bad_step": 0}])
def test_whoever_cannot_say_what_to_leave_out_has_raised_an_exception(nonsense: dict[str, object]) -> None:
    run = starting()
    for place, node in enumerate(NODES):
        said = report(node, 10, attempt=1, ranks=(rank(place, **(REFUSED | {"skips": ("40:42",)} | nonsense)),))
        run = play(run, ev.Reported(1.0, said))[0]
    assert (run.failures, run.rewind, [failure.culprit.kind for failure in run.failed]) == (1, None, ["exception"])


def test_asked_to_stop_a_bad_step_stops() -> None:
    run = refused(play(starting(), ev.StopAsked(0.5, "maintenance"))[0])
    assert isinstance(run.phase, phases.Ending)
    assert run.phase.end.outcome == "stopped"


def test_a_bad_step_and_a_persons_wish_are_one_rewind_as_far_back_as_either() -> None:
    run = play(starting(), ev.RewindAsked(at=0.9, to=3, skips=("60:61",), overrides=("optimizer.lr=0.1",), why="p"))[0]
    run = want(run, wanted(to=5, skips=("40:42",), bad_step=6, why="b"))
    assert run.rewind == wanted(to=3, skips=("40:42", "60:61"), overrides=("optimizer.lr=0.1",), why="p; b")


def test_a_bad_step_that_meets_a_persons_wish_spends_no_budget() -> None:
    run = starting(rewinds=0)
    run = play(run, ev.Reported(1.0, report(NODES[0], 10, attempt=1, ranks=(rank(0, **REFUSED, skips=("40:42",)),))))[0]
    run = play(run, ev.RewindAsked(at=1.05, to=3, why="p"))[0]
    run = play(run, ev.Reported(1.1, report(NODES[1], 11, attempt=1, ranks=(rank(1, **REFUSED, skips=("40:42",)),))))[0]
    assert "going back and leaving out the samples at 40:42 (with the rewind that was asked for)" in run.phase.why
    (asked,) = [ask.request for ask in run.asks]
    assert isinstance(asked, ev.LogRewind)
    assert (asked.to, asked.skips, asked.bad_step) == (3, ("40:42",), -1)
    assert rewound(run).rewinds == 0


@pytest.mark.parametrize(("bad_step", "kind"), [(20, "exception"), (2, "exception"), (21, "bad-step")])
def test_a_script_that_counts_its_steps_otherwise_has_raised_an_exception(bad_step: int, kind: str) -> None:
    """It resumed from step 20: a step before that is none of this attempt."""
    run = rewound(refused(starting()))
    record = ev.AttemptRecord(attempt=2, gang=NODES, world_size=2, nonce="n", resume=TARGET, skips=run.skips)
    run = refused(play(run, ev.Found(2.0, TARGET), ev.Logged(2.1, record))[0], 3.0, ("80:82",), bad_step)
    assert run.failed[-1].culprit.kind == kind
    assert asking.pending(run.asks, ev.LogRewind) == (kind == "bad-step")


def test_a_bad_step_with_nothing_to_go_back_to_ends_the_run() -> None:
    run = refused(starting())
    (asked,) = [ask.request for ask in run.asks if isinstance(ask.request, ev.LogRewind)]
    run = play(run, ev.RewindVoid(1.5, asked, "there is no usable checkpoint"))[0]
    assert isinstance(run.phase, phases.Ending)
    assert run.phase.end.outcome == "failed"


@pytest.mark.parametrize(("to", "waits"), [(3, False), (8, True)])
def test_parts_of_what_is_left_behind_are_not_waited_for(to: int, waits: bool) -> None:
    """Rank 1's part of step 5 is still missing; going back to step 3 leaves it behind anyway."""
    part = Persisted(attempt=1, step=5, rank=0, directory="data/a000001/s000000005", index_sha256="x", num_bytes=1)
    run = play(starting(), ev.Reported(0.8, report(NODES[0], 8, attempt=1, ranks=(rank(0),), persisted=(part,))))[0]
    run = play(run, ev.RewindAsked(at=0.9, to=to, why="p"))[0]
    for place, node in enumerate(NODES):
        run = play(run, ev.Reported(1.0, report(node, 9, attempt=1, ranks=(rank(place, exit_code=-9, stopped_by_agent=True),))))[0]
    assert isinstance(run.phase, phases.Draining if waits else phases.Waiting)


def test_people_begin_with_a_fresh_budget() -> None:
    run = replace(starting(), failures=4, last_error=("exception", "x", 3), save_above=30)
    run = play(run, ev.RewindAsked(at=1.0, to=20, why="p"))[0]
    for place, node in enumerate(NODES):
        run = play(run, ev.Reported(1.1, report(node, 9, attempt=1, ranks=(rank(place, exit_code=-9, stopped_by_agent=True),))))[0]
    run = rewound(run)
    assert (run.failures, run.last_error, run.save_above, run.rewinds) == (0, None, None, 0)


def test_a_commit_of_what_was_rewound_changes_nothing() -> None:
    run = rewound(refused(starting()))
    late = ev.Committed(at=2.0, attempt=1, step=40, directory="data/a000001/s000000040", manifest_sha256="m")
    assert play(run, late)[0].saves.committed_step == 20


def test_who_decides_the_end_hears_no_more_wishes() -> None:
    run = refused(starting(rewinds=0))
    assert play(run, ev.RewindAsked(at=2.0, to=0, why="p"))[0].rewind is None


def test_the_ranks_are_told_what_to_leave_out_and_what_overrides_run_toml() -> None:
    run = rewound(refused(starting()))
    record = ev.AttemptRecord(attempt=2, gang=NODES, world_size=2, nonce="n", resume=TARGET, skips=run.skips, overrides=("a.b=1",))
    run = play(run, ev.Found(2.0, TARGET), ev.Logged(2.1, record))[0]
    launch = directive(run, NODES[0]).launch
    assert launch
    assert (launch.skips, launch.overrides) == (("40:42",), ("a.b=1",))


def test_other_numbers_keep_what_people_resized() -> None:
    run = play(starting(), ev.ResizeAsked(0.6, 1), ev.Reconfigured(0.7, Policy(steps=50, nodes=2, min_nodes=2)))[0]
    assert (run.policy.steps, run.policy.nodes, run.policy.min_nodes) == (50, 1, 1)


def test_the_last_override_of_a_key_counts() -> None:
    assert overridden(("a.b=1", "a.c=2"), ("a.b = 3",)) == ("a.b = 3", "a.c=2")
