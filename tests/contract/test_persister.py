"""The persister as a process: what was submitted becomes durable whoever is killed."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from s3server import S3Server
from staged import DEADLINE_S, NUM_BYTES, content_of, directory_of, eventually, held, stage

from keepstep.storage.arena import Staging
from keepstep.storage.layout import rank_index_name, steps_key
from keepstep.storage.manifest import RankIndex
from keepstep.storage.store import Store


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class PersisterProcess:
    """A real persister, and its lines."""

    def __init__(self, folder: Path, root: str, **environment: str) -> None:
        self.socket = folder / "socket"
        command = [sys.executable, "-m", "keepstep.storage.persister", "--socket", str(self.socket), "--root", root]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment}
        )
        self._received = b""
        assert self.line()["kind"] == "ready"

    def line(self) -> dict[str, Any]:
        assert self.process.stdout
        while b"\n" not in self._received:
            assert select.select([self.process.stdout], [], [], DEADLINE_S)[0], "the persister says nothing"
            data = os.read(self.process.stdout.fileno(), 65536)
            assert data, "the persister ended"
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message if message["kind"] not in ("begun", "writing") else self.line()

    def connect(self, attempt: int = 1) -> Staging:
        return Staging.connect(self.socket, attempt=attempt, rank=0, world_size=2)

    def close(self) -> int:
        with self.process:  # closes the pipes, waits
            pass
        return self.process.returncode


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., PersisterProcess]]:
    started: list[PersisterProcess] = []

    def start_one(root: str = "", **environment: str) -> PersisterProcess:
        started.append(PersisterProcess(folder, root or str(folder / "root"), **environment))
        return started[-1]

    yield start_one
    for persister in started:
        persister.close()


RANK = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from keepstep.storage.arena import Staging
from staged import stage
staging = Staging.connect({socket!r}, attempt=1, rank=0, world_size=2)
staging.record_step({{"step": 20}})
if {submits}:
    stage(staging, 20, num_bytes={num_bytes})
else:
    staging.buffer({num_bytes}, "layout").view[:] = bytes({num_bytes})
os.kill(os.getpid(), signal.SIGKILL)
"""


def run_rank_that_is_killed(socket_path: Path, *, submits: bool, num_bytes: int) -> None:
    script = RANK.format(tests=str(Path(__file__).parents[1]), socket=str(socket_path), submits=submits, num_bytes=num_bytes)
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL


@pytest.mark.slow
class TestProcess:
    def test_a_rank_killed_after_it_submitted_loses_nothing(self, start: Callable[..., PersisterProcess], folder: Path) -> None:
        persister, num_bytes = start(), 50 << 20
        run_rank_that_is_killed(persister.socket, submits=True, num_bytes=num_bytes)
        line = persister.line()
        assert (line["kind"], line["step"], line["num_bytes"]) == ("persisted", 20, num_bytes + 100)
        store = Store.open(folder / "root")
        assert store.get(f"{directory_of(20)}/__0_0.distcp") == content_of(20, num_bytes)
        assert [record["step"] for record in store.read_records(steps_key(1))] == [20]
        successor = persister.connect(attempt=2)
        assert held(successor, directory_of(20), "__0_0.distcp") == content_of(20, num_bytes)
        successor.close()

    def test_a_rank_killed_before_that_leaves_its_buffer_to_the_next(self, start: Callable[..., PersisterProcess], folder: Path) -> None:
        persister = start()
        run_rank_that_is_killed(persister.socket, submits=True, num_bytes=NUM_BYTES)
        run_rank_that_is_killed(persister.socket, submits=False, num_bytes=NUM_BYTES)
        assert persister.line()["step"] == 20
        successor = persister.connect(attempt=2)
        assert held(successor, directory_of(20), "__0_0.distcp") == content_of(20), "what it was filling when it died was another buffer"
        stage(successor, 40, attempt=2)
        assert successor.wait_idle(DEADLINE_S)
        assert persister.line()["step"] == 40
        assert eventually(lambda: len(Store.open(folder / "root").read_records(steps_key(1))) == 1), "its step records come within a second"
        successor.close()

    def test_when_its_input_ends_it_finishes_what_is_in_flight(self, start: Callable[..., PersisterProcess], folder: Path) -> None:
        persister, num_bytes = start(), 100 << 20
        staging = persister.connect()
        staging.record_step({"step": 20})
        stage(staging, 20, num_bytes=num_bytes)
        assert staging.buffer(10) is None, "the submission has arrived"
        assert persister.process.stdin
        persister.process.stdin.close()
        assert persister.line()["kind"] == "persisted"
        assert persister.process.wait(DEADLINE_S) == 0
        assert not persister.socket.exists()
        assert Store.open(folder / "root").size(f"{directory_of(20)}/__0_0.distcp") == num_bytes
        staging.close()

    def test_signals_of_a_terminal_or_a_scheduler_do_not_end_it(self, start: Callable[..., PersisterProcess]) -> None:
        persister = start()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            persister.process.send_signal(number)
        staging = persister.connect()
        stage(staging, 20)
        assert staging.wait_idle(DEADLINE_S)
        staging.close()

    @pytest.mark.parametrize(
        ("point", "has_file", "has_index"),
        [
            ("persister.shards.before", False, False),
            ("persister.shards.middle", True, False),
            ("persister.shards.after", True, False),
            ("persister.index.after", True, True),
        ],
    )
    def test_killed_at_a_point_of_a_save_an_index_never_lies(
        self, start: Callable[..., PersisterProcess], folder: Path, point: str, has_file: bool, has_index: bool
    ) -> None:
        persister = start(KEEPSTEP_FAULTS=f"{point}:rank=0:step=20")
        staging = persister.connect()
        stage(staging, 20)
        assert persister.process.wait(DEADLINE_S) == -signal.SIGKILL
        assert eventually(lambda: not staging.busy)
        assert "gone" in staging.last_error
        store = Store.open(folder / "root")
        assert store.exists(f"{directory_of(20)}/__0_0.distcp") == has_file
        assert store.exists(f"{directory_of(20)}/{rank_index_name(0)}") == has_index
        if point.endswith("middle"):
            assert store.get(f"{directory_of(20)}/__0_0.distcp") == content_of(20)[: NUM_BYTES // 2] + bytes(NUM_BYTES // 2)

    def test_it_dies_with_its_agent(self, folder: Path) -> None:
        """The agent is killed, its end of the pipe is still open elsewhere: the kernel must do it."""
        script = (
            "import subprocess, sys\n"
            "child = subprocess.Popen([sys.executable, '-m', 'keepstep.storage.persister', '--socket', sys.argv[1], '--root', sys.argv[2]],"
            " stdout=subprocess.PIPE)\n"
            "child.stdout.readline()\n"
            "print(child.pid, flush=True)\n"
            "sys.stdin.read()\n"
        )
        command = [sys.executable, "-c", script, str(folder / "socket"), str(folder / "root")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as agent:
            assert agent.stdout
            pid = int(agent.stdout.readline())
            assert is_running(pid)
            agent.kill()
            agent.wait()
            assert eventually(lambda: not is_running(pid))

    def test_options_that_make_no_sense_end_it_with_a_message(self, folder: Path) -> None:
        command = [sys.executable, "-m", "keepstep.storage.persister", "--socket", str(folder / "s"), "--root", "teapot://x"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "cannot be opened" in done.stderr

    @pytest.mark.s3
    def test_it_writes_to_s3(self, start: Callable[..., PersisterProcess], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        root = f"{s3_server.url}/{uuid.uuid4().hex}"
        persister, num_bytes = start(root, **s3_server.environment), 40 << 20
        staging = persister.connect()
        staging.record_step({"step": 20})
        stage(staging, 20, num_bytes=num_bytes)
        assert staging.wait_idle(DEADLINE_S), staging.last_error
        store = Store.open(root, s3_server.options)
        assert store.get(f"{directory_of(20)}/__0_0.distcp") == content_of(20, num_bytes)
        assert RankIndex.parse(store.get(f"{directory_of(20)}/{rank_index_name(0)}")).step == 20
        assert [record["step"] for record in store.read_records(steps_key(1))] == [20]
        staging.close()
