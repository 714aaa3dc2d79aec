"""Ranks that hang: noticed within seconds, named, their stacks kept; and the run ends with the bits of an undisturbed one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2e.live import LiveRun, Outcome

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]


def send_what_platforms_send(status: dict[str, Any]) -> None:
    """No rank dies of it: the agents decide."""
    for node in status["nodes"]:
        for rank in node["ranks"]:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
                os.kill(rank["pid"], number)


def stacks_of(run: LiveRun, attempt: int) -> dict[int, str]:
    folder = Path(run.root) / f"logs/attempt-{attempt:06d}"
    return {int(path.name[5:10]): path.read_text() for path in folder.glob("rank-*.stacks.txt")}


def test_ranks_that_hang_are_named_with_their_stacks_and_cost_no_bit(start: Start, undisturbed: Outcome, tmp_path: Path) -> None:
    """One is stopped from outside, one sleeps for ever in Python, one spins in native code that holds the interpreter's lock."""
    marks = [tmp_path / "hung", tmp_path / "spun"]
    faults = f"rank.step:rank=1:step=15:action=hang:once={marks[0]};rank.step:rank=2:step=20:action=spin:once={marks[1]}"
    run = start(faults=faults)
    status = run.wait_for_step(9)
    send_what_platforms_send(status)
    victim = status["nodes"][1]["ranks"][1]
    os.kill(victim["pid"], signal.SIGSTOP)
    assert run.wait() == 0, "\n".join(run.output[-60:]) + run.logs()
    run.check_what_always_holds()
    assert run.outcome() == undisturbed
    failures = run.result()["failures"]
    assert [failure["rank"] for failure in failures] == [victim["rank"], 1, 2]
    stopped, slept, spun = (failure["why"] for failure in failures)
    assert "its process is stopped" in stopped
    assert "faults.py" in slept
    assert "interpreter" in spun
    for attempt, failure in enumerate(failures, start=1):
        stacks = stacks_of(run, attempt)
        assert sorted(stacks) == [0, 1, 2, 3]
        assert all("most recent call first" in text for text in stacks.values())
        assert f"rank {failure['rank']} on" in stacks[failure["rank"]]
    assert "_spin" in stacks[2]
    assert "distributed" in stacks[0], "the others wait in a collective"
