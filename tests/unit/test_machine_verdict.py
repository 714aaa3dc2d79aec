"""Who was first: victims are never named while something better is known."""

from __future__ import annotations

import pytest
from machine_parts import rank, report

from keepstep.orchestrator.verdict import Evidence, better, of_report, stalled


def evidence(kind: str, seen_at: float = 0.0, **fields: object) -> Evidence:
    return Evidence(kind=kind, why=f"{kind} happened", seen_at=seen_at, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stronger", "weaker"),
    [
        ("damaged-checkpoint", "signal"),
        ("signal", "exception"),
        ("exception", "lost"),
        ("exit", "peer-lost"),
        ("persister", "peer-lost"),
        ("lost", "peer-lost"),
        ("lost", "stopped"),
        ("stall", "peer-lost"),
        ("a kind of tomorrow", "lost"),
    ],
)
def test_what_explains_more_wins_however_late_it_comes(stronger: str, weaker: str) -> None:
    assert better(evidence(weaker, 1.0), evidence(stronger, 2.0)).kind == stronger
    assert better(evidence(stronger, 2.0), evidence(weaker, 1.0)).kind == stronger


def test_of_equals_the_first_wins() -> None:
    assert better(evidence("signal", 2.0), evidence("signal", 1.0)).seen_at == 1.0


def test_on_one_node_the_order_of_exits_decides() -> None:
    late, early = (
        rank(0, exit_code=1, exit_order=1, kind="exception", why="B"),
        rank(1, exit_code=1, exit_order=0, kind="exception", why="A"),
    )
    found = of_report(report("node0#a", attempt=1, ranks=(late, early)), 1.0, keeps_promises=True)
    assert found is not None
    assert found.rank == 1


def test_a_rank_that_its_agent_stopped_is_never_preferred() -> None:
    stopped, victim = rank(0, exit_code=-9, stopped_by_agent=True), rank(1, exit_code=-11, kind="signal", why="SIGSEGV")
    found = of_report(report("node0#a", attempt=1, ranks=(stopped, victim)), 1.0, keeps_promises=True)
    assert found is not None
    assert found.why == "rank 1 on node0#a was killed by SIGSEGV at step 5"


def test_abort_is_how_libraries_give_up_so_a_kill_explains_more() -> None:
    aborted, killed = rank(0, exit_code=-6, kind="signal", why="SIGABRT"), rank(1, exit_code=-9, exit_order=1, kind="signal", why="SIGKILL")
    found = of_report(report("node0#a", attempt=1, ranks=(aborted, killed)), 1.0, keeps_promises=True)
    assert found is not None
    assert found.rank == 1


def test_the_same_error_is_recognised_without_its_numbers() -> None:
    one = evidence("exception", step=7, detail="ValueError: bad tensor at 0x7f10, 3 of 12")
    other = evidence("exception", step=7, detail="ValueError: bad tensor at 0x5a99, 4 of 12")
    assert one.sameness() == other.sameness() is not None
    assert one.sameness() != evidence("exception", step=8, detail=one.detail).sameness()


@pytest.mark.parametrize("kind", ["lost", "peer-lost", "stall", "lease"])
def test_what_comes_from_outside_is_never_the_same_error(kind: str) -> None:
    assert evidence(kind, step=7, detail="x").sameness() is None


def test_sigkill_proves_nothing_sigsegv_does() -> None:
    assert evidence("signal", detail="SIGKILL").sameness() is None
    assert evidence("signal", detail="SIGSEGV").sameness() is not None


def test_the_rank_that_has_been_quiet_longest_is_named_reports_age_included() -> None:
    waiting = report("node0#a", attempt=1, ranks=(rank(0, quiet_s=61.0),))
    hanging = report("node1#b", attempt=1, ranks=(rank(1, quiet_s=60.5),))
    found = stalled(((waiting, 100.0), (hanging, 99.0)), 60.0, now=100.0)
    assert found is not None
    assert found.rank == 1


def test_a_rank_that_never_reported_progress_cannot_stall() -> None:
    assert stalled(((report("node0#a", attempt=1, ranks=(rank(0, beats=0, quiet_s=900.0),)), 0.0),), 60.0, now=0.0) is None
