"""What outlives a coordinator: failures, strikes, drains, orders to resize."""

from __future__ import annotations

from dataclasses import replace

import pytest
from machine_parts import play, report, starting

from keepstep.orchestrator import events as ev
from keepstep.orchestrator import membership
from keepstep.orchestrator.machine import Run, begin
from keepstep.orchestrator.policy import Policy
from keepstep.orchestrator.standing import resize, standing

POLICY = Policy(steps=100, nodes=2, min_nodes=2)
OLD = ev.Checkpoint(step=10, directory="data/a", manifest_sha256="m")
NEW = ev.Checkpoint(step=20, directory="data/b", manifest_sha256="m")


def predecessor() -> Run:
    run = replace(begin(POLICY), now=50.0, failures=3, last_error=("exception", "valueerror", 12))
    members = replace(run.members, drained={"gpu07": "bad fan"})
    return replace(run, members=membership.strike(membership.strike(members, "gpu03#a", 40.0), "gpu03#b", 45.0))


def successor(text: str, *, policy: Policy = POLICY, **opened: object) -> Run:
    fields: dict[str, object] = {"last_attempt": 4, "last_gang": ("gpu01#a", "gpu02#a"), "last_world_size": 2, "last_resume": OLD}
    event = ev.Opened(at=3.0, term=2, last_standing=text, **(fields | {"newest_commit": OLD} | opened))  # type: ignore[arg-type]
    return play(begin(policy), event)[0]


def test_a_successor_goes_on_counting() -> None:
    run = successor(standing(predecessor()))
    assert (run.failures, run.last_error) == (3, ("exception", "valueerror", 12))
    assert membership.num_strikes(run.members, POLICY, "gpu03", run.now) == 2
    assert run.members.drained == {"gpu07": "bad fan"}


def test_a_commit_since_then_has_refilled_the_budget() -> None:
    assert successor(standing(predecessor()), newest_commit=NEW).failures == 0


OLDEST = ev.Checkpoint(step=5, directory="data/0", manifest_sha256="m")


@pytest.mark.parametrize("newest", [OLDEST, OLD, None])
def test_going_back_is_no_progress(newest: ev.Checkpoint | None) -> None:
    run = successor(standing(predecessor()), newest_commit=newest, rewound=True)
    assert (run.failures, run.last_error) == (3, ("exception", "valueerror", 12))


@pytest.mark.parametrize("newest", [OLDEST, OLD, NEW, None])
def test_where_people_asked_to_go_back_the_run_begins_anew(newest: ev.Checkpoint | None) -> None:
    run = successor(standing(predecessor()), newest_commit=newest, rewound=True, forgiven=True)
    assert (run.failures, run.last_error) == (0, None)
    assert run.members.drained == {"gpu07": "bad fan"}


def test_a_run_that_had_ended_begins_anew_but_remembers_its_hosts() -> None:
    run = successor(standing(predecessor()), ended=True)
    assert (run.failures, run.last_error) == (0, None)
    assert membership.num_strikes(run.members, POLICY, "gpu03", run.now) == 2


def test_nothing_to_remember_is_an_empty_object() -> None:
    assert standing(begin(POLICY)) == "{}"
    assert successor("").failures == 0


@pytest.mark.parametrize(("configured", "nodes"), [(2, 5), (3, 3)], ids=["the order stands", "until the config is changed"])
def test_an_order_to_resize(configured: int, nodes: int) -> None:
    text = standing(resize(begin(POLICY), 5))
    assert successor(text, policy=Policy(steps=100, nodes=configured, min_nodes=1)).policy.nodes == nodes


def test_back_to_the_configured_size_is_no_order_any_more() -> None:
    assert resize(resize(begin(POLICY), 1), 2).resized is None
    assert resize(resize(begin(POLICY), 1), 2).policy.nodes == 2


def test_strikes_are_forgotten_after_a_while() -> None:
    members = membership.strike(predecessor().members, "gpu03#c", 50.0)
    assert membership.num_strikes(members, POLICY, "gpu03", 60.0) == 3
    assert membership.num_strikes(members, POLICY, "gpu03", 46.0 + POLICY.strike_memory_s) == 1


def test_the_attempts_record_carries_it() -> None:
    run = starting()
    run, _ = play(run, ev.Reported(0.4, report("node0#a", 2, leaving="")))
    run, _ = play(run, ev.DrainAsked(0.5, "node7", "bad fan"))
    assert "bad fan" in standing(run)
