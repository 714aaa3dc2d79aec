"""Keeping out of the training's way: pace and heartbeats, with a clock of our own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.storage.background import HEARTBEAT_S, Heartbeat, Pace


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 5)), min_size=1))
def test_never_more_than_the_rate_after_the_first_block(asked: list[tuple[int, float]]) -> None:
    clock = Clock()
    pace, gone = Pace(100.0, clock, clock.sleep), 0
    for num_bytes, pause in asked:
        pace(num_bytes)
        assert gone <= 100.0 * clock.now + 1e-6, "what went before this block fits into the time"
        gone += num_bytes
        clock.now += pause


def test_a_rest_is_not_saved_up() -> None:
    clock = Clock()
    pace = Pace(100.0, clock, clock.sleep)
    clock.now = 50.0
    for _ in range(3):
        pace(100)
    assert clock.now == 52.0


def test_without_a_rate_nobody_waits() -> None:
    clock = Clock()
    pace = Pace(0, clock, clock.sleep)
    pace(1 << 40)
    pace(1 << 40)
    assert clock.now == 0.0


def test_a_heartbeat_tells_all_bytes_once_a_period() -> None:
    clock, told = Clock(), list[int]()
    beat = Heartbeat(told.append, clock)
    for _ in range(10):
        clock.now += 0.4 * HEARTBEAT_S
        beat(7)
    assert told == [21, 42, 63]


def test_stepping_back_reaches_the_process_and_its_group() -> None:
    code = (
        "import os; from pathlib import Path; from keepstep.storage.background import step_back; step_back(7);"
        "group = Path('/proc/self/autogroup');"
        "print(os.nice(0), os.getsid(0) == os.getpid(), group.read_text().split()[-1] if group.exists() else 7)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["7", "True", "7"]


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel does not group sessions")
def test_nobody_else_steps_back() -> None:
    """The group of whoever started it stays as it was."""
    before = Path("/proc/self/autogroup").read_text(), os.nice(0)
    subprocess.run([sys.executable, "-c", "from keepstep.storage.background import step_back; step_back(5)"], check=True)
    assert (Path("/proc/self/autogroup").read_text(), os.nice(0)) == before
