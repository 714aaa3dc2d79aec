"""An agent's ranks: stacks before kills, last words with failures. Small real processes stand in for ranks."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from keepstep.orchestrator import node as nodes
from keepstep.orchestrator import reserve
from keepstep.orchestrator.exits import Exit
from keepstep.orchestrator.forked import Program
from keepstep.orchestrator.node import NodeRanks, NodeSettings
from keepstep.orchestrator.patience import Patience
from keepstep.orchestrator.ranks import UNKNOWN_CODE, GroupSpec
from keepstep.orchestrator.sections import RunConfig
from keepstep.orchestrator.stacks import answer_path, state
from keepstep.orchestrator.wire import Launch, RankReport, StoreAddress
from keepstep.storage.layout import rank_stacks_key
from keepstep.storage.store import Store

pytestmark = pytest.mark.slow

ATTEMPT = 3
PROGRAM = """
import sys
from pathlib import Path
from keepstep.orchestrator.stacks import answer_to

def wait_for_orders():
    print("last words", file=sys.stderr, flush=True)
    print("up", flush=True)
    sys.exit(int(sys.stdin.readline()))

answer_to(Path(sys.argv[1]))
wait_for_orders()
"""


class Forked:
    """A `Launcher` without processes."""

    def __init__(self, num_ranks: int, program: Program, scratch: str, *, ahead: bool) -> None: ...


class Group:
    """What `RankGroup` does, with processes that end when they are told a code."""

    def __init__(self, group: GroupSpec, launcher: Forked, tether: None) -> None:
        self.specs = group.specs
        self.processes = [self._start(spec.scratch, spec.attempt, i, group.log_paths[i]) for i, spec in enumerate(group.specs)]
        self.pids = tuple(process.pid for process in self.processes)
        self.sentinels = {os.pidfd_open(pid): i for i, pid in enumerate(self.pids)}
        self.stopped: set[int] = set()
        self.launcher_pid = 1
        self.lost_launcher = False
        newest.append(self)

    def _start(self, scratch: str, attempt: int, local_rank: int, log: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, str(answer_path(scratch, attempt, local_rank))]
        with open(log, "w") as errors:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        return process

    def order(self, local_rank: int, code: int) -> None:
        stdin = self.processes[local_rank].stdin
        assert stdin
        stdin.write(f"{code}\n")
        stdin.flush()

    def ended(self, local_rank: int) -> Exit | None:
        code = self.processes[local_rank].poll()
        if self.lost_launcher:
            return Exit(UNKNOWN_CODE, "signal", "the death of its launcher", "")
        return None if code is None else Exit(code, ("" if code == 0 else "signal" if code < 0 else "exit"), f"exit code {code}", "")

    def kill(self) -> None:
        for local_rank, process in enumerate(self.processes):
            if process.poll() is None:
                self.stopped.add(local_rank)
                process.kill()

    def was_stopped(self, local_rank: int) -> bool:
        return local_rank in self.stopped

    def close(self) -> None:
        self.kill()
        for process in self.processes:
            process.communicate()
        for sentinel in self.sentinels:
            os.close(sentinel)


newest: list[Group] = []


def launch_of(attempt: int, **fields: Any) -> Launch:
    return Launch(
        attempt=attempt,
        nonce="ab",
        first_rank=4,
        num_ranks=2,
        group_rank=0,
        num_nodes=1,
        world_size=2,
        store_node="n#1",
        store=StoreAddress(attempt=attempt, host="127.0.0.1", port=1),
        resume=None,
        **fields,
    )


@pytest.fixture
async def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[NodeRanks]:
    """Two ranks that run."""
    monkeypatch.setattr(nodes, "RankGroup", Group)
    monkeypatch.setattr(reserve, "Launcher", Forked)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    settings = NodeSettings(
        run="test",
        root=str(tmp_path / "root"),
        program=Program(),
        scratch=scratch,
        address="127.0.0.1",
        config_path=scratch / "config.json",
        staging_socket=scratch / "socket",
        config=RunConfig(),
    )
    made = NodeRanks("n#1", settings, Store.open(tmp_path / "root"), Patience(4.0), lambda: None)
    await made.pursue(launch_of(ATTEMPT))
    yield made
    await made.stop()
    newest.pop().close()


async def test_the_ranks_config_is_the_agents_with_the_overrides_of_the_launch(tmp_path: Path, node: NodeRanks) -> None:
    path = tmp_path / "scratch" / "config.json"
    assert json.loads(path.read_text()) == RunConfig().model_dump(mode="json")
    overrides = ("optimizer.lr=0.5", "train.spike.budget=9")
    await node.pursue(launch_of(ATTEMPT + 1, overrides=overrides, skips=("3:4",)))
    told = json.loads(path.read_text())
    assert (told["optimizer"]["lr"], told["train"]["spike"]["budget"]) == (0.5, 9)
    assert all(spec.skips == ("3:4",) for spec in newest[-1].specs)
    newest.pop(0).close()


async def until_exited(node: NodeRanks, local_rank: int) -> RankReport:
    async with asyncio.timeout(30):
        while (report := node.reports()[local_rank]).state != "exited":
            await asyncio.sleep(0.005)
    return report


def stacks_in(node: NodeRanks, tmp_path: Path) -> list[str]:
    return [(tmp_path / "root" / rank_stacks_key(ATTEMPT, report.rank)).read_text() for report in node.reports()]


async def test_no_rank_is_killed_before_all_stacks_are_taken(node: NodeRanks, tmp_path: Path) -> None:
    group = newest[-1]
    os.kill(group.pids[0], signal.SIGSTOP)
    while state(group.pids[0]) != "T":
        await asyncio.sleep(0)
    answers = answer_path(tmp_path / "scratch", ATTEMPT, 1)
    autopsy = asyncio.create_task(node.autopsy(ATTEMPT))
    while "wait_for_orders" not in answers.read_text():
        await asyncio.sleep(0)
    group.order(1, 1)  # while the stopped one is still being read
    while not group.ended(1):
        await asyncio.sleep(0)
    assert autopsy.done() or not group.stopped
    await autopsy
    await until_exited(node, 0)
    stopped, failed = node.reports()
    assert (stopped.stopped_by_agent, stopped.process, failed.stopped_by_agent) == (True, "T", False)
    assert "wait_for_orders" in failed.where
    assert node.autopsied == ATTEMPT
    first, second = stacks_in(node, tmp_path)
    assert "rank 4 on n#1: phase INIT at step 0" in first
    assert "state T" in first
    assert "wait_for_orders" in second


async def test_a_launcher_that_ran_out_of_memory_is_why_its_ranks_died(node: NodeRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The OOM killer may choose the process that would have told how its rank ended."""
    group = newest[-1]
    monkeypatch.setattr(node._witness, "verdict", lambda pid: "SIGKILL by the kernel's OOM killer" if pid == group.launcher_pid else "")
    group.lost_launcher = True
    group.kill()
    for process in group.processes:  # both before the node hears of one: it would stop the other
        process.wait()
    group.stopped.clear()
    report = await until_exited(node, 0)
    assert (report.kind, report.why) == ("oom", "SIGKILL by the kernel's OOM killer")


async def test_an_autopsy_of_the_dead_is_over_at_once(node: NodeRanks) -> None:
    newest[-1].order(0, 1)
    await until_exited(node, 1)
    await node.autopsy(ATTEMPT)
    assert node.autopsied == ATTEMPT
    assert [report.where for report in node.reports()] == ["", ""]


async def test_an_autopsy_of_another_attempt_leaves_the_ranks_alone(node: NodeRanks) -> None:
    await node.autopsy(ATTEMPT + 1)
    assert node.running
    assert [report.where for report in node.reports()] == ["", ""]


async def test_a_failure_comes_with_its_last_words_and_ends_the_others(node: NodeRanks) -> None:
    newest[-1].order(1, 3)
    failed, stopped = await until_exited(node, 1), await until_exited(node, 0)
    assert (failed.exit_code, failed.exit_order, failed.tail) == (3, 0, ("last words",))
    assert (stopped.stopped_by_agent, stopped.tail) == (True, ())
