"""A rank's pulse: what it says, and what it must not hold up."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from trainer_ranks import run_ranks, spec_of

from keepstep.trainer.attach import attach
from keepstep.trainer.contract import ENV_SPEC, PROGRESS_BYTES, Progress
from keepstep.trainer.pulse import Pulse, collectives_begun

POLL = threading.Event()  # never set
DEADLINE_S = 60.0


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        POLL.wait(0.01)


def test_it_beats_as_long_as_somebody_holds_the_page() -> None:
    held = [mmap.mmap(-1, PROGRESS_BYTES)]
    pulse = Pulse(held[0])
    pulse.start()
    until(lambda: Progress.read(held[0]).pulse_at > 0)
    first = Progress.read(held[0])
    until(lambda: Progress.read(held[0]).pulse_at > first.pulse_at)
    assert (first.collective, first.beats, first.at) == (collectives_begun(), 0, 0), "it leaves alone what the rank reports"
    held.clear()
    gc.collect()
    pulse.join(DEADLINE_S)
    assert not pulse.is_alive()


ATTACHED = """
import os, sys
from keepstep.trainer.attach import attach
me = attach()
child = os.fork()
if child == 0:
    import threading
    print([thread.name for thread in threading.enumerate()], flush=True)
    os._exit(0)
os.waitpid(child, 0)
assert "torch" not in sys.modules
"""


@pytest.mark.slow
def test_it_keeps_no_process_from_ending_stays_out_of_forked_children_and_needs_no_torch(tmp_path: Path) -> None:
    environment = {**os.environ, ENV_SPEC: spec_of(tmp_path, 0, 1, None).to_json()}
    command = [sys.executable, "-W", "ignore", "-c", ATTACHED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    assert done.stdout.strip() == "['MainThread']"


HOLDS_THE_LOCK = """
import sys
from collections import deque
from itertools import repeat
from keepstep.trainer.attach import attach
me = attach()
print("attached", flush=True)
sys.stdin.readline()
deque(repeat(None), maxlen=0)
"""


@pytest.mark.slow
def test_a_stopped_process_and_one_whose_native_code_holds_the_lock_have_none(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, 0, 1, None)
    environment = {**os.environ, ENV_SPEC: spec.to_json()}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS_THE_LOCK], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdin
        assert process.stdout.readline() == "attached\n"

        def pulse_s() -> float:
            return time.monotonic() - Progress.read(Path(spec.progress_path).read_bytes()).pulse_at

        until(lambda: pulse_s() < 0.2)
        process.send_signal(signal.SIGSTOP)
        until(lambda: pulse_s() > 0.5)
        process.send_signal(signal.SIGCONT)
        until(lambda: pulse_s() < 0.2)
        process.stdin.write("\n")
        process.stdin.flush()
        until(lambda: pulse_s() > 0.5)
        process.kill()


def waits_for_a_peer(rank: int, world_size: int, root: str) -> None:
    """Rank 1 comes to the second collective only when rank 0's page says that it is in there."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    os.environ[ENV_SPEC] = spec_of(Path(root), rank, 1, None).to_json()
    me = attach()
    dist.barrier()
    if rank == 1:
        pages = [Path(root) / f"scratch/progress-1-{i}" for i in range(2)]
        until(lambda: Progress.read(pages[0].read_bytes()).collective == 2)
        until(lambda: Progress.read(pages[1].read_bytes()).collective == 1)
    dist.all_reduce(torch.ones(1))
    assert collectives_begun() == 2
    del me


@pytest.mark.slow
def test_the_rank_that_does_not_come_has_begun_fewer_collectives_than_those_that_wait_for_it(tmp_path: Path) -> None:
    run_ranks(2, waits_for_a_peer, str(tmp_path))
