"""Who was first: victims are never named while something better is known."""

from __future__ import annotations

import pytest
from machine_parts import rank, report

from keepstep.orchestrator.verdict import Evidence, alike, better, of_report, with_others


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


@pytest.mark.parametrize("others", [1, 3])
def test_equal_errors_are_one_error_seen_several_times(others: int) -> None:
    found = [evidence("exception", rank=i, step=8, detail=f"ValueError: bad batch {i}", node=f"node{i}") for i in range(others + 1)]
    elsewhere = evidence("exception", rank=7, step=8, detail="KeyError: x")
    group = alike(found[0], [*found, elsewhere])
    assert [each.rank for each in group] == list(range(1, others + 1))
    assert with_others(found[0], group).why.endswith("; rank 1 failed alike" if others == 1 else "; ranks 1, 2 and 3 failed alike")


def test_what_a_node_did_to_its_ranks_is_not_counted_by_ranks() -> None:
    assert alike(evidence("stopped", rank=0, step=8), [evidence("stopped", rank=1, step=8)]) == ()
