"""Snapshots and the hint: they make opening quick, and whatever happens to them, the log says the same."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepped import Root, SteppedStore

from keepstep.storage.canonical import seal, sha256_hex, unseal
from keepstep.storage.errors import CorruptRecord, Fenced, StoreForbidden, StoreFull, StoreUnavailable
from keepstep.storage.layout import HINT_KEY, SNAPSHOTS, checkpoint_directory, log_key, parse_snapshot_key, snapshot_key
from keepstep.storage.lineage import Lineage
from keepstep.storage.records import Attempt, Commit, Failed, Pin, Quarantine, Retire, Rewind, Verified
from keepstep.storage.remote import MemoryStore
from keepstep.storage.runlog import RunLog
from keepstep.storage.skips import union
from keepstep.storage.snapshots import FORMAT, Hint, Snapshot
from keepstep.storage.store import Store

PERIOD = 8


def pause(seconds: float) -> None:
    """Nobody waits here."""


def read(store: Store) -> RunLog:
    log = RunLog(store, period=PERIOD, sleep=pause)
    log.refresh()
    return log


def write(store: Store, records: int, *, tidy: bool = True, host: str = "a") -> RunLog:
    """A log with something of everything."""
    log = RunLog(store, period=PERIOD, sleep=pause)
    opened = log.open_term(run="x", identity="i", host=host, pid=1)
    log.append(Attempt(term=opened.term, attempt=1, nodes=("a#1",), world_size=1, nonce=host, at="then"))
    return fill(log, records, tidy=tidy)


def fill(log: RunLog, records: int, *, tidy: bool = True) -> RunLog:
    while log.count < records:
        _append_some(log, log.lineage.term)
        assert not tidy or log.tidy()
    return log


def _append_some(log: RunLog, term: int) -> None:
    lineage, number = log.lineage, log.count
    attempt, last = lineage.newest_attempt(), lineage.newest_committed()
    assert attempt
    if (number % 11 == 10 or lineage.rewound) and last:
        settings = {"term": term, "skips": lineage.skips, "overrides": lineage.overrides}
        log.append(replace(attempt, attempt=attempt.attempt + 1, resume_step=last.step, resume_directory=last.directory, **settings))
    elif number % 17 == 15 and last:
        back = next(commit for commit in lineage.commits if commit.directory not in lineage.quarantined)
        skips, overrides = union(lineage.skips, [f"{number}:{number + 2}"]), (*lineage.overrides, f"optimizer.lr={number}")
        log.append(Rewind(term=term, directory=back.directory, step=back.step, skips=skips, overrides=overrides, bad_step=number))
    elif number % 7 == 6:
        log.append(Quarantine(term=term, directory=lineage.live[0].directory, why="damaged"))
    elif number % 5 == 4 and last:
        log.append(Verified(term=term, directory=last.directory))
    elif number % 5 == 3 and last and len(lineage.live) > 4:
        old = [commit.directory for commit in lineage.live[:2] if commit.directory not in lineage.pinned | {last.directory}]
        log.append(Retire(term=term, directories=tuple(old)))
    elif number % 13 == 12 and last:
        log.append(Pin(term=term, directory=last.directory, pinned=number % 2 == 0))
    else:
        step = lineage.committed_step + 10
        directory = checkpoint_directory(attempt.attempt, step, attempt.nonce)
        log.append(Commit(term=term, attempt=attempt.attempt, step=step, directory=directory, manifest_sha256="00", world_size=1))


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore(uuid.uuid4().hex)


class TestOpening:
    def test_it_begins_at_the_newest_snapshot_and_says_what_the_whole_log_says(self, store: Store) -> None:
        writer = write(store, 20)
        assert [parse_snapshot_key(key) for key in store.list(SNAPSHOTS)] == [8, 16]
        reader, complete = read(store), RunLog.read_all(store)
        assert (len(reader.entries), len(complete.entries)) == (4, 20)
        assert reader.lineage == complete.lineage == writer.lineage
        assert (reader.count, reader.alarms, reader.is_whole) == (20, [], True)

    def test_whoever_began_at_a_snapshot_goes_on_writing(self, memory: MemoryStore) -> None:
        write(memory, 20)
        successor = read(memory)
        successor.open_term(run="x", identity="i", host="b", pid=1)
        assert successor.tidy()
        assert RunLog.read_all(memory).alarms == []
        assert read(memory).lineage == RunLog.read_all(memory).lineage == successor.lineage

    def test_the_newest_two_are_kept(self, memory: MemoryStore) -> None:
        write(memory, 44)
        assert [parse_snapshot_key(key) for key in memory.list(SNAPSHOTS)] == [32, 40]

    def test_two_who_read_the_same_records_write_the_same_bytes(self) -> None:
        one, two = Root(), Root()
        writer = write(SteppedStore(one), 20)
        two.objects |= {key: body for key, body in one.objects.items() if key.startswith("log/")}
        reader = read(SteppedStore(two))
        assert reader.lineage == writer.lineage
        assert reader.tidy()
        assert two.objects[snapshot_key(16)] == one.objects[snapshot_key(16)]

    def test_a_writer_that_was_away_reads_the_rest_in_a_few_windows(self) -> None:
        root = Root()
        away = read(SteppedStore(root))
        writer = write(SteppedStore(root), 100)
        assert len(away.refresh()) == 100
        assert away.lineage == writer.lineage

    def test_nothing_new_costs_one_request(self) -> None:
        class Counting(SteppedStore):
            num_reads = 0

            def get(self, key: str) -> bytes:
                self.num_reads += 1
                return super().get(key)

        root = Root()
        write(SteppedStore(root), 20)
        store = Counting(root)
        log = read(store)
        before = store.num_reads
        assert log.refresh() == ()
        assert store.num_reads == before + 1


class TestAlarms:
    def test_the_newest_records_were_deleted(self, memory: MemoryStore) -> None:
        write(memory, 20)
        for number in (18, 19):
            memory.delete(log_key(number))
        log = read(memory)
        assert log.alarms == ["the log ends after 18 records, 20 existed: the newest were deleted"]
        assert not log.is_whole
        assert log.count == 18

    def test_more_than_a_period_was_deleted(self, memory: MemoryStore) -> None:
        write(memory, 20)
        for number in range(10, 20):
            memory.delete(log_key(number))
        log = read(memory)
        assert "snapshots/0000000016.json does not belong to this log: record 15 is another one" in log.alarms[0]
        assert "the log ends after 10 records, 20 existed" in log.alarms[-1]
        assert log.lineage == RunLog.read_all(memory).lineage

    def test_a_hole_after_the_snapshot_is_void(self, memory: MemoryStore) -> None:
        write(memory, 22)
        memory.delete(log_key(18))
        log = read(memory)
        assert "record 18 is gone although newer ones exist" in log.alarms[0]
        assert log.count == 22

    def test_what_was_void_stays_known_under_a_snapshot(self, memory: MemoryStore) -> None:
        log = write(memory, 9)
        memory.put(log_key(9), b"rubbish")
        with pytest.raises(Fenced, match="newest records after term 1 cannot be read"):
            fill(log, 20)
        log.open_term(run="x", identity="i", host="b", pid=1)
        fill(log, 20)
        reader = read(memory)
        assert "record 9 is no JSON" in reader.alarms[0]
        assert (reader.count, len(reader.entries), reader.is_whole) == (20, 4, False)

    def test_another_run_s_shortcuts_lead_nowhere(self) -> None:
        ours, theirs = Root(), Root()
        write(SteppedStore(ours), 20)
        write(SteppedStore(theirs), 30, host="b")
        foreign = {key: body for key, body in theirs.objects.items() if not key.startswith("log/")}
        for key in [key for key in ours.objects if not key.startswith("log/")]:
            del ours.objects[key]
        ours.objects |= foreign
        log = read(SteppedStore(ours))
        assert log.lineage == RunLog.read_all(SteppedStore(ours)).lineage
        assert len(log.alarms) == 3


class TestTidying:
    @pytest.mark.parametrize("error", [StoreFull, StoreForbidden, StoreUnavailable])
    def test_a_store_that_is_in_the_way_hurts_nobody(
        self, memory: MemoryStore, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
    ) -> None:
        log = write(memory, 20, tidy=False)

        def fail(key: str, body: bytes) -> None:
            raise error("not now")

        monkeypatch.setattr(memory, "put", fail)
        assert not log.tidy()
        monkeypatch.undo()
        assert log.tidy()
        assert len(read(memory).entries) == 4

    def test_shortcuts_that_are_not_for_us_to_read_are_done_without(self, memory: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
        write(memory, 20)
        get = memory.get

        def refuse(key: str) -> bytes:
            if key.startswith("log/"):
                return get(key)
            raise StoreForbidden(key)

        monkeypatch.setattr(memory, "get", refuse)
        assert len(read(memory).entries) == 20


@cache
def untouched() -> tuple[dict[str, bytes], Lineage]:
    root = Root()
    return root.objects, write(SteppedStore(root), 28).lineage


def _flip(body: bytes, position: int) -> bytes:
    at = position % (8 * (len(body) - 1))  # the line end carries nothing
    return body[: at // 8] + bytes([body[at // 8] ^ 1 << at % 8]) + body[at // 8 + 1 :]


DAMAGES: dict[str, Callable[[bytes, int], bytes]] = {
    "flipped": _flip,
    "cut": lambda body, position: body[: position % len(body)],
    "zeroed": lambda body, position: bytes(len(body)),
    "nested": lambda body, position: b"[" * 100_000,
    "nan": lambda body, position: b'{"check":NaN}',
    "of another kind": lambda body, position: seal({"format": FORMAT}),
    "of another version": lambda body, position: seal({**unseal(body, "it"), "format": FORMAT + 1}),
    "older": lambda body, position: seal({**unseal(body, "it"), "head": sha256_hex(b"older")}),
}
DAMAGE = st.none() | st.just("gone") | st.sampled_from(sorted(DAMAGES))


@pytest.mark.slow
@given(st.lists(DAMAGE, min_size=3, max_size=3), st.integers(0, 10**6))
def test_whatever_happens_to_them_the_log_says_the_same(damages: list[str | None], position: int) -> None:
    objects, lineage = untouched()
    root = Root()
    root.objects |= objects
    keys = (HINT_KEY, snapshot_key(16), snapshot_key(24))
    for key, damage in zip(keys, damages, strict=True):
        if damage == "gone":
            del root.objects[key]
        elif damage:
            root.objects[key] = DAMAGES[damage](root.objects[key], position)
    log = read(SteppedStore(root))
    assert log.lineage == lineage == RunLog.read_all(SteppedStore(root)).lineage
    assert (log.count, log.is_whole) == (28, True)
    if not any(damages):
        assert log.alarms == []
    assert not any("void" in alarm or "deleted" in alarm for alarm in log.alarms)


class TestFormat:
    def test_a_snapshot_comes_back_as_it_was(self) -> None:
        _, lineage = untouched()
        for outcome in (None, Failed(term=1, why="x", requeue=True)):
            snapshot = Snapshot(
                count=28, head="ab", num_corrupt=2, num_unread=1, lineage=replace(lineage, outcome=outcome), alarms=("a", "b")
            )
            assert Snapshot.parse(snapshot.body(), 28) == snapshot

    def test_a_hint_comes_back_as_it_was(self) -> None:
        hint = Hint(records=28, head="ab", snapshot=24)
        assert Hint.parse(hint.body()) == hint

    def test_a_snapshot_of_another_number_is_refused(self) -> None:
        with pytest.raises(CorruptRecord, match="covers 8 records"):
            Snapshot.parse(Snapshot(count=8, head="", num_corrupt=0, num_unread=0, lineage=Lineage()).body(), 16)

    def test_whoever_changes_what_a_log_means_raises_the_format(self) -> None:
        """A snapshot says what its records meant to whoever wrote it. If this digest changes, FORMAT must change with it."""
        _, lineage = untouched()
        digest = sha256_hex(Snapshot(count=28, head="", num_corrupt=0, num_unread=0, lineage=lineage).body())
        assert (FORMAT, digest[:16]) == (5, "c0e95f2802030751")
