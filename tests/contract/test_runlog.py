"""The run log: one history, whoever writes, whatever fails."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterable

import pytest

from keepstep.storage.errors import Fenced, StoreError, StoreUnavailable
from keepstep.storage.layout import checkpoint_directory, log_key
from keepstep.storage.records import Attempt, Commit, Failed, Opened, Record, encode
from keepstep.storage.remote import MemoryStore
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store


def open_term(log: RunLog, host: str = "a", identity: str = "i") -> Opened:
    return log.open_term(run="x", identity=identity, host=host, pid=1)


def attempt(term: int, number: int) -> Attempt:
    return Attempt(term=term, attempt=number, nodes=("a#1",), world_size=1, nonce="n")


def commit(term: int, number: int, step: int) -> Commit:
    directory = checkpoint_directory(number, step, "n")
    return Commit(term=term, attempt=number, step=step, directory=directory, manifest_sha256="00", world_size=1)


class TestWriting:
    def test_an_empty_root_is_an_empty_log(self, store: Store) -> None:
        log = RunLog.open(store)
        assert (log.records, log.lineage.term, log.newest_attempt(), log.newest_opened()) == ((), 0, None, None)

    def test_everybody_reads_what_was_appended(self, store: Store) -> None:
        log, reader = RunLog.open(store), RunLog.open(store)
        opened = open_term(log)
        appended = (opened, log.append(attempt(1, 1)), log.append(commit(1, 1, 20)))
        assert reader.refresh() == appended
        assert reader.refresh() == ()
        assert RunLog.open(store).records == appended
        assert reader.lineage == log.lineage == RunLog.open(store).lineage
        assert reader.newest_attempt() == attempt(1, 1)
        assert list(store.list("log")) == [log_key(number) for number in range(3)]

    def test_a_coordinator_of_an_older_term_is_fenced_at_its_next_record(self, store: Store) -> None:
        old, new = RunLog.open(store), RunLog.open(store)
        open_term(old, "old")
        old.append(attempt(1, 1))
        open_term(new, "new")
        with pytest.raises(Fenced, match="term 2 was opened by new") as caught:
            old.append(commit(1, 1, 20))
        assert caught.value.opened.term == 2
        assert RunLog.open(store).lineage.newest_committed() is None

    def test_of_two_that_open_the_same_term_one_is_fenced(self, store: Store) -> None:
        one, two = RunLog.open(store), RunLog.open(store)
        open_term(one, "one")
        with pytest.raises(Fenced, match="opened by one"):
            two.append(Opened(term=1, run="x", identity="i", host="two", pid=1))
        assert open_term(two, "two").term == 2

    def test_a_record_that_would_be_void_is_refused_and_not_written(self, store: Store) -> None:
        log = RunLog.open(store)
        open_term(log)
        with pytest.raises(ValueError, match="commit of attempt 1 while attempt none runs"):
            log.append(commit(1, 1, 20))
        with pytest.raises(ValueError, match="the root holds run 'x'"):
            open_term(RunLog.open(store), identity="another")
        assert len(store.list("log")) == 1


class TestDamage:
    def three(self, store: Store) -> list[str]:
        log = RunLog.open(store)
        open_term(log)
        log.append(attempt(1, 1))
        log.append(commit(1, 1, 20))
        return [log_key(number) for number in range(3)]

    def test_a_corrupt_record_is_void_keeps_its_number_and_is_reported(self, store: Store) -> None:
        keys = self.three(store)
        store.put(keys[2], store.get(keys[2]).replace(b'"step":20', b'"step":30'))
        log = RunLog.open(store)
        assert log.lineage.newest_committed() is None
        assert "record 2: its check does not fit its bytes" in log.alarms[0]
        log.append(commit(1, 1, 40))
        assert RunLog.open(store).lineage.newest_committed() == commit(1, 1, 40)
        assert store.exists(log_key(3))

    def test_a_past_that_was_changed_is_reported(self, store: Store) -> None:
        keys = self.three(store)
        store.put(keys[1], encode(attempt(1, 1), sequence=1, uuid="forged", previous="forged"))
        assert [alarm for alarm in RunLog.open(store).alarms if "the past was changed" in alarm]

    def test_a_record_that_was_deleted_is_reported_and_its_number_is_not_used_again(self, store: Store) -> None:
        keys = self.three(store)
        store.delete(keys[1])
        log = RunLog.open(store)
        assert any("record 1 is gone" in alarm for alarm in log.alarms)
        log.append(attempt(1, 2))
        assert not store.exists(keys[1])
        assert store.exists(log_key(3))

    def test_a_record_of_a_zombie_is_void(self, store: Store) -> None:
        log = RunLog.open(store)
        open_term(log)
        open_term(RunLog.open(store))
        log.refresh()
        body = encode(attempt(1, 1), sequence=2, uuid="zombie", previous=log.entries[-1].sha256)
        store.put_new(log_key(2), body)
        log.refresh()
        assert log.newest_attempt() is None
        assert log.alarms == ["record 2 is void: attempt of term 1 while term 2 is open"]


class FlakyStore(MemoryStore):
    """Before or after a write the connection breaks, as chance wants it."""

    def __init__(self, path: str, chance: random.Random) -> None:
        super().__init__(path)
        self._chance = chance
        self.rate = 0.0

    def put_new(self, key: str, body: bytes) -> bool:
        self._break()
        won = super().put_new(key, body)
        self._break()
        return won

    def get(self, key: str) -> bytes:
        self._break()
        return super().get(key)

    def _break(self) -> None:
        if self._chance.random() < self.rate:
            raise StoreUnavailable("the connection broke")


class TestAmbiguity:
    def test_a_record_that_was_written_although_the_store_failed_is_there_once(self) -> None:
        store = FlakyStore(uuid.uuid4().hex, random.Random(0))
        log = RunLog.open(store)
        open_term(log)
        record, written = attempt(1, 1), 0
        store.rate = 0.5
        while not written:
            try:
                log.append(record)
                written += 1
            except StoreUnavailable:
                continue
        store.rate = 0.0
        assert RunLog.open(store).records[1:] == (record,)

    def test_a_store_that_says_taken_and_shows_nothing_does_not_hang_the_writer(self) -> None:
        class Denying(MemoryStore):
            def put_new(self, key: str, body: bytes) -> bool:
                return False

        with pytest.raises(StoreError, match=r"is taken in .*, but cannot be read"):
            open_term(RunLog.open(Denying(uuid.uuid4().hex)))


class Coordinator:
    """Opens terms, launches attempts and commits, as chance wants it, until it is fenced; then it begins anew."""

    def __init__(self, name: str, store: FlakyStore, chance: random.Random) -> None:
        self.name, self.store, self.chance = name, store, chance
        self.acknowledged: list[Record] = []
        self.log: RunLog | None = None
        self.term = 0
        self.wanted: Record | None = None

    def act(self) -> None:
        try:
            self._act()
        except StoreUnavailable:
            if self.chance.random() < 0.2:
                self.log, self.wanted = None, None  # crashed
        except Fenced:
            self.log, self.wanted = None, None

    def _act(self) -> None:
        if self.log is None:
            log = RunLog.open(self.store)
            opened = open_term(log, self.name)
            self.log, self.term = log, opened.term
            self.acknowledged.append(opened)
            return
        self.wanted = self.wanted or self._choose(self.log)
        self.acknowledged.append(self.log.append(self.wanted))
        self.wanted = None

    def _choose(self, log: RunLog) -> Record:
        newest, last = log.newest_attempt(), log.lineage.newest_committed()
        if newest is None or self.chance.random() < 0.3:
            number = newest.attempt + 1 if newest else 1
            resume = {"resume_step": last.step, "resume_directory": last.directory} if last else {}
            return Attempt(term=self.term, attempt=number, nodes=(self.name,), world_size=1, nonce="n", **resume)  # type: ignore[arg-type]
        return commit(self.term, newest.attempt, (last.step if last else 0) + 10)


def assert_one_history(store: Store, acknowledged: Iterable[Record]) -> None:
    log = RunLog.open(store)
    assert log.alarms == []
    assert list(store.list("log")) == [log_key(number) for number in range(len(log.entries))]
    terms = [record.term for record in log.records]
    assert terms == sorted(terms), "nobody wrote after a newer term was opened"
    for record in acknowledged:
        assert log.records.count(record) == 1, "what was acknowledged is there, once"
    steps = [commit.step for commit in log.lineage.commits]
    assert steps == sorted(set(steps))


def play(seed: int) -> None:
    """Raises AssertionError when there is more than one history."""
    chance = random.Random(seed)
    store = FlakyStore(uuid.uuid4().hex, chance)
    coordinators = [Coordinator(name, store, chance) for name in "ab"]
    store.rate = chance.choice([0.0, 0.1, 0.3])
    for _ in range(60):
        chance.choice(coordinators).act()
    store.rate = 0.0
    assert_one_history(store, [record for coordinator in coordinators for record in coordinator.acknowledged])


def makes_one_history(seed: int) -> bool:
    try:
        play(seed)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("seed", range(60))
def test_two_coordinators_on_a_flaky_store_make_one_history(seed: int) -> None:
    play(seed)


@pytest.mark.slow
def test_a_mutant_without_the_fence_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above is worth something: a log whose writers do not look at terms fails it."""

    def append_anyway(log: RunLog, record: Record) -> Record:
        log.refresh()
        body = encode(record, sequence=len(log.entries), uuid=uuid.uuid4().hex, previous=log.entries[-1].sha256 if log.entries else "")
        assert log.store.put_new(log_key(len(log.entries)), body)
        return record

    monkeypatch.setattr(RunLog, "append", append_anyway)
    assert [seed for seed in range(20) if not makes_one_history(seed)]


def test_failed_runs_end_the_log_until_the_next_attempt(store: Store) -> None:
    log = RunLog.open(store)
    open_term(log)
    log.append(attempt(1, 1))
    end = log.append(Failed(term=1, why="budget spent", requeue=True))
    assert RunLog.open(store).lineage.outcome == end
