"""Seats, absence, suspects."""

from __future__ import annotations

import pytest
from machine_parts import rank, report

from keepstep.orchestrator import membership
from keepstep.orchestrator.membership import Members, Suspect
from keepstep.orchestrator.policy import Policy, restart_pause_s, retry_pause_s

POLICY = Policy(steps=10, nodes=3, lease_s=5, fence_s=1, drop_grace_s=0.5)


def members(*nodes: str, seats: tuple[str, ...] = (), at: float = 0.0) -> Members:
    found = Members(seats=seats)
    for node in nodes:
        found = membership.hear(found, report(node), at)
    return found


@pytest.mark.parametrize(
    ("former", "ready", "size", "gang"),
    [
        ((), ("node10#a", "node2#b", "node1#c"), 3, ("node1#c", "node2#b", "node10#a")),
        (("node2", "node1"), ("node1#c", "node2#d"), 2, ("node2#d", "node1#c")),
        (("node0", "node1", "node2"), ("node2#c", "spare#s", "node1#b"), 3, ("spare#s", "node1#b", "node2#c")),
        (("node0", "node1", "node2"), ("node2#c", "node1#b"), 2, ("node2#c", "node1#b")),
        (("node1",), ("node0#a", "node1#b"), 2, ("node1#b", "node0#a")),
        (("node0", "node1"), ("node0#a", "node1#b", "node2#c"), 2, ("node0#a", "node1#b")),
    ],
    ids=["by number", "new incarnations sit where the old ones did", "a spare fills the gap", "shrunk", "grown", "spares stay out"],
)
def test_seats_are_kept(former: tuple[str, ...], ready: tuple[str, ...], size: int, gang: tuple[str, ...]) -> None:
    assert membership.seat(members(*ready, seats=former), POLICY, ready, size, 0.0) == gang


def test_two_incarnations_of_a_host_never_share_a_seat() -> None:
    ready = ("node0#a", "node0#b", "node1#c")
    gang = membership.seat(members(*ready, seats=("node0", "node1")), POLICY, ready, 3, 0.0)
    assert sorted(gang) == sorted(ready)


def test_a_host_with_too_many_strikes_is_taken_only_when_needed() -> None:
    known = members("node0#a", "node1#b")
    for _ in range(POLICY.strikes):
        known = membership.strike(known, "node0#a", 0.0)
    assert membership.seat(known, POLICY, known.nodes, 1, 0.0) == ("node1#b",)
    assert membership.seat(known, POLICY, known.nodes, 2, 0.0) == ("node0#a", "node1#b")


def test_absence_needs_a_reason() -> None:
    known = members("node0#a", at=10.0)
    assert membership.absence(known, POLICY, "node0#a", 15.0, 0.0) == ""
    assert membership.absence(known, POLICY, "node0#a", 15.1, 0.0) == "silent for over 5 s"
    broken = membership.lose_connection(known, "node0#a", 11.0)
    assert membership.absence(broken, POLICY, "node0#a", 11.4, 0.0) == ""
    assert membership.absence(broken, POLICY, "node0#a", 11.6, 0.0) == "its agent vanished (connection broken 0.6 s ago)"
    assert membership.absence(known, POLICY, "stranger#1", 5.9, 0.0) == ""
    assert membership.absence(known, POLICY, "stranger#1", 6.1, 0.0) == "it did not report to this coordinator within 6 s"


def test_our_own_deafness_is_nobodys_silence() -> None:
    known = membership.excuse(members("node0#a", at=10.0), 60.0)
    assert membership.absence(known, POLICY, "node0#a", 74.0, 0.0) == ""


def test_a_successor_buries_for_good() -> None:
    known = membership.suspect(members("node0#a"), {"node0#a": Suspect(attempt=1, since=0, revision=1, listens=True)})
    known = membership.hear(known, report("node0#b", buried=("node0#a",)), 1.0)
    assert "node0#a" not in known.nodes
    assert not known.suspects
    assert membership.absence(known, POLICY, "node0#a", 1.0, 0.0)


SUSPECT = Suspect(attempt=3, since=0.0, revision=7, listens=True)


@pytest.mark.parametrize(
    ("said", "clean"),
    [
        ({"obeyed": 7, "attempt": 3, "ranks": (rank(0),)}, False),
        ({"obeyed": 7, "attempt": 2, "ranks": (rank(0),)}, False),
        ({"obeyed": 6}, False),
        ({"obeyed": 7}, True),
        ({"obeyed": 7, "term": 0}, False),
        ({"obeyed": 0, "term": 0, "attempt": 3, "ranks": (rank(0, exit_code=-9),)}, True),
        ({"obeyed": 0, "attempt": 2, "ranks": (rank(0, exit_code=-9),)}, False),
    ],
    ids=["runs", "runs an older one", "not told yet", "obeys", "obeys a predecessor", "launched once, dead", "may still launch"],
)
def test_a_node_is_clean_when_it_says_what_proves_it(said: dict[str, object], clean: bool) -> None:
    assert membership.says_clean(report("node0#a", **said), SUSPECT, POLICY, term=1, now=1.0) is clean


@pytest.mark.parametrize(("listens", "wait_s"), [(True, 6.0), (False, 11.0)])
def test_only_a_fence_in_the_log_outlasts_a_lease(listens: bool, wait_s: float) -> None:
    found = Suspect(attempt=1, since=0.0, revision=1, listens=listens)
    known = membership.suspect(Members(), {"node0#a": found})
    assert not membership.outlasted(known, POLICY, 1000.0)
    fenced = membership.fence(known, 10.0)
    assert not membership.outlasted(fenced, POLICY, 10.0 + wait_s - 0.1)
    assert membership.outlasted(fenced, POLICY, 10.0 + wait_s)


def test_a_node_that_says_that_ranks_run_is_not_outlasted() -> None:
    known = membership.suspect(members("node0#a"), {"node0#a": SUSPECT})
    known = membership.hear(membership.fence(known, 0.0), report("node0#a", 2, attempt=3, ranks=(rank(0),)), 5.0)
    assert not membership.outlasted(known, POLICY, 10.9)
    assert membership.outlasted(known, POLICY, 11.0)


def test_the_first_restart_is_immediate_then_pauses_double_up_to_a_limit() -> None:
    policy = Policy(steps=1, backoff_base_s=1, backoff_max_s=10)
    assert [restart_pause_s(policy, failures) for failures in (1, 2, 3, 4, 5, 6, 5000)] == [0, 1, 2, 4, 8, 10, 10]
    assert [retry_pause_s(policy, refusals) for refusals in (1, 2, 3, 100)] == [0.5, 1, 2, 10]


@pytest.mark.parametrize("wrong", [{"min_nodes": 0}, {"nodes": 2, "min_nodes": 3}, {"lease_s": 0.1}])
def test_an_impossible_policy_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        Policy(steps=1, **wrong)  # type: ignore[arg-type]
