"""Hosts with addresses of their own whose network breaks: found in time, never two attempts at once, and the bits of an undisturbed run."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest
from s3server import running_s3_server

from e2e.hosts import HostedRun, Status, lab_or_skip, ranks_of, watch_deaths
from e2e.live import POLL, Outcome, poll_until
from keepstep.orchestrator.lab import Host, Lab
from keepstep.storage.records import Attempt, Commit
from keepstep.storage.runlog import RunLog

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

EXIT_REQUEUE = 75
LEASE_S = 3.0
SHORT_S = LEASE_S / 3  # no reason to do anything
PATIENT = (f"cluster.lease_s={LEASE_S}", "checkpoint.interval=2", "cluster.listen=0.0.0.0:0")


@pytest.fixture
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path]:
    return (tmp_path_factory.getbasetemp(),)


def test_one_run_meets_every_fault_of_a_network(config_file: Path, tmp_path: Path, shared: tuple[Path], undisturbed: Outcome) -> None:
    """Its root is a folder that every host reaches, whatever happens to its cable."""
    lab_or_skip()
    with Lab(7, shared=shared) as lab:
        overrides = (*PATIENT, "cluster.nodes=4", "cluster.ranks_per_node=1")
        run = HostedRun(config_file, str(tmp_path / "root"), overrides, scratch=tmp_path)
        try:
            meet_every_fault(run, lab)
            ends_like(run, undisturbed)
        finally:
            run.end()


def meet_every_fault(run: HostedRun, lab: Lab) -> None:
    head, deputy, *nodes = lab.hosts
    run.prepare().coordinate(head)
    run.join(*nodes[:2], url=run.url())
    run.join(*nodes[2:])
    status = run.wait_for_step(1)
    a_cable_that_flaps_changes_nothing(run, status, nodes[0])
    who_does_not_reach_the_coordinator_is_replaced(run, head, nodes, rank=1, deaf=False)
    who_does_not_reach_the_coordinator_is_replaced(run, head, nodes, rank=2, deaf=True)
    two_that_do_not_reach_each_other_are_noticed(run, nodes)
    a_successor_on_another_host_adopts_the_attempt(run, head, deputy)
    a_rival_on_a_third_host_fences_the_second(run, head)
    a_power_cut_costs_one_host(run, nodes)


def a_cable_that_flaps_changes_nothing(run: HostedRun, status: Status, host: Host) -> None:
    for _ in range(3):
        host.cut()
        POLL.wait(SHORT_S)
        host.heal()
        POLL.wait(SHORT_S)
    assert_the_same_ranks_go_on(run, status)


def who_does_not_reach_the_coordinator_is_replaced(run: HostedRun, head: Host, nodes: Sequence[Host], *, rank: int, deaf: bool) -> None:
    """One direction is enough: TCP needs both. The node still reads the log, and there, that it was replaced; later it comes back."""
    status = run.wait_for_step(2)
    host = on_which(nodes, status, rank)
    broken_at = time.monotonic()
    sender, receiver = (head, host) if deaf else (host, head)
    sender.drop(to=receiver)
    assert_replaced(run, status, nodes, host, broken_at)
    sender.clear()
    run.wait_until(lambda now: any(node["host"] == host.name and node["state"] == "ready" for node in now["nodes"]))


def two_that_do_not_reach_each_other_are_noticed(run: HostedRun, nodes: Sequence[Host]) -> None:
    """Both reach their coordinator, and each waits for what the other sent."""
    status = run.wait_for_step(4)
    one, other = on_which(nodes, status, 0), on_which(nodes, status, 1)
    one.drop(to=other)
    other.drop(to=one)
    run.wait_until(lambda now: now["attempt"] > status["attempt"] or now["phase"] != "TRAINING")
    one.clear()
    other.clear()
    run.wait_for_step(5, attempt=status["attempt"] + 1)


def a_successor_on_another_host_adopts_the_attempt(run: HostedRun, head: Host, deputy: Host) -> None:
    """Two nodes were told the lost coordinator's URL, the others the root."""
    status = run.wait_for_step(6)
    run.slow_down("crawl")  # they go on while there is none, and must not be done before there is one
    head.kill()
    run.coordinate(deputy, name="deputy")
    run.wait_until(lambda now: now["coordinator"]["term"] == 2)
    assert_the_same_ranks_go_on(run, status)


def a_rival_on_a_third_host_fences_the_second(run: HostedRun, third: Host) -> None:
    status = run.wait_for_step(7)
    deputy = run.parts["deputy"]
    third.boot()
    run.coordinate(third, name="rival")
    assert deputy.wait() == EXIT_REQUEUE, run.said()
    assert_the_same_ranks_go_on(run, status)


def a_power_cut_costs_one_host(run: HostedRun, nodes: Sequence[Host]) -> None:
    status = run.wait_for_step(8)
    run.hurry()
    run.slow_down("slow")
    host = on_which(nodes, status, 3)
    broken_at = time.monotonic()
    host.kill()
    run.wait_for_step(status["step"], attempt=status["attempt"] + 1)
    assert_found_in_time(run, host, broken_at)


@pytest.mark.s3
def test_hosts_that_lose_coordinator_and_storage_at_once(
    config_file: Path, shared: tuple[Path], tmp_path: Path, undisturbed: Outcome
) -> None:
    """Both are outside; a node whose cable is cut sees neither, and must stop by itself."""
    lab_or_skip()
    with Lab(3, shared=shared) as lab, running_s3_server(address=lab.gateway) as server:
        run = HostedRun(
            config_file,
            f"{server.url}/{uuid.uuid4().hex}",
            PATIENT,
            environment=server.environment,
            options=server.options,
            scratch=tmp_path,
        )
        try:
            last = lose_both(run, lab)
            ends_like(run, undisturbed)
            assert attempts_committed_since(run, last) == {last}, "the zombie committed something"
        finally:
            run.end()


def lose_both(run: HostedRun, lab: Lab) -> int:
    run.overrides = (*run.overrides, f"cluster.listen={lab.gateway}:0")
    run.prepare().coordinator("coordinator")
    run.join(*lab.hosts)
    status = run.wait_for_step(2)
    host = on_which(lab.hosts, status, 1)
    broken_at = time.monotonic()
    host.cut()
    assert_replaced(run, status, lab.hosts, host, broken_at)
    host.heal()
    run.wait_until(lambda status: any(node["host"] == host.name and node["state"] == "ready" for node in status["nodes"]))
    return a_host_thaws_after_its_replacement(run, lab.hosts)


def a_host_thaws_after_its_replacement(run: HostedRun, hosts: Sequence[Host]) -> int:
    """Returns the attempt that replaced it."""
    status = run.wait_for_step(5)
    host = on_which(hosts, status, 2)
    broken_at = time.monotonic()
    host.freeze()
    run.wait_for_step(6, attempt=status["attempt"] + 1)
    assert_found_in_time(run, host, broken_at)
    zombies = ranks_of(status, [host])
    watch_deaths(zombies)
    host.thaw()
    run.wait_until(lambda _: all(rank.has_ended for rank in zombies))
    return status["attempt"] + 1


def attempts_committed_since(run: HostedRun, number: int) -> set[int]:
    records = list(RunLog.read_all(run.store).records)
    began = next(index for index, record in enumerate(records) if isinstance(record, Attempt) and record.attempt == number)
    return {record.attempt for record in records[began:] if isinstance(record, Commit)}


def assert_replaced(run: HostedRun, status: Status, hosts: Sequence[Host], lost: Host, broken_at: float) -> None:
    """Found in time, and its ranks were dead before the next attempt was launched (its processes may have waited for that)."""
    old = ranks_of(status, [lost])
    watch_deaths(old)
    now = run.wait_for_step(status["step"], attempt=status["attempt"] + 1)
    new = ranks_of(now, [host for host in hosts if host is not lost])
    assert len(new) == 4
    launches = lambda: [event["at_s"] for event in run.told("starting") if event["attempt"] == now["attempt"]]  # noqa: E731
    poll_until(lambda: bool(launches()), "the launch is in the event file", run.said)
    assert all(rank.ended_at <= min(launches()) for rank in old), "two attempts at once"
    assert_found_in_time(run, lost, broken_at)


def assert_found_in_time(run: HostedRun, lost: Host, broken_at: float) -> None:
    failure = run.told("failure")[-1]
    assert f"lost {lost.name}#" in failure["why"]
    assert failure["at_s"] - broken_at < LEASE_S + 3


def assert_the_same_ranks_go_on(run: HostedRun, status: Status) -> None:
    now = run.wait_until(lambda now: now["phase"] == "TRAINING" and now["step"] > status["step"])
    assert seats(now) == seats(status), run.said()


def seats(status: Status) -> dict[int, tuple[str, int]]:
    """Rank -> where it runs, and its pid there."""
    return {rank["rank"]: (node["id"], rank["pid"]) for node in status["nodes"] if node["state"] == "running" for rank in node["ranks"]}


def on_which(hosts: Sequence[Host], status: Status, rank: int) -> Host:
    node, _ = seats(status)[rank]
    return next(host for host in hosts if node.startswith(f"{host.name}#"))


def ends_like(run: HostedRun, undisturbed: Outcome) -> None:
    run.hurry()
    assert run.wait() == 0, run.said()
    run.check_what_always_holds()
    assert run.outcome() == undisturbed
