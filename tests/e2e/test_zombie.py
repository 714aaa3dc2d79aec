"""A node that everybody believes dead comes back to life in the middle of a write: it changes nothing."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2e.live import LiveRun, Outcome, is_stopped, poll_until
from keepstep.storage.records import Attempt, Commit
from keepstep.storage.runlog import RunLog

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]
POINT = "persister.shards.middle:rank=3:signal=STOP"


def processes_of(run: LiveRun, agent: int) -> list[int]:
    """Everything that lives on the agent's node: what carries the same scratch directory in its environment."""
    return [pid for pid in run.marked() if scratch_of(pid) == scratch_of(agent) != b""]


def scratch_of(pid: int) -> bytes:
    """What the process's own environment says, or for an agent, which sets it for its children, what its command says."""
    with contextlib.suppress(OSError):  # gone
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"--scratch" in command:
            return command[command.index(b"--scratch") + 1]
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return next((value.partition(b"=")[2] for value in variables if value.startswith(b"KEEPSTEP_SCRATCH=")), b"")
    return b""


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def node_of_rank(status: dict[str, Any], rank: int) -> dict[str, Any]:
    found: dict[str, Any] = next(node for node in status["nodes"] if any(of["rank"] == rank for of in node["ranks"]))
    return found


def test_a_node_stopped_while_it_writes_and_continued_after_its_replacement(start: Start, undisturbed: Outcome, tmp_path: Path) -> None:
    order = tmp_path / "stop"
    run = start("cluster.spares=1", faults=f"{POINT}:when={order}")
    node = node_of_rank(run.wait_for_step(7), 3)
    order.touch()
    poll_until(lambda: any(map(is_stopped, run.marked())), "the persister reached its point")
    zombies = processes_of(run, node["pid"])
    assert len(zombies) >= 4, "an agent, its persister and two ranks"
    send(zombies, signal.SIGSTOP)
    run.wait_until(lambda status: status["attempt"] == 2 and status["phase"] == "TRAINING")
    attempt = RunLog.open(run.store).newest_attempt()
    assert attempt
    assert node["id"] not in attempt.nodes, "a spare took its place"
    before = written_by(run, attempt=2)
    send(zombies, signal.SIGCONT)
    assert run.wait() == 0, "\n".join(run.output[-60:]) + run.logs()
    run.check_what_always_holds()
    assert run.outcome() == undisturbed
    assert commits_after_attempt(run, 2) == {2}, "the zombie committed something"
    after = written_by(run, attempt=2)
    assert all(after.get(name, body) == body for name, body in before.items()), "the zombie wrote into its successor's checkpoint"


def written_by(run: LiveRun, attempt: int) -> dict[str, bytes]:
    """Name -> bytes of every whole file that an attempt has written."""
    folder = Path(run.root) / "data" / f"a{attempt:06d}"
    directories = [path.parent for path in folder.rglob("MANIFEST.json")]
    return {str(path): path.read_bytes() for directory in directories for path in directory.iterdir()}


def commits_after_attempt(run: LiveRun, number: int) -> set[int]:
    """The attempts that committed after attempt `number` began."""
    records = list(RunLog.read_all(run.store).records)
    began = next(index for index, record in enumerate(records) if isinstance(record, Attempt) and record.attempt == number)
    return {record.attempt for record in records[began:] if isinstance(record, Commit)}
