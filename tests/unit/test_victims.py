"""Whoever breaks a run hits the processes of that run, and no other."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from keepstep.orchestrator.faultkinds import KINDS, AtStep, Fault
from keepstep.orchestrator.processes import ENV_SCRATCH
from keepstep.orchestrator.victims import CannotBreak, close, hold, resume, send, victim

SCRATCH = "/nowhere/node1"


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """One that carries a node's mark."""
    with subprocess.Popen(["sleep", "60"], env={**os.environ, ENV_SCRATCH: SCRATCH}) as started:
        yield started
        started.kill()


def status(**first: Any) -> dict[str, Any]:
    """Two nodes with two ranks each."""
    ranks = [{"rank": rank, "pid": 100 + rank, "phase": "step"} for rank in range(4)]
    nodes = [{"id": f"node{i}#aa", "pid": 50 + i, "state": "running", "ranks": ranks[2 * i : 2 * i + 2]} for i in range(2)]
    return {"nodes": [nodes[0] | first, nodes[1]]}


def fault(name: str, **where: Any) -> Fault:
    return Fault(kind=KINDS[name], moment=AtStep(1), **({"rank": 0} | where))


def test_a_process_with_the_mark_is_hit(process: subprocess.Popen[bytes]) -> None:
    held = hold(process.pid, SCRATCH.encode())
    send([held], signal.SIGKILL)
    close([held])
    assert process.wait(10) == -signal.SIGKILL


def test_a_process_that_is_not_the_one_is_never_hit(process: subprocess.Popen[bytes]) -> None:
    """Not even one whose mark only begins alike."""
    for mark in (b"/nowhere/node", b"/nowhere/node10", b"another"):
        with pytest.raises(CannotBreak, match="is not the process that the status spoke of"):
            hold(process.pid, mark)


def test_what_has_ended_meanwhile_is_no_matter(process: subprocess.Popen[bytes]) -> None:
    held = hold(process.pid, SCRATCH.encode())
    process.kill()
    process.wait(10)
    resume([held])
    with pytest.raises(CannotBreak):
        hold(process.pid, SCRATCH.encode())


def test_nobody_may_be_meant_by_a_pid_that_means_many() -> None:
    with pytest.raises(AssertionError):
        hold(0)


def test_a_fault_finds_its_rank_and_the_node_that_runs_it() -> None:
    node, rank = victim(fault("kill-rank", rank=2), status())
    assert rank
    assert (node["id"], rank["pid"]) == ("node1#aa", 102)
    node, rank = victim(fault("kill-node", rank=2, node="node0"), status())
    assert (node["id"], rank) == ("node0#aa", None)


def test_a_lost_node_and_a_rank_that_has_ended_are_no_victims() -> None:
    ended = [{"rank": 0, "pid": 100, "phase": "exited"}]
    for first in ({"state": "lost"}, {"ranks": ended}):
        with pytest.raises(CannotBreak, match="kill-rank 0: nobody of that name is there"):
            victim(fault("kill-rank"), status(**first))
