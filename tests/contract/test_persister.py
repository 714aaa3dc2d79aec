"""Staging and the persister: what was submitted becomes durable whoever dies, and nothing of it ever stops the training."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from s3server import S3Server

from keepstep.storage import buffers
from keepstep.storage.arena import StagedFile, Staging
from keepstep.storage.canonical import sha256_hex
from keepstep.storage.errors import StoreError, StoreFull
from keepstep.storage.layout import checkpoint_directory, rank_index_name, steps_key
from keepstep.storage.manifest import RankIndex, TensorEntry, hash_blocks
from keepstep.storage.persister import Persister, listen
from keepstep.storage.remote import MemoryStore
from keepstep.storage.store import Store

DEADLINE_S = 30.0
NUM_BYTES = 10_000


def directory_of(step: int, attempt: int = 1) -> str:
    return checkpoint_directory(attempt, step, "nonce")


def content_of(step: int, num_bytes: int = NUM_BYTES) -> bytes:
    return (bytes(range(251)) * (num_bytes // 251 + 2))[step % 251 :][:num_bytes]


def tensors_of(num_bytes: int) -> tuple[TensorEntry, ...]:
    return (
        TensorEntry(
            name="w",
            file="__0_0.distcp",
            offset=0,
            num_bytes=num_bytes,
            dtype="torch.uint8",
            shape=(num_bytes,),
            starts=(0,),
            global_shape=(num_bytes,),
        ),
    )


def stage(staging: Staging, step: int, *, attempt: int = 1, num_bytes: int = NUM_BYTES, template: str = "layout") -> bool:
    """Fills a buffer and submits it; the buffer's freshness. Two files: a shard and something small behind it."""
    buffer = staging.buffer(num_bytes + 100, template)
    assert buffer is not None, staging.last_error
    buffer.view[:num_bytes] = content_of(step, num_bytes)
    buffer.view[num_bytes:] = b"m" * 100
    files = [
        StagedFile(name="__0_0.distcp", offset=0, num_bytes=num_bytes),
        StagedFile(name=".metadata", offset=num_bytes, num_bytes=100),
    ]
    staging.submit(directory=directory_of(step, attempt), step=step, files=files, tensors=tensors_of(num_bytes), state={"rng": step})
    return buffer.fresh


def eventually(is_so: Callable[[], bool]) -> bool:
    until = time.monotonic() + DEADLINE_S
    while not is_so() and time.monotonic() < until:
        threading.Event().wait(0.01)
    return is_so()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: a Unix socket's path has at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="ks-"))
    yield path
    shutil.rmtree(path)


class GatedStore(MemoryStore):
    """Writes files only while the gate is open, and fails with `error` if there is one."""

    def __init__(self) -> None:
        super().__init__(uuid.uuid4().hex)
        self.gate = threading.Event()
        self.gate.set()
        self.error: StoreError | None = None

    def write_file(self, key: str, blocks: Iterable[bytes | memoryview], *, num_bytes: int, sync: bool = True) -> None:
        assert self.gate.wait(DEADLINE_S)
        if self.error:
            raise self.error
        super().write_file(key, blocks, num_bytes=num_bytes, sync=sync)


class Node:
    """A persister in this process, on a store that we can stop and break."""

    def __init__(self, folder: Path) -> None:
        self.store = GatedStore()
        self.lines: list[Mapping[str, Any]] = []
        self.persister = Persister(store=self.store, emit=self.lines.append)
        self.path = folder / "socket"
        self._listener = listen(self.path)
        self._stagings: list[Staging] = []
        threading.Thread(target=self.persister.accept, args=(self._listener,), daemon=True).start()

    def connect(self, *, attempt: int = 1, rank: int = 0) -> Staging:
        staging = Staging.connect(self.path, attempt=attempt, rank=rank, world_size=2)
        self._stagings.append(staging)
        return staging

    def close(self) -> None:
        self.store.gate.set()
        for staging in self._stagings:
            staging.close()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        assert self.persister.finish(DEADLINE_S)
        assert eventually(lambda: not self.persister.sessions)


@pytest.fixture
def node(folder: Path) -> Iterator[Node]:
    node = Node(folder)
    yield node
    node.close()


class TestSaving:
    def test_what_is_submitted_becomes_durable_with_its_index_last(self, node: Node) -> None:
        staging = node.connect()
        stage(staging, 20)
        assert staging.wait_idle(DEADLINE_S)
        directory, key = directory_of(20), f"{directory_of(20)}/{rank_index_name(0)}"
        index = RankIndex.parse(node.store.get(key))
        assert (index.attempt, index.step, index.rank, index.world_size, index.directory) == (1, 20, 0, 2, directory)
        assert node.store.get(f"{directory}/__0_0.distcp") == content_of(20)
        assert [file.name for file in index.files] == ["__0_0.distcp", ".metadata"]
        assert index.files[0].hashes == hash_blocks(memoryview(content_of(20)))
        assert (index.tensors, index.state) == (tensors_of(NUM_BYTES), {"rng": 20})
        of = {"attempt": 1, "step": 20, "rank": 0}
        durable = {"directory": directory, "index_sha256": sha256_hex(node.store.get(key)), "num_bytes": NUM_BYTES + 100}
        assert node.lines == [{"kind": "persisted", **of, **durable}]

    def test_tensors_are_sent_once_and_stand_in_every_index(self, node: Node) -> None:
        staging = node.connect()
        for step in (1, 2, 3):
            stage(staging, step)
            assert staging.wait_idle(DEADLINE_S)
            assert RankIndex.parse(node.store.get(f"{directory_of(step)}/{rank_index_name(0)}")).tensors == tensors_of(NUM_BYTES)

    def test_step_records_are_durable_before_the_index(self, node: Node) -> None:
        staging = node.connect()
        for step in range(1, 6):
            staging.record_step({"step": step, "loss": 1.5})
        node.store.gate.clear()
        stage(staging, 5)
        node.store.error = StoreFull("no space")
        node.store.gate.set()
        assert not staging.wait_idle(DEADLINE_S)
        node.store.error = None
        staging.record_step({"step": 6, "loss": 1.4})
        stage(staging, 6)
        assert staging.wait_idle(DEADLINE_S)
        assert [record["step"] for record in node.store.read_records(steps_key(1))] == [1, 2, 3, 4, 5, 6]

    def test_the_rank_is_busy_until_its_index_is_durable_and_gets_no_buffer(self, node: Node) -> None:
        staging = node.connect()
        assert not staging.busy
        node.store.gate.clear()
        stage(staging, 20)
        assert staging.busy
        assert staging.buffer(NUM_BYTES) is None
        assert not staging.wait_idle(0.05)
        node.store.gate.set()
        assert staging.wait_idle(DEADLINE_S)
        assert not staging.busy

    def test_a_directory_is_never_written_twice(self, node: Node) -> None:
        staging = node.connect()
        stage(staging, 20)
        assert staging.wait_idle(DEADLINE_S)
        buffer = staging.buffer(NUM_BYTES)
        assert buffer
        files = [StagedFile(name="__0_0.distcp", offset=0, num_bytes=NUM_BYTES)]
        staging.submit(directory=directory_of(20), step=20, files=files, tensors=(), state={})
        assert not staging.wait_idle(DEADLINE_S)
        assert "exists with other content" in staging.last_error


class TestTrouble:
    def test_a_full_store_is_said_and_stops_nobody(self, node: Node) -> None:
        staging = node.connect()
        node.store.error = StoreFull("cannot write x: no space")
        stage(staging, 20)
        assert not staging.wait_idle(DEADLINE_S)
        assert (staging.busy, staging.last_error) == (False, "cannot write x: no space")
        assert node.lines == [{"kind": "failed", "attempt": 1, "step": 20, "rank": 0, "why": "cannot write x: no space"}]
        assert staging.resident(directory_of(20), "__0_0.distcp") is None
        node.store.error = None
        stage(staging, 40)
        assert staging.wait_idle(DEADLINE_S)
        assert staging.last_error == ""

    def test_a_persister_that_is_gone_is_said_and_raises_nothing(self, node: Node) -> None:
        staging = node.connect()
        assert staging.buffer(NUM_BYTES)
        node.persister.sessions[0].frames.shutdown()
        staging.submit(directory=directory_of(20), step=20, files=[], tensors=(), state={})
        staging.record_step({"step": 20})
        assert not staging.wait_idle(DEADLINE_S)
        assert "the persister of this node is gone" in staging.last_error
        assert (staging.busy, staging.buffer(10), staging.resident("x", "y")) == (False, None, None)
        staging.reserve(10)

    def test_without_a_persister_a_rank_cannot_begin(self, folder: Path) -> None:
        with pytest.raises(StoreError, match="cannot reach the persister"):
            Staging.connect(folder / "nobody", attempt=1, rank=0, world_size=1)

    def test_memory_that_is_not_there_is_refused_before_it_is_touched(self, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing bounds shared memory but the kernel's killer, which would take anybody."""
        monkeypatch.setattr(buffers, "available_bytes", lambda: 100_000)
        staging = node.connect()
        assert staging.buffer(100_001) is None
        assert "no memory for 100001 bytes of staging: " in staging.last_error
        staging.reserve(200_000)
        assert "no memory for two buffers of 200000 bytes" in staging.last_error
        assert staging.buffer(NUM_BYTES) is not None


class TestBuffers:
    def test_two_buffers_take_turns_and_headers_are_written_once_in_each(self, node: Node) -> None:
        staging = node.connect()
        fresh = []
        for step in range(1, 6):
            fresh.append(stage(staging, step))
            assert staging.wait_idle(DEADLINE_S)
        assert fresh == [True, True, False, False, False]

    def test_another_template_is_fresh_again(self, node: Node) -> None:
        staging = node.connect()
        fresh = []
        for step, template in enumerate(["a", "a", "a", "b", "a", "b"], start=1):
            fresh.append(stage(staging, step, template=template))
            assert staging.wait_idle(DEADLINE_S)
        assert fresh == [True, True, False, True, False, False]

    def test_a_template_that_was_being_written_does_not_count(self, node: Node) -> None:
        staging = node.connect()
        for step in (1, 2):
            stage(staging, step)
            assert staging.wait_idle(DEADLINE_S)
        assert staging.buffer(NUM_BYTES, "other").fresh  # type: ignore[union-attr]
        staging.close()  # crashed while it wrote the headers of "other"
        again = node.connect(attempt=2)
        assert again.buffer(NUM_BYTES, "layout").fresh  # type: ignore[union-attr]

    def test_reserved_buffers_are_the_ones_that_are_given_out(self, node: Node) -> None:
        staging = node.connect()
        staging.reserve(NUM_BYTES + 100)
        reserved = {buffer.number for buffer in node.persister.slots[0].buffers}
        for step in (1, 2, 3):
            stage(staging, step)
            assert staging.wait_idle(DEADLINE_S)
        assert {buffer.number for buffer in node.persister.slots[0].buffers} == reserved
        assert len(reserved) == 2

    def test_a_larger_checkpoint_gets_larger_buffers(self, node: Node) -> None:
        staging = node.connect()
        for step, num_bytes in enumerate([1_000, 100_000, 1_000, 300_000], start=1):
            stage(staging, step, num_bytes=num_bytes)
            assert staging.wait_idle(DEADLINE_S)
            assert node.store.get(f"{directory_of(step)}/__0_0.distcp") == content_of(step, num_bytes)
        assert len(node.persister.slots[0].buffers) == 2


class TestMemoryTier:
    def test_the_last_checkpoint_stays_readable_while_the_next_is_filled(self, node: Node) -> None:
        staging, neighbour = node.connect(rank=0), node.connect(rank=1)
        stage(staging, 20)
        assert staging.wait_idle(DEADLINE_S)
        assert staging.buffer(NUM_BYTES + 100)
        for reader in (staging, neighbour):
            view = reader.resident(directory_of(20), "__0_0.distcp")
            assert view == content_of(20)
            assert view.readonly
            assert reader.resident(directory_of(20), ".metadata") == b"m" * 100

    def test_what_is_not_there_is_none(self, node: Node) -> None:
        staging = node.connect()
        assert staging.resident(directory_of(20), "__0_0.distcp") is None
        stage(staging, 20)
        assert staging.wait_idle(DEADLINE_S)
        assert staging.resident(directory_of(20), "absent") is None
        assert staging.resident(directory_of(40), "__0_0.distcp") is None

    def test_the_checkpoint_before_the_last_goes_with_the_next_but_one(self, node: Node) -> None:
        staging = node.connect()
        for step in (1, 2, 3):
            stage(staging, step)
            assert staging.wait_idle(DEADLINE_S)
        assert [staging.resident(directory_of(step), "__0_0.distcp") is not None for step in (1, 2, 3)] == [False, True, True]

    def test_memory_of_ranks_that_moved_away_is_freed(self, node: Node) -> None:
        for rank in (0, 1):
            staging = node.connect(rank=rank)
            stage(staging, 20)
            assert staging.wait_idle(DEADLINE_S)
            staging.close()
        assert eventually(lambda: not node.persister.sessions)
        moved = node.connect(attempt=2, rank=0)
        assert moved.resident(directory_of(20), "__0_0.distcp") is not None
        stage(moved, 40, attempt=2)
        assert moved.wait_idle(DEADLINE_S)
        assert set(node.persister.slots) == {0}


class TestAttempts:
    def test_an_older_attempt_is_refused(self, node: Node) -> None:
        node.connect(attempt=2)
        with pytest.raises(StoreError, match="attempt 1 was replaced by attempt 2"):
            node.connect(attempt=1)

    def test_a_newer_attempt_ends_the_older_connection(self, node: Node) -> None:
        old = node.connect(attempt=1)
        node.connect(attempt=2)
        assert eventually(lambda: not old.busy and bool(old.last_error))

    def test_a_rank_that_comes_back_waits_for_what_its_predecessor_submitted(self, node: Node) -> None:
        old = node.connect(attempt=1)
        node.store.gate.clear()
        stage(old, 20)
        old.close()
        new = node.connect(attempt=2)
        assert new.busy
        assert new.buffer(NUM_BYTES) is None
        node.store.gate.set()
        assert new.wait_idle(DEADLINE_S)
        assert new.resident(directory_of(20), "__0_0.distcp") == content_of(20)


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
        return message

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
from test_persister import Staging, stage
staging = Staging.connect({socket!r}, attempt=1, rank=0, world_size=2)
staging.record_step({{"step": 20}})
if {submits}:
    stage(staging, 20, num_bytes={num_bytes})
else:
    staging.buffer({num_bytes}, "layout").view[:] = bytes({num_bytes})
os.kill(os.getpid(), signal.SIGKILL)
"""


def run_rank_that_is_killed(socket_path: Path, *, submits: bool, num_bytes: int) -> None:
    script = RANK.format(tests=str(Path(__file__).parent), socket=str(socket_path), submits=submits, num_bytes=num_bytes)
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    assert subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, check=False).returncode == -signal.SIGKILL


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
        assert successor.resident(directory_of(20), "__0_0.distcp") == content_of(20, num_bytes)
        successor.close()

    def test_a_rank_killed_before_that_leaves_its_buffer_to_the_next(self, start: Callable[..., PersisterProcess], folder: Path) -> None:
        persister = start()
        run_rank_that_is_killed(persister.socket, submits=False, num_bytes=NUM_BYTES)
        successor = persister.connect(attempt=2)
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
            "import subprocess, sys, time\n"
            "child = subprocess.Popen([sys.executable, '-m', 'keepstep.storage.persister', '--socket', sys.argv[1], '--root', sys.argv[2]],"
            " stdout=subprocess.PIPE)\n"
            "child.stdout.readline()\n"
            "print(child.pid, flush=True)\n"
            "time.sleep(100)\n"
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
