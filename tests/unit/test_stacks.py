"""Stacks of ranks that hang: real small processes that sleep, spin, stand still, or know nothing of the signal."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keepstep.orchestrator.processes import is_alive
from keepstep.orchestrator.stacks import ANSWER_S, SIGNAL, Frame, Stacks, Subject, answer_path, parse, parse_spied, state, take

PROGRAM = """
import signal, sys, threading
from collections import deque
from itertools import repeat
from pathlib import Path
from keepstep.orchestrator.stacks import answer_to

def sleeping():
    print("up", flush=True)
    threading.Event().wait()

def spinning():
    print("up", flush=True)
    deque(repeat(None), maxlen=0)

threading.Thread(target=threading.Event().wait, daemon=True).start()
if sys.argv[1]:
    answer_to(Path(sys.argv[1]))
{"sleeping": sleeping, "spinning": spinning}[sys.argv[2]]()
"""
HAS_PY_SPY = (Path(sysconfig.get_path("scripts")) / "py-spy").exists()

Begin = Callable[..., Subject]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Processes that are killed afterwards."""
    processes: list[subprocess.Popen[str]] = []
    program = tmp_path / "rank.py"
    program.write_text(PROGRAM)

    def start(what: str, *, answers: bool = True) -> Subject:
        path = answer_path(tmp_path, 1, len(processes))
        command = [sys.executable, str(program), str(path) if answers else "", what]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout
        assert processes[-1].stdout.readline() == "up\n"
        return Subject(processes[-1].pid, path)

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def functions(stacks: Stacks) -> list[str]:
    return [frame.function for frame in stacks.main]


@pytest.mark.slow
async def test_a_rank_that_sleeps_and_one_whose_native_code_holds_the_lock_answer_at_the_same_time(begin: Begin) -> None:
    subjects = begin("sleeping"), begin("spinning")
    sleeping, spinning = await take(subjects)
    assert functions(sleeping)[-2:] == ["sleeping", "<module>"]
    assert functions(spinning) == ["spinning", "<module>"]
    assert sleeping.text.count("most recent call first") == 2, "all threads are there"
    assert spinning.where.endswith("spinning")
    assert not sleeping.waits
    again, _ = await take(subjects)
    assert functions(again) == functions(sleeping)
    assert all(is_alive(subject.pid) for subject in subjects)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PY_SPY or os.geteuid() != 0, reason="py-spy may attach as root only")
async def test_a_stopped_rank_is_read_from_outside(begin: Begin) -> None:
    stopped = begin("sleeping")
    os.kill(stopped.pid, signal.SIGSTOP)
    while state(stopped.pid) != "T":
        await asyncio.sleep(0)
    (stacks,) = await take([stopped])
    assert functions(stacks)[-2:] == ["sleeping", "<module>"]
    assert "state T" in stacks.text
    assert "py-spy" in stacks.text


@pytest.mark.slow
async def test_a_process_that_does_not_know_the_signal_is_not_killed_by_it(begin: Begin) -> None:
    other = begin("sleeping", answers=False)
    await take([other])
    assert is_alive(other.pid)


async def test_a_dead_rank_costs_no_time(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    async with asyncio.timeout(ANSWER_S * 4):
        (stacks,) = await take([Subject(process.pid, tmp_path / "none")])
    assert (stacks.where, stacks.waits) == ("", False)
    assert "gone" in stacks.text


FAULTHANDLER = """main thread 0x00007fbf0aa04b80
Thread 0x00007fbf09dc56c0 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 982 in run

Current thread 0x00007fbf0aa04b80 (most recent call first):
  File "/site-packages/torch/distributed/distributed_c10d.py", line 4100 in all_gather_into_tensor
  File "/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/keepstep/trainer/parallel.py", line 40 in gather
  File "/keepstep/trainer/loop.py", line 100 in agree
  File "/keepstep/trainer/loop.py", line 30 in train
"""


def test_the_main_threads_stack_says_where_it_stands_and_that_it_waits() -> None:
    stacks = parse(FAULTHANDLER)
    assert len(stacks.main) == 5
    assert stacks.where == "loop.py:100 agree > parallel.py:40 gather > distributed_c10d.py:4100 all_gather_into_tensor"
    assert stacks.waits


def test_half_an_answer_is_none() -> None:
    assert parse(FAULTHANDLER[: FAULTHANDLER.index("Current")]).main == ()
    assert parse("") == Stacks("")


@pytest.mark.parametrize(
    ("files", "waits"),
    [
        (["/x/torch/_ops.py", "/x/torch/distributed/_functional_collectives.py", "/u/train.py"], True),
        (["/x/torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py", "/u/train.py"], True),
        (["/u/train.py", "/x/torch/distributed/distributed_c10d.py"], False),
        (["/x/torch/nn/modules/linear.py", "/x/torch/distributed/fsdp/fully_sharded_data_parallel.py"], False),
        (["/x/torch/distributed/checkpoint/filesystem.py", "/u/train.py"], False),
        (["/usr/lib/python3.11/threading.py", "/x/torch/utils/data/dataloader.py"], False),
        ([], False),
    ],
)
def test_only_torchs_own_waits_for_other_ranks_count(files: list[str], waits: bool) -> None:
    assert Stacks("", tuple(Frame(file, 1, "f") for file in files)).waits is waits


def test_what_py_spy_says_is_read_alike() -> None:
    body = (
        b'[{"pid": 7, "thread_name": null, "os_thread_id": 8, "frames": []}, {"pid": 7, "thread_name": "MainThread", "os_thread_id": 7,'
        b' "frames": [{"name": "inner", "filename": "/u/train.py", "line": 4, "locals": null}]}]'
    )
    stacks = parse_spied(body, 7)
    assert stacks.main == (Frame("/u/train.py", 4, "inner"),)
    assert 'File "/u/train.py", line 4 in inner' in stacks.text


def test_the_signal_is_nobody_elses() -> None:
    assert SIGNAL not in set(signal.Signals) | {32, 33, 62, 64}
