"""The fault-injecting store itself: what other tests build on must do exactly what it says."""

from __future__ import annotations

import uuid

import pytest

from keepstep.storage.errors import NotFound, StoreForbidden, StoreFull, StoreUnavailable
from keepstep.storage.faults import Delayed, FailsAfter, FailsBefore, FaultyStore, FlippedBit, SeesNothing, ShortRead, StoreFault
from keepstep.storage.remote import MemoryStore


def faulty(*faults: StoreFault, seed: int = 0) -> FaultyStore:
    return FaultyStore(MemoryStore(uuid.uuid4().hex), faults, seed=seed)


def test_an_error_before_leaves_no_trace_and_one_after_loses_only_the_answer() -> None:
    store = faulty(StoreFault(FailsBefore(StoreFull), "put_new", "log/0"), StoreFault(FailsAfter(), "put_new", "log/1"))
    with pytest.raises(StoreFull, match="injected: put_new log/0 was not done"):
        store.put_new("log/0", b"x")
    with pytest.raises(StoreUnavailable, match="injected: put_new log/1 was done and its answer lost"):
        store.put_new("log/1", b"x")
    assert list(store.list()) == ["log/1"]


def test_faults_fit_operations_and_keys_and_end() -> None:
    store = faulty(StoreFault(FailsBefore(StoreForbidden), "put*", "data/*", skip=1, times=2))
    done = []
    for number in range(5):
        try:
            store.put(f"data/{number}", b"x")
            done.append(number)
        except StoreForbidden:
            store.put(f"log/{number}", b"x")
    assert done == [0, 3, 4]
    assert [key for _, key, _ in store.happened] == ["data/1", "data/2"]


def test_reads_come_short_or_damaged_or_stale() -> None:
    store = faulty()
    store.put("x", bytes(10))
    memory = bytearray(10)
    store.faults = [StoreFault(ShortRead(3))]
    assert (store.get("x"), store.get_range("x", 0, 5), store.read_into("x", 0, memoryview(memory))) == (bytes(7), bytes(2), 7)
    store.faults = [StoreFault(FlippedBit(9))]
    assert store.get("x") == store.inner.get("x")[:1] + b"\x02" + bytes(8)
    assert store.read_into("x", 0, memoryview(memory)) == 10
    assert memory == b"\x00\x02" + bytes(8)
    store.faults = [StoreFault(SeesNothing())]
    assert list(store.list()) == []
    assert not store.exists("x")
    with pytest.raises(NotFound):
        store.get("x")


def test_a_delay_goes_through_the_given_sleep() -> None:
    waits: list[float] = []
    store = FaultyStore(MemoryStore(uuid.uuid4().hex), [StoreFault(Delayed(3.0), "get")], sleep=waits.append)
    store.put("x", b"1")
    assert store.get("x") == b"1"
    assert waits == [3.0]


def test_chances_depend_on_the_seed_alone() -> None:
    def failures(seed: int) -> list[int]:
        store = faulty(StoreFault(FailsBefore(), "size", chance=0.3), seed=seed)
        store.put("x", b"")
        return [number for number in range(100) if not _works(store)]

    assert failures(1) == failures(1) != failures(2)
    assert 15 < len(failures(1)) < 45


def _works(store: FaultyStore) -> bool:
    try:
        store.size("x")
    except StoreUnavailable:
        return False
    return True


def test_without_faults_it_is_the_store_that_it_wraps() -> None:
    store = faulty()
    store.write_file("data/x", [b"ab", b"c"], num_bytes=3)
    store.append("events.jsonl", b'{"a":1}')
    assert list(store.read_records("events.jsonl")) == [{"a": 1}]
    assert sorted(store.modified("data").at) == ["data/x"]
    store.probe()
    store.delete_tree("data")
    assert store.sweep(-3600) == 0
    assert not store.exists("data/x")
