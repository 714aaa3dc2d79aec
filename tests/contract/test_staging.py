"""Staging: what is submitted becomes durable, stays in memory, and whatever goes wrong never stops the training."""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from staged import DEADLINE_S, NUM_BYTES, content_of, directory_of, eventually, held, stage, stage_into, tensors_of

from keepstep.storage import buffers
from keepstep.storage.arena import StagedFile, Staging
from keepstep.storage.canonical import sha256_hex
from keepstep.storage.errors import StoreError, StoreFull, TornStage
from keepstep.storage.layout import rank_index_name, steps_key
from keepstep.storage.manifest import RankIndex, hash_blocks
from keepstep.storage.persister import Persister, listen
from keepstep.storage.remote import MemoryStore


class GatedStore(MemoryStore):
    """Writes files only while the gate is open, and fails with `error` if there is one."""

    def __init__(self) -> None:
        super().__init__(uuid.uuid4().hex)
        self.gate = threading.Event()
        self.gate.set()
        self.error: StoreError | None = None
        self.broken = ".metadata"  # the second file of a submission

    def write_file(self, key: str, blocks: Iterable[bytes | memoryview], *, num_bytes: int, sync: bool = True) -> None:
        assert self.gate.wait(DEADLINE_S)
        if self.error and key.endswith(self.broken):
            raise self.error
        super().write_file(key, blocks, num_bytes=num_bytes, sync=sync)


class Node:
    """A persister in this process, on a store that we can stop and break."""

    def __init__(self, folder: Path) -> None:
        self.store = GatedStore()
        self.lines: list[Mapping[str, Any]] = []  # without "begun"
        self.persister = Persister(store=self.store, emit=self._note)
        self.path = folder / "socket"
        self._listener = listen(self.path)
        self._stagings: list[Staging] = []
        threading.Thread(target=self.persister.accept, args=(self._listener,), daemon=True).start()

    def _note(self, line: Mapping[str, Any]) -> None:
        if line["kind"] not in ("begun", "writing"):
            self.lines.append(line)

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
        durable = {"directory": directory, "index_sha256": sha256_hex(node.store.get(key)), "num_bytes": NUM_BYTES + 100, "best_step": -1}
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
        why = "step 20 of rank 0 is not durable: cannot write x: no space"
        assert node.lines == [{"kind": "failed", "attempt": 1, "step": 20, "rank": 0, "why": why}]
        assert staging.resident(directory_of(20), "__0_0.distcp") is None
        assert node.store.list(directory_of(20)) == [], "half a save keeps no space"
        node.store.error = None
        stage(staging, 40)
        assert staging.wait_idle(DEADLINE_S)
        assert staging.last_error == ""

    def test_a_checkpoint_without_a_successor_waits_for_the_store(self, node: Node) -> None:
        staging = node.connect()
        node.store.error = StoreFull("cannot write x: no space")
        stage(staging, 20, patience_s=DEADLINE_S)
        assert eventually(lambda: len(node.lines) > 1)
        assert staging.busy
        node.store.error = None
        assert staging.wait_idle(DEADLINE_S)
        assert [line["kind"] for line in node.lines[-2:]] == ["failed", "persisted"]

    def test_patience_does_not_help_a_step_that_was_saved_with_other_bytes(self, node: Node) -> None:
        staging = node.connect()
        node.store.put(f"{directory_of(20)}/rank-00000.json", b"{}")
        stage(staging, 20, patience_s=DEADLINE_S)
        assert not staging.wait_idle(DEADLINE_S)
        assert "exists with other content" in staging.last_error
        assert len(node.lines) == 1

    def test_memory_that_is_not_there_is_said_to_the_agent_too(self, node: Node) -> None:
        staging = node.connect()
        staging.reserve(1 << 50)
        assert "no memory" in staging.last_error
        assert [line["kind"] for line in node.lines] == ["failed"]
        assert "rank 0 cannot stage: no memory for two buffers" in node.lines[0]["why"]

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


class TestEnding:
    def test_what_a_rank_said_last_is_still_heard(self, node: Node) -> None:
        staging = node.connect()
        staging.record_step({"step": 20})
        stage(staging, 20)
        staging.close()
        assert node.persister.finish(DEADLINE_S)
        assert [line["kind"] for line in node.lines] == ["persisted"]
        assert [record["step"] for record in node.store.read_records(steps_key(1))] == [20]

    def test_a_store_that_hangs_does_not_hold_it_beyond_its_grace(self, node: Node) -> None:
        staging = node.connect()
        node.store.gate.clear()
        stage(staging, 20)
        assert staging.buffer(10) is None, "the submission has arrived"
        assert not node.persister.finish(0.05)


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


class TestTornStages:
    """What was not filled to its end, or not by one rank alone, is nobody's checkpoint."""

    def test_what_a_rank_was_filling_when_it_ended_is_neither_durable_nor_resident(self, node: Node) -> None:
        old = node.connect(attempt=1)
        stage(old, 20)
        assert old.wait_idle(DEADLINE_S)
        half = old.buffer(NUM_BYTES + 100, "layout")
        assert half
        half.view[: NUM_BYTES // 2] = content_of(40)[: NUM_BYTES // 2]
        old.close()
        new = node.connect(attempt=2)
        assert held(new, directory_of(20), "__0_0.distcp") == content_of(20)
        assert held(new, directory_of(40), "__0_0.distcp") is None
        assert node.store.list(directory_of(40)) == []
        assert [line["step"] for line in node.lines] == [20]

    def test_a_rank_that_lives_on_writes_into_memory_that_nobody_reads(self, node: Node) -> None:
        """Cut off in the middle of a copy, it does not know yet that a newer attempt has taken its place."""
        zombie = node.connect(attempt=1)
        zombie.reserve(NUM_BYTES + 100)
        half = zombie.buffer(NUM_BYTES + 100, "layout")
        assert half
        new = node.connect(attempt=2)
        for step in (20, 40):
            buffer = new.buffer(NUM_BYTES + 100, "layout")
            assert buffer
            half.view[:] = b"z" * (NUM_BYTES + 100)
            stage_into(new, buffer, step, attempt=2)
            half.view[:] = b"z" * (NUM_BYTES + 100)
            assert new.wait_idle(DEADLINE_S), new.last_error
            assert node.store.get(f"{directory_of(step, 2)}/__0_0.distcp") == content_of(step)
            assert held(new, directory_of(step, 2), "__0_0.distcp") == content_of(step)

    def test_a_filling_that_begins_while_the_bytes_are_written_is_noticed(self, node: Node) -> None:
        staging = node.connect()
        node.store.gate.clear()
        stage(staging, 20)
        (mapped,) = staging._mapped.values()
        mapped.lock.begin()
        node.store.gate.set()
        assert not staging.wait_idle(DEADLINE_S)
        assert "changed hands" in staging.last_error
        assert [line["kind"] for line in node.lines] == ["failed"]
        assert not node.store.exists(f"{directory_of(20)}/{rank_index_name(0)}")
        assert staging.resident(directory_of(20), "__0_0.distcp") is None
        stage(staging, 40)
        assert staging.wait_idle(DEADLINE_S)

    def test_two_that_fill_one_buffer_hand_nothing_over(self, node: Node) -> None:
        staging = node.connect()
        buffer = staging.buffer(NUM_BYTES + 100, "layout")
        assert buffer
        (mapped,) = staging._mapped.values()
        mapped.lock.begin()
        stage_into(staging, buffer, 20)
        assert "changed hands" in staging.last_error
        assert not staging.busy
        stage(staging, 40)
        assert staging.wait_idle(DEADLINE_S)
        assert [line["step"] for line in node.lines] == [40]

    def test_a_submission_of_an_older_filling_is_refused(self, node: Node) -> None:
        staging = node.connect()
        assert staging.buffer(NUM_BYTES + 100)
        filling = staging._filling
        assert filling
        staging.submit(directory=directory_of(20), step=20, files=[], tensors=(), state={})
        assert staging.wait_idle(DEADLINE_S)
        filling.lock.end(filling.lock.begin())
        with pytest.raises(TornStage):
            filling.lock.check(filling.odd + 1)


class TestMemoryTier:
    def test_the_last_checkpoint_stays_readable_while_the_next_is_filled(self, node: Node) -> None:
        staging, neighbour = node.connect(rank=0), node.connect(rank=1)
        stage(staging, 20)
        assert staging.wait_idle(DEADLINE_S)
        assert staging.buffer(NUM_BYTES + 100)
        for reader in (staging, neighbour):
            assert held(reader, directory_of(20), "__0_0.distcp") == content_of(20)
            assert held(reader, directory_of(20), ".metadata") == b"m" * 100

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
        assert held(new, directory_of(20), "__0_0.distcp") == content_of(20)
