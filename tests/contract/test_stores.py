"""What every store promises, whatever is behind it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from keepstep.storage.errors import NotFound, StoreError
from keepstep.storage.store import Store

MIB = 1 << 20


class TestPutNew:
    def test_the_first_writer_wins_and_the_second_changes_nothing(self, store: Store) -> None:
        assert store.put_new("log/0", b"first")
        assert not store.put_new("log/0", b"second")
        assert store.get("log/0") == b"first"

    def test_the_same_bytes_again_are_our_own(self, store: Store) -> None:
        assert store.put_new("log/0", b"mine")
        assert store.put_new("log/0", b"mine")

    def test_of_racing_writers_exactly_one_wins(self, store: Store) -> None:
        writers = 8
        barrier = threading.Barrier(writers)

        def write(number: int) -> bool:
            barrier.wait(timeout=30)
            return store.put_new("log/0", b"writer %d" % number)

        with ThreadPoolExecutor(writers) as pool:
            won = list(pool.map(write, range(writers)))
        assert won.count(True) == 1
        assert store.get("log/0") == b"writer %d" % won.index(True)

    def test_nothing_but_the_object_is_listed_afterwards(self, store: Store) -> None:
        store.put_new("log/0", b"x")
        store.put_new("log/0", b"y")
        assert store.list() == ["log/0"]


class TestReading:
    def test_what_was_put_last_is_read(self, store: Store) -> None:
        store.put("result.json", b"old")
        store.put("result.json", b"new")
        assert store.get("result.json") == b"new"

    def test_a_range_ends_where_the_object_ends(self, store: Store) -> None:
        store.put("x", bytes(range(100)))
        assert store.get_range("x", 10, 5) == bytes(range(10, 15))
        assert store.get_range("x", 95, 50) == bytes(range(95, 100))
        assert store.get_range("x", 100, 5) == b""
        assert store.get_range("x", 10, 0) == b""

    def test_a_range_fills_memory_of_the_caller(self, store: Store) -> None:
        store.put("x", bytes(range(100)))
        memory = bytearray(10)
        assert store.read_into("x", 50, memoryview(memory)) == 10
        assert memory == bytes(range(50, 60))
        assert store.read_into("x", 95, memoryview(memory)) == 5

    def test_size_and_existence(self, store: Store) -> None:
        store.put("folder/x", b"12345")
        assert store.size("folder/x") == 5
        assert store.exists("folder/x")
        assert not store.exists("folder/y")
        assert not store.exists("folder")

    def test_an_absent_object_is_not_found_by_any_call(self, store: Store) -> None:
        for read in (store.get, store.size, lambda key: store.get_range(key, 0, 1)):
            with pytest.raises(NotFound, match="absent"):
                read("folder/absent")

    def test_many_objects_come_in_order_with_errors_in_their_place(self, store: Store) -> None:
        for number in range(20):
            store.put(f"log/{number}", b"%d" % number)
        bodies = store.get_many([f"log/{number}" for number in range(21)])
        assert list(bodies[:20]) == [b"%d" % number for number in range(20)]
        assert isinstance(bodies[20], NotFound)

    @pytest.mark.parametrize("key", ["../x", "/x", "x//y", "x/./y", ""])
    def test_a_key_that_could_leave_the_root_is_refused(self, store: Store, key: str) -> None:
        with pytest.raises(ValueError, match="part"):
            store.put(key, b"")


class TestListing:
    def test_all_keys_below_a_folder_sorted(self, store: Store) -> None:
        keys = ["data/a/s1/.metadata", "data/a/s1/__0_0.distcp", "data/b", "data-not/x", "log/0"]
        for key in reversed(keys):
            store.put(key, b"x")
        assert list(store.list()) == sorted(keys)
        assert list(store.list("data")) == keys[:3]
        assert list(store.list("data/a/s1")) == keys[:2]

    def test_a_folder_that_does_not_exist_is_empty(self, store: Store) -> None:
        assert list(store.list("absent")) == []

    def test_nothing_is_left_of_a_deleted_tree(self, store: Store) -> None:
        for key in ("data/a/x", "data/a/b/y", "data/ab"):
            store.put(key, b"x")
        store.delete_tree("data/a")
        assert list(store.list("data")) == ["data/ab"]
        store.delete_tree("data/a")

    def test_deleting_what_is_not_there_is_fine(self, store: Store) -> None:
        store.put("x", b"")
        store.delete("x")
        store.delete("x")
        assert not store.exists("x")


class TestTimes:
    def test_times_and_now_are_of_one_clock(self, store: Store) -> None:
        before = store.modified().now
        store.put("data/a/x", b"1")
        store.put("data/b", b"1")
        store.put("log/0", b"1")
        seen = store.modified("data")
        assert sorted(seen.at) == ["data/a/x", "data/b"]
        assert all(before - 1 <= at <= seen.now + 1 for at in seen.at.values())  # object stores count whole seconds
        assert sorted(store.modified().at) == ["data/a/x", "data/b", "log/0"]

    def test_looking_at_times_leaves_nothing_behind(self, store: Store) -> None:
        assert store.modified("absent").at == {}
        assert list(store.list()) == []


class TestSweep:
    def test_only_what_a_probe_left_long_ago_goes(self, store: Store) -> None:
        for key in ("probe/1f/two", "log/0", "data/a/x", "probed"):
            store.put(key, b"x")
        assert store.sweep(3600) == 0
        assert store.sweep(-3600) == 1
        assert list(store.list()) == ["data/a/x", "log/0", "probed"]
        assert store.sweep(-3600) == 0


class TestFiles:
    @pytest.mark.parametrize("num_bytes", [0, 1000, 40 * MIB + 17])
    def test_blocks_become_one_file(self, store: Store, num_bytes: int) -> None:
        data = memoryview(bytes(range(251)) * (num_bytes // 251 + 1))[:num_bytes]
        store.write_file("data/file", (data[start : start + 4 * MIB] for start in range(0, num_bytes, 4 * MIB)), num_bytes=num_bytes)
        assert store.size("data/file") == num_bytes
        assert store.get("data/file") == data

    @pytest.mark.parametrize("num_bytes", [100, 40 * MIB])
    def test_nothing_stays_of_a_file_whose_blocks_fail(self, store: Store, num_bytes: int) -> None:
        def blocks() -> Iterator[bytes]:
            yield bytes(num_bytes // 2)
            raise StoreError("the source broke")

        with pytest.raises(StoreError, match="the source broke"):
            store.write_file("data/file", blocks(), num_bytes=num_bytes)
        assert list(store.list()) == []

    def test_a_file_of_another_size_than_announced_is_refused(self, store: Store) -> None:
        with pytest.raises(StoreError, match="3 bytes came, 4 were announced"):
            store.write_file("data/file", [b"abc"], num_bytes=4)
        assert not store.exists("data/file")


class TestGrowingFiles:
    def test_lines_come_back_in_order_without_line_ends(self, store: Store) -> None:
        store.append("steps/a.jsonl", b'{"step":1}\n{"step":2}\n')
        store.append("steps/a.jsonl", b'{"step":3}', sync=True)
        assert list(store.read_lines("steps/a.jsonl")) == [b'{"step":1}', b'{"step":2}', b'{"step":3}']
        assert [record["step"] for record in store.read_records("steps/a.jsonl")] == [1, 2, 3]

    def test_lines_come_newest_first_too_however_long_the_file(self, store: Store) -> None:
        lines = [b'{"step":%d,"filler":"%s"}' % (number, b"x" * (number % 7) * 3000) for number in range(1, 101)]
        for start in range(0, 100, 25):
            store.append("steps/a.jsonl", b"\n".join(lines[start : start + 25]))
        assert list(store.lines_backwards("steps/a.jsonl")) == lines[::-1]
        assert next(iter(store.lines_backwards("steps/a.jsonl"))) == lines[-1]
        assert list(store.lines_backwards("steps/absent.jsonl")) == []

    def test_two_writers_lose_nothing(self, store: Store) -> None:
        def write(writer: int) -> None:
            for number in range(5):
                store.append("events.jsonl", b'{"writer":%d,"number":%d}' % (writer, number))

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(write, range(2)))
        records = store.read_records("events.jsonl")
        assert sorted((record["writer"], record["number"]) for record in records) == [(w, n) for w in range(2) for n in range(5)]

    def test_an_absent_growing_file_has_no_lines(self, store: Store) -> None:
        assert list(store.read_lines("steps/absent.jsonl")) == []

    def test_a_line_that_is_no_json_object_is_no_record(self, store: Store) -> None:
        store.append("events.jsonl", b'{"a":1}\n{"torn\n[1]\n{"b":2}\n')
        assert list(store.read_records("events.jsonl")) == [{"a": 1}, {"b": 2}]


class TestProbe:
    def test_a_good_store_passes_and_keeps_nothing(self, store: Store) -> None:
        store.probe()
        assert list(store.list()) == []
