"""The run log: one history, whoever writes, whatever fails."""

from __future__ import annotations

import contextlib
import random
import uuid

import pytest

from keepstep.storage.errors import Fenced, NotFound, StoreError, StoreUnavailable
from keepstep.storage.layout import checkpoint_directory, log_key
from keepstep.storage.logreader import REREAD_PAUSE_S
from keepstep.storage.records import Attempt, Commit, Failed, Opened, Pin, encode
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


def read(store: Store) -> RunLog:
    """Like RunLog.open, but pauses are not waited for."""
    log = RunLog(store, sleep=lambda seconds: None)
    log.refresh()
    return log


class LyingStore(MemoryStore):
    """Gives some objects wrongly, so many times."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.lies: dict[str, int] = {}
        self.is_gone = False

    def get(self, key: str) -> bytes:
        if self.lies.get(key, 0) == 0:
            return super().get(key)
        self.lies[key] -= 1
        if self.is_gone:
            raise NotFound(key)
        return super().get(key)[:-9]


class TestTermsUnderCorruption:
    @pytest.fixture
    def store(self) -> MemoryStore:
        """What kind of store it is makes no difference here."""
        return MemoryStore(uuid.uuid4().hex)

    def test_a_term_that_nobody_could_read_is_not_given_again(self, store: MemoryStore) -> None:
        hidden = RunLog.open(store)
        open_term(hidden, "first")
        opened = open_term(hidden, "hidden")
        hidden.append(attempt(opened.term, 1))
        body = store.get(log_key(1))
        store.put(log_key(1), b"rubbish")
        successor = read(store)
        assert not successor.is_whole
        assert open_term(successor, "successor").term == 4, "its own number plus 1, not 2 again"
        with pytest.raises(Fenced, match="term 4 was opened by successor"):
            hidden.append(commit(opened.term, 1, 20))
        store.put(log_key(1), body)
        assert read(store).lineage.term == 4

    def test_nobody_acts_under_a_term_that_a_record_nobody_could_read_may_have_ended(self, store: MemoryStore) -> None:
        log = read(store)
        open_term(log)
        store.put(log_key(1), b"rubbish")
        for writer in (log, read(store)):
            with pytest.raises(Fenced, match="a newer term may be among them; open another"):
                writer.append(attempt(1, 1))
        assert not store.exists(log_key(2))
        term = open_term(log).term
        log.append(attempt(term, 1))
        assert read(store).append(attempt(term, 2)) == attempt(term, 2)

    def test_a_later_record_shows_that_the_term_still_stood(self, store: MemoryStore) -> None:
        log = read(store)
        open_term(log)
        log.append(attempt(1, 1))
        log.append(commit(1, 1, 20))
        log.append(commit(1, 1, 40))
        store.put(log_key(2), b"rubbish")
        pin = Pin(term=1, directory=commit(1, 1, 40).directory)
        assert read(store).append(pin) == pin
        assert log.refresh() == (pin,)

    def test_terms_go_on_from_there(self, store: MemoryStore) -> None:
        open_term(RunLog.open(store))
        store.put(log_key(1), b"rubbish")
        assert [open_term(read(store)).term for _ in range(3)] == [3, 4, 5]
        assert read(store).lineage.term == 5

    def test_a_race_for_the_number_is_lost_with_a_reason(self, store: MemoryStore) -> None:
        class Slow(RunLog):
            def _next_term(self) -> int:
                term = super()._next_term()
                if self.store.size(log_key(0)) and not self.store.exists(log_key(1)):
                    open_term(RunLog.open(self.store), "quick")
                return term

        open_term(RunLog.open(store))
        with pytest.raises(Fenced, match="term 2 was opened by quick"):
            open_term(Slow(store), "slow")

    def test_a_pin_that_comes_between_does_not_fence_a_newcomer(self, store: MemoryStore) -> None:
        class Slow(RunLog):
            def _next_term(self) -> int:
                term = super()._next_term()
                if not self.store.exists(log_key(3)):
                    RunLog.open(self.store).append(Pin(term=1, directory=commit(1, 1, 20).directory))
                return term

        log = RunLog.open(store)
        open_term(log)
        log.append(attempt(1, 1))
        log.append(commit(1, 1, 20))
        assert open_term(Slow(store)).term == 2


class TestLies:
    """A proxy or a cache between us and the store may give half an object, or none, now and then."""

    @pytest.mark.parametrize("is_gone", [True, False])
    @pytest.mark.parametrize("lies", [1, 2])
    def test_a_record_is_read_again_before_it_is_given_up(self, is_gone: bool, lies: int) -> None:
        pauses: list[float] = []
        store = LyingStore(uuid.uuid4().hex)
        log = RunLog.open(store)
        open_term(log)
        log.append(attempt(1, 1))
        log.append(commit(1, 1, 20))
        store.lies, store.is_gone = {log_key(1): lies}, is_gone
        reader = RunLog(store, sleep=pauses.append)
        reader.refresh()
        assert (reader.alarms, reader.lineage, pauses) == ([], log.lineage, [REREAD_PAUSE_S] * lies)

    def test_what_never_decodes_is_void_and_no_snapshot_is_made_of_it_unless_the_chain_confirms_it(self) -> None:
        store = LyingStore(uuid.uuid4().hex)
        log = RunLog(store, period=2)
        open_term(log)
        for number in range(1, 6):
            log.append(attempt(1, number))
        store.lies = {log_key(1): 3}
        misled = RunLog(store, period=2, sleep=lambda seconds: None)
        misled.refresh()
        assert not misled.is_whole
        assert misled.tidy()
        assert store.list("snapshots") == [], "a snapshot would make the lie last"
        assert RunLog.open(store).lineage == log.lineage


class TestNews:
    def test_what_an_append_met_is_still_news(self) -> None:
        store = MemoryStore(uuid.uuid4().hex)
        log = RunLog.open(store)
        open_term(log)
        log.append(attempt(1, 1))
        log.append(commit(1, 1, 20))
        pin = RunLog.open(store).append(Pin(term=1, directory=commit(1, 1, 20).directory))
        log.append(commit(1, 1, 40))
        assert log.refresh() == (pin,)
        assert log.refresh() == ()

    def test_what_came_before_an_error_is_news_later(self) -> None:
        store = FlakyStore(uuid.uuid4().hex, random.Random(0))
        log, writer = RunLog.open(store), RunLog.open(store)
        written = (open_term(writer), *(writer.append(attempt(1, number)) for number in range(1, 40)))
        store.rate, news = 0.5, []
        while len(news) < len(written):
            with contextlib.suppress(StoreUnavailable):
                news += log.refresh()
        assert tuple(news) == written

    def test_our_own_record_is_none_although_its_answer_was_lost(self) -> None:
        class Losing(MemoryStore):
            is_sick = False

            def put_new(self, key: str, body: bytes) -> bool:
                won = super().put_new(key, body)
                if self.is_sick:
                    raise StoreUnavailable("the answer was lost")
                return won

        store = Losing(uuid.uuid4().hex)
        log = RunLog.open(store)
        open_term(log)
        store.is_sick = True
        with pytest.raises(StoreUnavailable):
            log.append(attempt(1, 1))
        assert log.refresh() == ()
        assert log.newest_attempt() == attempt(1, 1)
        assert log.append(attempt(1, 1)) == attempt(1, 1)
        assert log.count == 2


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
        log = read(store)
        assert log.lineage.newest_committed() is None
        assert "record 2: its check does not fit its bytes" in log.alarms[0]
        term = open_term(log).term
        log.append(commit(term, 1, 40))
        assert read(store).lineage.newest_committed() == commit(term, 1, 40)
        assert store.exists(log_key(4))

    def test_a_past_that_was_changed_is_reported(self, store: Store) -> None:
        keys = self.three(store)
        store.put(keys[1], encode(attempt(1, 1), sequence=1, uuid="forged", previous="forged"))
        assert [alarm for alarm in RunLog.open(store).alarms if "the past was changed" in alarm]

    def test_a_record_that_was_deleted_is_reported_and_its_number_is_not_used_again(self, store: Store) -> None:
        keys = self.three(store)
        store.delete(keys[1])
        log = read(store)
        assert any("record 1 is gone" in alarm for alarm in log.alarms)
        open_term(log)
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


def test_failed_runs_end_the_log_until_the_next_attempt(store: Store) -> None:
    log = RunLog.open(store)
    open_term(log)
    log.append(attempt(1, 1))
    end = log.append(Failed(term=1, why="budget spent", requeue=True))
    assert RunLog.open(store).lineage.outcome == end
