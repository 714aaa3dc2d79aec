"""Processes: found by their mark, killed for certain, dead with their parent."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pytest

from keepstep.orchestrator.errors import InputError
from keepstep.orchestrator.processes import (
    ENV_PARENT,
    ENV_SCRATCH,
    bury,
    is_alive,
    kill,
    kill_group,
    signal_name,
    strays,
    strays_of_ranks,
)
from keepstep.orchestrator.scratch import MAX_REMEMBERED, Scratch, default_scratch

SLEEPER = [sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()"]


def start(command: list[str], **environment: str) -> subprocess.Popen[bytes]:
    """Returns once it is up: that is what its first line says."""
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


@pytest.mark.parametrize("torn", [b"", b"[", b"\0" * 64, b"\xff\xfe", b"7", b'{"a": 1}'])
def test_a_torn_memory_hinders_nobody(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / "incarnations.json").write_bytes(torn)
    (tmp_path / "incarnations.json.new").write_bytes(torn)
    assert Scratch(tmp_path).begin("node#0001") == ()
    assert Scratch(tmp_path).begin("node#0002") == ("node#0001",)


def test_what_a_predecessor_left_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "pymp-killed").mkdir()
    (tmp_path / "pymp-killed" / "listener-killed").touch()
    scratch = Scratch(tmp_path)
    scratch.gather_temporary_files()
    assert list(tmp_path.glob("pymp-*")) == []


def test_the_forkservers_socket_lies_in_the_scratch_directory_where_it_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ks-") as folder:
        monkeypatch.setattr("tempfile.tempdir", None)
        Scratch(Path(folder)).gather_temporary_files()
        assert tempfile.gettempdir() == folder
    monkeypatch.setattr("tempfile.tempdir", None)
    Scratch(tmp_path / ("x" * 90)).gather_temporary_files()
    assert tempfile.gettempdir() != str(tmp_path / ("x" * 90))


def test_a_scratch_directory_that_was_cleared_away_is_noticed(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "scratch")
    scratch.check()
    shutil.rmtree(scratch.path)
    with pytest.raises(InputError, match="somebody cleared it away"):
        scratch.check()


def test_a_scratch_directory_of_somebody_else_is_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o500)
    if is_root := os.geteuid() == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(InputError, match="name a directory that this user may write"):
            Scratch(tmp_path / "theirs")
    finally:
        if is_root:
            os.seteuid(0)


def test_only_what_began_a_session_of_its_own_descends_from_a_rank() -> None:
    scratch = f"/scratch/{uuid.uuid4()}"
    ours = start(SLEEPER, **{ENV_SCRATCH: scratch})
    theirs = start([sys.executable, "-c", "import os; os.setsid();" + SLEEPER[2]], **{ENV_SCRATCH: scratch})
    try:
        assert strays_of_ranks(scratch) == [theirs.pid]
    finally:
        end(ours, theirs)


def test_a_dead_ranks_workers_are_reached_through_its_group() -> None:
    """They are forked, and torch's would look for their parent every five seconds only."""
    program = "import os, signal; os.setsid(); pid = os.fork(); print(pid or '', end=chr(10) if pid else '', flush=True); signal.pause()"
    rank = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert rank.stdout
    worker = int(rank.stdout.readline())
    rank.kill()
    rank.wait()
    assert is_alive(worker)
    kill_group(rank.pid)
    poll = select.poll()
    pidfd = os.pidfd_open(worker)
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(5000)
    os.close(pidfd)
    end(rank)


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
