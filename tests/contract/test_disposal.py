"""Deleting: whatever crashes, whoever does it, nothing that is committed or may be committed is ever lost."""

from __future__ import annotations

import contextlib
import random
import uuid
from collections.abc import Callable, Iterable, Iterator

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tiny import TinyRun, load

from keepstep.orchestrator import events as ev
from keepstep.orchestrator.commits import InvalidCheckpoint, complete_newest
from keepstep.orchestrator.janitor import Hooks, Janitor
from keepstep.storage import disposal
from keepstep.storage.disposal import GRACE_S, dispose, find_leftovers
from keepstep.storage.errors import DamagedCheckpoint, StoreUnavailable
from keepstep.storage.layout import directory_of
from keepstep.storage.lineage import Lineage
from keepstep.storage.records import Pin, Quarantine
from keepstep.storage.remote import MemoryStore
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store
from keepstep.trainer.config import CheckpointSection

OLD = -60.0  # as a grace: everything is old enough, on a store whose clock counts whole seconds, too
HOOKS = Hooks(damaged=lambda *told: None, say=lambda *told: None, broke=lambda error: None)


class Untidy(TinyRun):
    """Its janitor works when the test says so, and finds every directory old enough."""

    def tidy(self) -> None:
        return

    def clean(self, store: Store | None = None) -> None:
        """Until nothing is left to do."""
        janitor = Janitor(store or self.store, self.log, CheckpointSection(keep=2, scrub_mb_per_s=0), HOOKS)
        while janitor.round() == 0.0:
            continue


def directories(store: Store) -> set[str]:
    return {directory for key in store.list("data") if (directory := directory_of(key))}


def assert_sound(store: Store) -> Lineage:
    """Every checkpoint that the log calls right is whole, and there is one; the log's reader found nothing odd."""
    log = RunLog.open(store)
    assert log.alarms == []
    good = [commit for commit in log.lineage.live if commit.directory not in log.lineage.quarantined]
    for commit in good:
        load(store, commit)
    assert any(commit.directory in log.lineage.verified for commit in log.lineage.commits)
    return log.lineage


def test_what_nobody_can_commit_goes_and_nothing_else(store: Store) -> None:
    old = Untidy(store)
    old.launch()
    for step in (10, 20):
        old.save(step)
    late, torn = old.persist(15).directory, old.persist(30).directory
    store.delete(f"{torn}/rank-00001.json")
    new = Untidy(store)
    new.launch()
    open_ = new.persist(25).directory
    before = directories(store)
    assert find_leftovers(store, new.log.lineage, is_log_whole=True).garbage == (), "too young"
    left = find_leftovers(store, new.log.lineage, is_log_whole=True, grace_s=OLD)
    assert set(left.garbage) == {late, torn}
    assert left.stays == {open_: "its attempt may still commit it"}
    for directory in left.garbage:
        dispose(store, directory)
        dispose(store, directory)  # somebody else was there before
    assert directories(store) == before - {late, torn}


class Crash(BaseException):
    """The process is gone: nobody catches this."""


class Mortal(MemoryStore):
    """Dies before or after its n-th operation that changes something."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.left = [10**9]
        self.fail: type[BaseException] = Crash

    def _now(self) -> float:
        return super()._now() + GRACE_S + 60

    def _mortally(self, work: Callable[[], None]) -> None:
        self.left[0] -= 1
        if self.left[0] == 0:
            raise self.fail("before")
        work()
        self.left[0] -= 1
        if self.left[0] == 0:
            raise self.fail("after")

    def put_new(self, key: str, body: bytes) -> bool:
        won: list[bool] = []
        self._mortally(lambda: won.append(MemoryStore.put_new(self, key, body)))
        return won[0]

    def delete(self, key: str) -> None:
        self._mortally(lambda: MemoryStore.delete(self, key))


def garbage_and_five_commits(store: Store) -> Untidy:
    run = Untidy(store)
    run.launch()
    for step in (10, 20, 30, 40, 50):
        run.save(step)
    run.persist(45)
    run.persist(60)
    return run


def operations() -> int:
    store = Mortal(uuid.uuid4().hex)
    run = garbage_and_five_commits(store)
    before = store.left[0]
    run.clean()
    return before - store.left[0]


@pytest.fixture(autouse=True)
def _nothing_left_in_memory() -> Iterator[None]:
    """Memory file systems list by looking at everything that any of them holds."""
    yield
    MemoryFileSystem.store.clear()


@pytest.mark.slow
@pytest.mark.parametrize("fail", [Crash, StoreUnavailable])
@pytest.mark.parametrize("part", range(4))
def test_a_crash_at_any_operation_leaves_nothing_that_a_successor_does_not_clear_away(fail: type[BaseException], part: int) -> None:
    total = operations()
    assert total > 50
    for number in range(1 + part, total + 1, 4 if fail is Crash else 12):
        store = Mortal(uuid.uuid4().hex)
        run = garbage_and_five_commits(store)
        store.left[0], store.fail = number, fail
        with contextlib.suppress(Crash):
            run.clean()
        store.left[0] = 10**9
        if number > 4:  # the first verified record is there
            assert_sound(store)
        successor = Untidy(store)
        successor.launch()  # rolls step 60 forward
        successor.clean()
        lineage = assert_sound(store)
        assert directories(store) == {commit.directory for commit in lineage.live}
        assert [commit.step for commit in lineage.commits][-1] == 60


class Story:
    """Two coordinators' reigns, people and janitors on one root, in an order that chance chooses."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.store = Mortal(uuid.uuid4().hex)
        self.runs = [Untidy(self.store)]
        self.runs[0].launch()
        self.runs[0].save(10)
        self.runs[0].clean()
        self.parts: list[ev.Commit] = []

    @property
    def run(self) -> Untidy:
        return self.runs[-1]

    def act(self) -> None:
        self.chance.choice([self.save, self.save, self.persist, self.persist, self.commit_late, self.take_over, self.mark, self.clean])()

    def _step(self) -> int:
        return self.run.log.lineage.committed_step + self.chance.randint(1, 9)

    def save(self) -> None:
        self.run.save(self._step())

    def persist(self) -> None:
        """Parts that nobody has committed yet."""
        self.parts.append(self.run.persist(self._step()))

    def commit_late(self) -> None:
        if not self.parts:
            return
        with contextlib.suppress(InvalidCheckpoint):  # void, and so it was garbage
            self.run.commit(self.parts.pop(self.chance.randrange(len(self.parts))))

    def take_over(self) -> None:
        self.runs = [*self.runs, Untidy(self.store)][-2:]
        self.run.launch()

    def mark(self) -> None:
        lineage = self.run.log.lineage
        commit = self.chance.choice(lineage.live)
        if self.chance.random() < 0.5:
            self.run.log.append(Pin(term=lineage.term, directory=commit.directory, pinned=self.chance.random() < 0.5))
        elif len([c for c in lineage.commits if c.directory in lineage.verified - lineage.quarantined]) > 1:
            self.run.log.append(Quarantine(term=lineage.term, directory=commit.directory, why="chance"))

    def clean(self) -> None:
        """A janitor, maybe the one of a coordinator that does not know of its end. What may be committed afterwards must still be whole."""
        whole = complete_newest(self.store, self.run.log.lineage)
        kept = self.run.log.lineage.pinned
        cleaner = self.chance.choice(self.runs)
        if cleaner is self.run:
            cleaner.clean()
        else:  # it is fenced from the log, and may only delete
            for directory in find_leftovers(self.store, cleaner.log.lineage, is_log_whole=True, grace_s=OLD).garbage:
                dispose(self.store, directory)
        assert complete_newest(self.store, self.run.log.lineage) == whole
        assert kept <= {commit.directory for commit in self.run.log.lineage.live}
        assert_sound(self.store)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_in_no_order_of_events_is_anything_lost(seed: int) -> None:
    story = Story(seed)
    for _ in range(40):
        story.act()
    story.take_over()
    story.run.save(1000)
    story.run.clean()
    assert directories(story.store) == {commit.directory for commit in assert_sound(story.store).live}


@pytest.mark.slow
def test_a_janitor_that_takes_what_may_still_be_committed_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above are worth something."""

    def greedy(lineage: Lineage, directories: Iterable[str]) -> tuple[str, ...]:
        live = {commit.directory for commit in lineage.live}
        return tuple(directory for directory in directories if directory not in live)

    def lost(seed: int) -> bool:
        try:
            test_in_no_order_of_events_is_anything_lost(seed)
        except (AssertionError, DamagedCheckpoint):
            return True
        return False

    monkeypatch.setattr(disposal, "garbage", greedy)
    assert any(lost(seed) for seed in range(4))
