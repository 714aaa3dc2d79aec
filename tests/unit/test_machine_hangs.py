"""Who hangs, when all ranks stand still."""

from __future__ import annotations

import pytest
from machine_parts import rank, report

from keepstep.orchestrator.hangs import culprit_of, is_hang, is_overdue, stood_still, updated
from keepstep.orchestrator.verdict import Evidence
from keepstep.trainer.contract import Phase

WAITING = {"where": "loop.py:120 agree < parallel.py:44 gather", "waits": True}


def culprit(**of_rank_2: object) -> Evidence:
    """Four ranks on two nodes, three of which wait in collective 41; what is given is true of rank 2."""
    common = {"quiet_s": 4.2, "collective": 41, "pulse_s": 0.1}
    first = report("node0#a", attempt=1, ranks=(rank(0, **common), rank(1, **common)))
    second = report("node1#b", attempt=1, ranks=(rank(2, **(common | of_rank_2)), rank(3, **common)))
    return culprit_of(stood_still(((first, 10.0), (second, 10.0)), now=10.0), now=10.0)


@pytest.mark.parametrize(
    ("true_of_rank_2", "reason"),
    [
        ({"process": "T", "pulse_s": 4.0}, "its process is stopped"),
        ({"pulse_s": 4.0}, "its interpreter has run nothing for 4.0 s"),
        ({"collective": 40}, "it has begun 40 collectives, others are in number 41 and wait for it"),
        ({"collective": 40, "quiet_s": 4.1}, "it has begun 40 collectives"),
        ({"step": 1, "collective": -1}, "it has begun -1 collectives"),
    ],
)
def test_the_one_that_the_others_wait_for_is_named(true_of_rank_2: dict[str, object], reason: str) -> None:
    found = culprit(**true_of_rank_2)
    assert (found.kind, found.rank, found.node) == ("stall", 2, "node1#b")
    assert reason in found.why


def test_a_stopped_process_explains_more_than_a_count_of_collectives() -> None:
    stopped = rank(0, quiet_s=5.0, collective=41, process="T", pulse_s=5.0)
    behind = rank(1, quiet_s=5.0, collective=40, pulse_s=0.1)
    found = culprit_of(stood_still(((report("node0#a", attempt=1, ranks=(behind, stopped)), 0.0),), now=0.0), now=0.0)
    assert found.rank == 0


def test_stacks_decide_where_the_numbers_are_equal() -> None:
    numbers = {"quiet_s": 4.5, "collective": 41}
    before = stood_still(((report("node0#a", attempt=1, ranks=(rank(0, **numbers), rank(1, **numbers))), 0.0),), now=0.0)
    asleep = rank(1, **numbers, where="train.py:9 read_batch", exit_code=-9, stopped_by_agent=True)
    later = report("node0#a", attempt=1, ranks=(rank(0, **numbers, **WAITING, exit_code=-9, stopped_by_agent=True), asleep))
    found = culprit_of(updated(before, later), now=0.0)
    assert found.rank == 1
    assert found.why.endswith("the others wait for it (at train.py:9 read_batch)")


def test_nobody_is_named_where_all_wait_for_each_other() -> None:
    ranks = tuple(rank(i, quiet_s=4.5, collective=41, **WAITING) for i in range(3))
    found = culprit_of(stood_still(((report("node0#a", attempt=1, ranks=ranks), 0.0),), now=0.0), now=0.0)
    assert (found.rank, found.node) == (-1, "")
    assert "all 3 ranks have been waiting for each other in collective 41" in found.why


def test_without_any_evidence_the_longest_silence_counts_the_reports_age_included() -> None:
    reports = (
        (report("node0#a", attempt=1, ranks=(rank(0, quiet_s=61.0),)), 100.0),
        (
            report("node1#b", attempt=1, ranks=(rank(1, quiet_s=60.5),)),
            99.0,
        ),
    )
    assert culprit_of(stood_still(reports, now=100.0), now=100.0).rank == 1


def test_a_hang_that_comes_again_proves_nothing_about_the_program() -> None:
    """Storage or a network that is away for an hour stops ranks at the same place again and again; the budget deals with it."""
    assert culprit(collective=40, where="loop.py:50 train").sameness() is None


@pytest.mark.parametrize(
    ("said", "overdue"),
    [
        ({"quiet_s": 5.0, "limit_s": 4.0}, True),
        ({"quiet_s": 5.0, "limit_s": 40.0}, False),
        ({"quiet_s": 5.0}, False),
        ({"quiet_s": 61.0}, True),
        ({"quiet_s": 900.0, "beats": 0}, False),
        ({"quiet_s": 900.0, "state": "exited"}, False),
    ],
)
def test_a_silence_is_a_hang_beyond_what_was_learnt_else_beyond_the_default(said: dict[str, object], overdue: bool) -> None:
    assert is_overdue(rank(0, **said), stall_s=60.0) is overdue


def test_those_who_wait_for_a_rank_that_is_busy_do_not_hang() -> None:
    """Rank 0 evaluates alone, and said that it may take minutes; the others stand in a barrier."""
    busy = rank(0, quiet_s=30.0, limit_s=600.0, collective=40, phase=Phase.EVALUATE)
    waiting = tuple(rank(i, quiet_s=30.0, limit_s=4.0, collective=41) for i in (1, 2))
    stood = stood_still(((report("node0#a", attempt=1, ranks=(busy, *waiting)), 0.0),), now=0.0)
    assert not is_hang(stood, stall_s=300.0)
    late = stood_still(((report("node0#a", attempt=1, ranks=(busy.model_copy(update={"quiet_s": 601.0}), *waiting)), 0.0),), now=0.0)
    assert is_hang(late, stall_s=300.0)


def test_who_died_of_a_lost_peer_was_waiting() -> None:
    numbers = {"quiet_s": 4.5, "collective": 41}
    before = stood_still(((report("node0#a", attempt=1, ranks=(rank(0, **numbers), rank(1, **numbers))), 0.0),), now=0.0)
    victim = rank(0, **numbers, exit_code=1, kind="peer-lost")
    later = report("node0#a", attempt=1, ranks=(victim, rank(1, **numbers, exit_code=-9, stopped_by_agent=True, where="x.py:1 f")))
    assert culprit_of(updated(before, later), now=0.0).rank == 1


def test_a_node_that_has_seen_too_little_goes_by_those_that_step_along_with_it() -> None:
    new = report("node1#b", attempt=1, ranks=(rank(2, quiet_s=6.0, collective=40),))
    old = report("node0#a", attempt=1, ranks=(rank(0, quiet_s=6.0, collective=41, limit_s=4.0),))
    assert is_hang(stood_still(((old, 0.0), (new, 0.0)), now=0.0), stall_s=300.0)
    elsewhere = report("node0#a", attempt=1, ranks=(rank(0, quiet_s=6.0, collective=41, limit_s=4.0, step=9),))
    assert not is_hang(stood_still(((elsewhere, 0.0), (new, 0.0)), now=0.0), stall_s=300.0)
