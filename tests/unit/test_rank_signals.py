"""What a rank does with the signals that platforms send to every process of a job, and what its children and scripts see of that."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import multiprocessing, os, signal, subprocess, sys
from keepstep.orchestrator.forked import PLATFORM_SIGNALS, _leave_signals_to_the_agent

_leave_signals_to_the_agent()
for number in PLATFORM_SIGNALS:
    signal.raise_signal(number)

context = multiprocessing.get_context("fork")
worker = context.Process(target=signal.pause)
worker.start()
worker.terminate()
worker.join()
print("worker", worker.exitcode)

status = subprocess.run(["grep", "SigIgn", "/proc/self/status"], capture_output=True, text=True, check=True).stdout.split()
print("ignored by programs", [number.name for number in PLATFORM_SIGNALS if int(status[1], 16) >> (number - 1) & 1])

got = []
signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
signal.raise_signal(signal.SIGUSR1)
child = os.fork()
if child == 0:
    signal.raise_signal(signal.SIGUSR1)
    os._exit(len(got))
print("own handler", len(got), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_rank_lives_on_and_its_children_and_scripts_see_what_they_see_everywhere() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == [f"worker {-signal.SIGTERM}", "ignored by programs []", "own handler 1 2"]
