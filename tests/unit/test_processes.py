"""Processes: found by their mark, killed for certain, dead with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from keepstep.orchestrator.errors import InputError
from keepstep.orchestrator.processes import ENV_PARENT, ENV_SCRATCH, bury, is_alive, kill, signal_name, strays
from keepstep.orchestrator.scratch import MAX_REMEMBERED, Scratch, default_scratch

SLEEPER = [sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()"]


def start(command: list[str], **environment: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    return process


def end(*processes: subprocess.Popen[bytes]) -> None:
    for process in processes:
        process.kill()
        process.communicate()


def test_a_process_is_found_by_the_scratch_directory_in_its_environment() -> None:
    mine, other = f"/scratch/{uuid.uuid4()}", f"/scratch/{uuid.uuid4()}"
    found, ignored = start(SLEEPER, **{ENV_SCRATCH: mine}), start(SLEEPER, **{ENV_SCRATCH: other})
    try:
        assert strays(mine) == [found.pid]
    finally:
        end(found, ignored)


def test_bury_returns_when_everything_is_dead() -> None:
    scratch = f"/scratch/{uuid.uuid4()}"
    processes = [start(SLEEPER, **{ENV_SCRATCH: scratch}) for _ in range(3)]
    assert bury(scratch) == []
    assert not any(is_alive(process.pid) for process in processes)
    end(*processes)


def test_kill_waits_for_the_kernel_and_ignores_the_dead() -> None:
    process = start(SLEEPER)
    assert kill([process.pid]) == []
    assert not is_alive(process.pid)
    end(process)
    assert kill([process.pid]) == []


@pytest.mark.slow
def test_a_process_dies_with_the_parent_that_it_was_told() -> None:
    child = (
        "from keepstep.orchestrator.processes import die_with_parent_if_told; import os, signal;"
        "die_with_parent_if_told(); print(os.getpid(), flush=True); signal.pause()"
    )
    parent = (
        f"import subprocess, sys, os; os.environ[{ENV_PARENT!r}] = str(os.getpid());"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE);"
        "print(p.stdout.readline().decode(), flush=True, end=''); import signal; signal.pause()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert process.stdout
    pid = int(process.stdout.readline())
    pidfd = os.pidfd_open(pid)
    end(process)
    import select

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(5000), "the child outlived its parent"
    os.close(pidfd)


def test_signals_have_names() -> None:
    assert signal_name(-9) == "SIGKILL"
    assert signal_name(-signal.SIGTERM) == "SIGTERM"
    assert signal_name(-250) == "signal 250"


def test_a_scratch_directory_has_one_living_agent(tmp_path: Path) -> None:
    first, second = Scratch(tmp_path / "scratch"), Scratch(tmp_path / "scratch")
    first.lock()
    with pytest.raises(InputError, match="another agent lives there"):
        second.lock()


def test_a_scratch_directory_remembers_who_lived_there(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    assert scratch.begin("node#0001") == ()
    (tmp_path / "progress-000001-0").touch()
    assert scratch.begin("node#0002") == ("node#0001",)
    assert not (tmp_path / "progress-000001-0").exists()
    for i in range(MAX_REMEMBERED + 5):
        scratch.begin(f"node#1{i:03d}")
    assert len(scratch.begin("node#2000")) == MAX_REMEMBERED


def test_the_default_scratch_leaves_room_for_a_socket() -> None:
    path = default_scratch("s3://a-bucket-with-a-long-name/" + "x" * 300, "node17")
    assert len(str(path / "persister.sock")) < 107
    assert path != default_scratch("s3://other", "node17")


def test_what_does_not_fit_on_the_disk_is_lost_and_the_process_lives_on() -> None:
    program = (
        "from keepstep.orchestrator.processes import print_or_lose; import sys; print_or_lose(); print('x' * 99, flush=True); sys.exit(7)"
    )
    with open("/dev/full", "wb") as full:
        assert subprocess.run([sys.executable, "-c", program], stdout=full, stderr=full, check=False).returncode == 7
