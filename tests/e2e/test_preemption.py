"""Nodes that are taken away with notice: one step boundary for all ranks, a commit, then the run goes on elsewhere or is queued again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from metadata_server import MetadataServer

from e2e.live import LiveRun, Outcome, is_stopped, poll_until
from e2e.parts import PartedRun
from keepstep.orchestrator.processes import is_alive
from keepstep.storage.runlog import RunLog

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]
EXIT_REQUEUE = 75
WORKERS = "train.loader_workers=2"
PATIENT = "cluster.hang_s=100"  # a rank is stopped by the test, so that a notice finds the run in the middle


def pause_at(step: int, marker: Path) -> str:
    """A fault: rank 1 stands still after this step, once."""
    return f"rank.step:rank=1:step={step}:signal=STOP:once={marker}"


def wait_for_pause(run: LiveRun) -> int:
    poll_until(lambda: bool(stopped(run)), "a rank stands still")
    (pid,) = stopped(run)
    return pid


def stopped(run: LiveRun) -> list[int]:
    return [pid for pid in run.marked() if is_stopped(pid)]


@pytest.fixture
def server() -> Iterator[MetadataServer]:
    with MetadataServer() as server:
        yield server


@pytest.fixture
def parted(config_file: Path, tmp_path: Path, short_folder: Path) -> Iterator[PartedRun]:
    run = PartedRun(config_file, str(tmp_path / "root"), scratch=short_folder)
    yield run
    run.end()


def commits(run: LiveRun) -> list[int]:
    return [commit.step for commit in RunLog.open(run.store).lineage.commits]


def test_with_spares_nothing_is_lost_whoever_says_that_a_node_must_go(
    parted: PartedRun, undisturbed: Outcome, server: MetadataServer, tmp_path: Path
) -> None:
    """SIGUSR1 takes the first node at step 8, AWS takes the other one at step 14. Both have more time than the test has patience."""
    parted.overrides = ("cluster.spares=2", 'cluster.notices=["aws"]', WORKERS, PATIENT)
    parted.prepare()
    coordinator = parted.coordinator("coordinator")
    faults = {"KEEPSTEP_FAULTS": f"{pause_at(8, tmp_path / 'first')};{pause_at(14, tmp_path / 'second')}", "KEEPSTEP_GRACE_S": "3600"}
    deaf = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:9"}
    agents = {"node0": faults | deaf, "node1": faults | server.environment, "node2": faults | deaf, "node3": faults | deaf}
    parts = {name: parted.agent(name, environment) for name, environment in list(agents.items())[:2]}
    parted.wait_for_step(1)
    parts |= {name: parted.agent(name, environment) for name, environment in list(agents.items())[2:]}
    paused = wait_for_pause(parted)
    parted.wait_until(lambda status: sum(node["state"] == "ready" for node in status["nodes"]) == 2)

    parts["node0"].process.send_signal(signal.SIGUSR1)
    parts["node0"].process.send_signal(signal.SIGUSR1)  # twice is once
    poll_until(lambda: any("this node must go: got SIGUSR1, 3600 s are left" in line for line in parts["node0"].output), "it knows")
    os.kill(paused, signal.SIGCONT)
    assert parts["node0"].wait() == EXIT_REQUEUE, parted.said()

    paused = wait_for_pause(parted)
    server.interrupt_aws(170)
    poll_until(lambda: any("must go: aws: terminate in" in line for line in parts["node1"].output), "it knows")
    os.kill(paused, signal.SIGCONT)
    assert parts["node1"].wait() == EXIT_REQUEUE, parted.said()

    assert coordinator.wait() == 0, parted.said()
    parted.check_what_always_holds()
    assert parted.outcome() == undisturbed
    result = parted.result()
    assert (result["attempts"], result["failures"], result["lost_steps"]) == (3, [], 0)
    assert any("no answer from http://127.0.0.1:9" in line for line in parts["node2"].output), "named once, and no notice"


def both_nodes_know(run: LiveRun, times: int) -> bool:
    return run.logs().count("this node must go") == 2 * times


def test_without_spares_the_run_ends_with_75_and_the_same_command_continues(
    start: Start, undisturbed: Outcome, server: MetadataServer, tmp_path: Path
) -> None:
    """A file takes both nodes at step 8, Google takes both at step 14, then nobody does."""
    root, notice = str(tmp_path / "root"), tmp_path / "notice"
    overrides = (f'cluster.notices=["file:{notice}", "gcp"]', WORKERS, PATIENT)
    announcements = {8: lambda: notice.write_text("in 3600\nrack 4 goes down"), 14: server.preempt_gcp}
    for times, (step, announce) in enumerate(announcements.items(), start=1):
        run = start(*overrides, root=root, environment=server.environment, faults=pause_at(step, tmp_path / f"at-{step}"))
        paused = wait_for_pause(run)
        announce()
        poll_until(partial(both_nodes_know, run, times), "both nodes know")
        os.kill(paused, signal.SIGCONT)
        assert run.wait() == EXIT_REQUEUE, "\n".join(run.output) + run.logs()
        run.check_what_always_holds()
        assert commits(run)[-1] >= step
        notice.unlink(missing_ok=True)
    last = start(overrides[1], root=root)
    assert last.wait() == 0, "\n".join(last.output) + last.logs()
    last.check_what_always_holds()
    assert last.outcome() == undisturbed
    assert (last.result()["lost_steps"], last.result()["failures"]) == (0, [])


def test_a_grace_that_is_too_short_costs_steps_but_no_commit_and_no_time(parted: PartedRun, undisturbed: Outcome, tmp_path: Path) -> None:
    """Node 0 has 0.2 s while a rank stands still; then node 1 has 2 s, but its persister does not write any more."""
    parted.overrides = ("cluster.spares=2", WORKERS, PATIENT, "cluster.lease_s=10")
    parted.prepare()
    coordinator = parted.coordinator("coordinator")
    rank_stops, writer_stops = pause_at(8, tmp_path / "rank"), f"persister.shards.before:attempt=2:signal=STOP:once={tmp_path / 'writer'}"
    names = ("node0", "node1", "node2", "node3")
    graces = {"node0": "0.2", "node1": "2"}
    faults = {name: f"{rank_stops};{writer_stops}" if name == "node1" else rank_stops for name in names}
    parts = {name: parted.agent(name, {"KEEPSTEP_FAULTS": faults[name], "KEEPSTEP_GRACE_S": graces.get(name, "")}) for name in names[:2]}
    parted.wait_for_step(1)
    parts |= {name: parted.agent(name, {"KEEPSTEP_FAULTS": faults[name]}) for name in names[2:]}
    wait_for_pause(parted)
    parted.wait_until(lambda status: sum(node["state"] == "ready" for node in status["nodes"]) == 2)
    parts["node0"].process.send_signal(signal.SIGTERM)
    assert parts["node0"].wait() == EXIT_REQUEUE, parted.said()
    assert commits(parted) == [6]

    paused = wait_for_pause(parted)  # the persister of node 1
    parts["node1"].process.send_signal(signal.SIGTERM)
    assert parts["node1"].wait() == EXIT_REQUEUE, parted.said()
    assert not is_alive(paused)

    assert coordinator.wait() == 0, parted.said()
    parted.check_what_always_holds()
    assert parted.outcome() == undisturbed
    assert parted.result()["lost_steps"] >= 2
