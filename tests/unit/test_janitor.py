"""What goes on behind the commits: reading back, retiring, sweeping. No time passes in here but on a watch of our own."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from staged import eventually
from tiny import SHARD_BYTES, TinyRun

from keepstep.orchestrator import config as configs
from keepstep.orchestrator.coordinator import Coordinator
from keepstep.orchestrator.janitor import LOOK_S, RETRY_S, SWEEP_PERIOD_S, Hooks, Janitor, Stopped
from keepstep.orchestrator.logbook import opened_event
from keepstep.storage.disposal import GRACE_S, dispose
from keepstep.storage.errors import Fenced, StoreUnavailable
from keepstep.storage.layout import MANIFEST_NAME, log_key, shard_name
from keepstep.storage.records import Pin, Quarantine, Record, Retire, Verified
from keepstep.storage.remote import MemoryStore
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store
from keepstep.trainer.config import CheckpointSection


class Untidy(TinyRun):
    """Commits, and leaves the rest to the test."""

    def tidy(self) -> None:
        return

    def commit_all(self, *steps: int) -> Untidy:
        self.launch()
        for step in steps:
            self.save(step)
        return self

    def directory(self, step: int) -> str:
        return next(commit.directory for commit in self.log.lineage.live if commit.step == step)

    def add(self, kind: type[Record], step: int, **more: Any) -> None:
        """A record about a checkpoint, by somebody else."""
        log = RunLog.open(self.store)
        log.append(kind(term=log.lineage.term, directory=self.directory(step), **more))

    def verified_steps(self) -> list[int]:
        log = RunLog.open(self.store)
        return [commit.step for commit in log.lineage.live if commit.directory in log.lineage.verified]

    def stored_steps(self) -> list[int]:
        return sorted({int(key.split("/s")[1][:9]) for key in self.store.list("data")})


@dataclass
class Watch:
    """Time stands still until somebody rests."""

    now: float = 0.0
    is_over: bool = False

    def __call__(self) -> float:
        return self.now

    def rest(self, seconds: float) -> bool:
        self.now += seconds
        return self.is_over


@dataclass
class Desk:
    """A janitor, and what it tells its coordinator."""

    run: TinyRun
    section: CheckpointSection = field(default_factory=lambda: CheckpointSection(keep=2, scrub_mb_per_s=0))
    watch: Watch = field(default_factory=Watch)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    said: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        hooks = Hooks(damaged=lambda *told: self.damaged.append(told), say=lambda *told: self.said.append(told), broke=self.broke)
        self.janitor = Janitor(self.run.store, self.run.log, self.section, hooks, clock=self.watch, rest=self.watch.rest)

    def broke(self, error: BaseException) -> None:
        raise error

    def rounds(self, number: int) -> list[float]:
        return [self.janitor.round() for _ in range(number)]

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.said]


class MovedClock(MemoryStore):
    """Its clock can be put forward."""

    ahead_s = 0.0

    def _now(self) -> float:
        return super()._now() + self.ahead_s


class Troubled(MemoryStore):
    """`trouble` sees every key before it is read or deleted."""

    def __init__(self, trouble: Callable[[str, str], None] = lambda what, key: None) -> None:
        super().__init__(uuid.uuid4().hex)
        self.trouble = trouble

    def get(self, key: str) -> bytes:
        self.trouble("get", key)
        return super().get(key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        self.trouble("get_range", key)
        return super().get_range(key, start, length)

    def delete(self, key: str) -> None:
        self.trouble("delete", key)
        super().delete(key)


@pytest.fixture
def store() -> Store:
    return Store.open(f"memory://{uuid.uuid4().hex}")


def flip(store: Store, key: str) -> None:
    body = bytearray(store.get(key))
    body[len(body) // 2] ^= 1
    store.put(key, bytes(body))


class TestScrubbing:
    def test_the_newest_commit_is_read_back_first_and_older_ones_when_there_is_time(self, store: Store) -> None:
        run = Untidy(store).commit_all(10, 20)
        desk = Desk(run, CheckpointSection(keep=9, scrub_mb_per_s=0))
        assert desk.rounds(1) == [0.0], "there is more to do"
        assert run.verified_steps() == [20]
        run.save(30)
        desk.rounds(1)
        assert run.verified_steps() == [20, 30]
        assert desk.rounds(1) == [LOOK_S], "nothing more to do"
        assert run.verified_steps() == [10, 20, 30]
        assert desk.said == []

    def test_what_will_be_retired_is_not_read_back_any_more(self, store: Store) -> None:
        run = Untidy(store).commit_all(10, 20, 30, 40)
        Desk(run, CheckpointSection(keep=1, scrub_mb_per_s=0)).rounds(3)
        assert run.verified_steps() == [40]

    def test_it_is_read_no_faster_than_allowed(self, store: Store) -> None:
        run = Untidy(store).commit_all(10)
        desk = Desk(run, CheckpointSection(scrub_mb_per_s=0.0001))
        desk.rounds(1)
        assert desk.watch.now >= 2 * SHARD_BYTES / 100

    def test_it_ends_at_once_when_the_reign_does(self, store: Store) -> None:
        run = Untidy(store).commit_all(10)
        desk = Desk(run)
        desk.watch.is_over = True
        with pytest.raises(Stopped):
            desk.rounds(1)
        assert run.verified_steps() == []

    def test_what_was_read_back_is_read_again_after_a_while_and_recorded_once(self, store: Store) -> None:
        run = Untidy(store).commit_all(10, 20)
        desk = Desk(run, CheckpointSection(scrub_mb_per_s=0, scrub_period_s=1000))
        desk.rounds(2)
        num_records = run.log.count
        desk.watch.now = 999
        assert desk.rounds(1) == [1.0]
        flip(store, f"{run.directory(10)}/{shard_name(0)}")
        desk.watch.now = 1001
        desk.rounds(2)
        assert [directory for directory, _ in desk.damaged] == [run.directory(10)]
        assert run.log.count == num_records

    def test_what_a_predecessor_read_back_waits_for_its_period_again(self, store: Store) -> None:
        run = Untidy(store).commit_all(10)
        Desk(run).rounds(1)
        seen: list[str] = []
        desk = Desk(run, CheckpointSection(scrub_period_s=50))
        desk.janitor._scrub = lambda commit: seen.append(commit.directory)  # type: ignore[method-assign]
        assert desk.rounds(1) == [50.0]
        desk.watch.now = 50.0
        desk.rounds(1)
        assert seen == [run.directory(10)]

    def test_nothing_is_read_back_where_acknowledged_writes_count(self) -> None:
        store = Troubled()
        run = Untidy(store).commit_all(10, 20, 30)
        reads: list[str] = []
        store.trouble = lambda what, key: reads.append(key) if what != "delete" else None
        desk = Desk(run, CheckpointSection(keep=2, scrub=False))
        desk.rounds(2)
        assert [key for key in reads if key.startswith("data/")] == []
        assert run.stored_steps() == [20, 30]

    def test_the_bytes_come_from_the_disk_and_not_from_the_memory_that_they_were_written_from(self, tmp_path: Path) -> None:
        run = Untidy(Store.open(tmp_path)).commit_all(10)
        dropped: list[bool] = []
        run.store.drop_cache = lambda prefix: dropped.append(prefix == run.directory(10))  # type: ignore[method-assign]
        Desk(run).rounds(1)
        assert dropped == [True]

    def test_the_kernel_forgets_what_it_is_told_to(self, tmp_path: Path) -> None:
        store = Store.open(tmp_path)
        store.write_file("data/x", [bytes(1 << 20)], num_bytes=1 << 20)
        path = tmp_path / "data" / "x"
        if not cached_pages(path):
            pytest.skip("this file system does not tell what is cached")

        def is_forgotten() -> bool:
            store.drop_cache("data")
            return cached_pages(path) == 0

        assert eventually(is_forgotten), "pages that another processor has in hand take a moment"


def cached_pages(path: Path) -> int:
    """How many pages of a file are in memory. Does not read it: that would bring them there."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        pages = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(view)
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(view)), pages)
        del start  # else the view cannot be closed
        return 0 if failed else sum(page & 1 for page in pages)


class TestDamage:
    def test_it_is_told_once_with_the_file_and_what_is_wrong(self, store: Store) -> None:
        run = Untidy(store).commit_all(10, 20)
        flip(store, f"{run.directory(20)}/{shard_name(1)}")
        desk = Desk(run)
        desk.rounds(3)
        (told,) = desk.damaged
        assert told[0] == run.directory(20)
        assert told[1].startswith(f"{shard_name(1)}: block 0 (from byte 0) does not have the hash")
        assert run.verified_steps() == [10]

    def test_nothing_is_retired_before_its_quarantine_is_in_the_log(self, store: Store) -> None:
        """It may have counted as verified a moment ago."""
        run = Untidy(store).commit_all(10, 20)
        for step in (10, 20):
            run.add(Verified, step)
        run.save(30)
        flip(store, f"{run.directory(30)}/{MANIFEST_NAME}")
        desk = Desk(run, CheckpointSection(keep=1, scrub_mb_per_s=0))
        desk.rounds(2)
        assert (len(desk.damaged), run.stored_steps()) == (1, [10, 20, 30])
        run.add(Quarantine, 30, why="damaged")
        run.log.refresh()
        desk.rounds(1)
        assert run.stored_steps() == [20, 30]

    def test_bytes_that_came_damaged_once_are_no_damage(self) -> None:
        class Lying(MemoryStore):
            lies = 0

            def get(self, key: str) -> bytes:
                body = super().get(key)
                if not key.endswith(MANIFEST_NAME) or not self.lies:
                    return body
                self.lies -= 1
                return body[:-1]

        store = Lying(uuid.uuid4().hex)
        run = Untidy(store).commit_all(10)
        store.lies = 1
        desk = Desk(run)
        desk.rounds(1)
        assert (desk.damaged, run.verified_steps()) == ([], [10])

    def test_a_store_that_cannot_be_reached_says_nothing_about_bytes(self) -> None:
        def refuse(what: str, key: str) -> None:
            if key.endswith(".distcp"):
                raise StoreUnavailable("503 Slow Down")

        store = Troubled()
        run = Untidy(store).commit_all(10)
        desk = Desk(run)
        store.trouble = refuse
        assert desk.rounds(2) == [RETRY_S, RETRY_S]
        assert (desk.damaged, run.verified_steps()) == ([], [])
        assert desk.said == [("storage", "reading back and clearing away wait: 503 Slow Down")], "once"
        store.trouble = lambda what, key: None
        desk.rounds(1)
        assert run.verified_steps() == [10]

    def test_a_root_that_lost_everything_is_not_mounted(self, tmp_path: Path) -> None:
        run = Untidy(Store.open(tmp_path / "root")).commit_all(10)
        desk = Desk(run)
        (tmp_path / "root").rename(tmp_path / "away")
        desk.rounds(2)
        assert desk.damaged == []
        assert "is it mounted?" in desk.said[0][1]

    def test_what_was_retired_while_it_was_read_is_not_damaged(self) -> None:
        def retire(what: str, key: str) -> None:
            if what == "get_range" and key.startswith(run.directory(10)):
                store.trouble = lambda what, key: None
                log = RunLog.open(store)
                log.append(Retire(term=log.lineage.term, directories=(directory,)))
                dispose(store, directory)

        store = Troubled()
        run = Untidy(store).commit_all(10, 20)
        directory = run.directory(10)
        desk = Desk(run, CheckpointSection(keep=9, scrub_mb_per_s=0))
        desk.rounds(1)
        store.trouble = retire
        desk.rounds(2)
        assert (desk.damaged, run.stored_steps()) == ([], [20])


class TestRetiring:
    def test_the_newest_verified_ones_stay_and_the_run_hears_of_it(self, store: Store) -> None:
        run = Untidy(store).commit_all(10)
        desk = Desk(run)
        for step in (20, 30, 40):
            run.save(step)
            desk.rounds(1)
        assert run.stored_steps() == [30, 40]
        assert desk.kinds() == ["retired", "retired"]

    def test_the_record_comes_before_the_deletion(self) -> None:
        def refuse(what: str, key: str) -> None:
            if what == "delete" and key.startswith("data/"):
                raise StoreUnavailable("503 Slow Down")

        store = Troubled(refuse)
        run = Untidy(store).commit_all(10, 20, 30)
        desk = Desk(run, CheckpointSection(keep=1, scrub_mb_per_s=0))
        desk.rounds(1)
        assert [commit.step for commit in RunLog.open(store).lineage.live] == [30]
        assert run.stored_steps() == [10, 20, 30]

    def test_a_pin_that_comes_between_the_choice_and_the_record_wins(self, store: Store) -> None:
        run = Untidy(store).commit_all(10, 20, 30)
        run.add(Verified, 30)
        run.log.refresh()
        run.add(Pin, 10)
        desk = Desk(run, CheckpointSection(keep=1, scrub_mb_per_s=0))
        desk.rounds(2)
        assert run.stored_steps() == [10, 30]

    def test_a_fenced_one_retires_nothing(self, store: Store) -> None:
        run = Untidy(store).commit_all(10, 20, 30)
        run.add(Verified, 30)
        run.log.refresh()
        RunLog.open(store).open_term(run="tiny", identity="tiny", host="other", pid=2)
        with pytest.raises(Fenced):
            Desk(run, CheckpointSection(keep=1)).rounds(1)
        assert run.stored_steps() == [10, 20, 30]


class TestSweeping:
    def takeover(self, store: Store) -> tuple[Untidy, str, str]:
        """What attempt 1 left at step 20 and what attempt 2 has written of step 30; (run, first, second)."""
        old = Untidy(store).commit_all(10)
        left = old.persist(20).directory
        store.delete(f"{left}/rank-00000.json")  # else it would be rolled forward
        new = Untidy(store)
        new.launch()
        return new, left, new.persist(30).directory

    def test_what_nobody_can_commit_goes_after_a_grace_by_the_clock_of_the_store(self) -> None:
        store = MovedClock(uuid.uuid4().hex)
        run, left, open_ = self.takeover(store)
        desk = Desk(run)
        desk.rounds(1)
        assert store.list(left), "somebody may still be writing it"
        store.ahead_s = GRACE_S + 60
        desk.rounds(1)
        assert store.list(left), "not every round"
        desk.watch.now = SWEEP_PERIOD_S
        desk.rounds(1)
        assert (store.list(left), desk.kinds()) == ([], ["swept"])
        assert store.list(open_)
        assert desk.said[0][1] == "1 directories that nobody can commit and 0 half-written objects"

    def test_what_may_have_been_committed_by_a_record_that_is_lost_stays(self) -> None:
        store = MovedClock(uuid.uuid4().hex)
        store.ahead_s = GRACE_S + 60
        old = Untidy(store).commit_all(10, 20)
        commit_of_10 = next(key for key in map(log_key, range(9)) if old.directory(10).encode() in store.get(key))
        flip(store, commit_of_10)
        new = Untidy(store)
        new.launch()
        unfinished = old.persist(5).directory
        Desk(new).rounds(1)
        assert new.stored_steps() == [10, 20]
        assert store.list(unfinished) == []


class TestThread:
    def test_it_works_after_a_nudge_and_ends_with_the_reign(self, store: Store) -> None:
        run = Untidy(store).commit_all(10)
        janitor = Desk(run).janitor
        janitor.start()
        assert eventually(lambda: run.verified_steps() == [10])
        run.save(20)
        janitor.nudge()
        assert eventually(lambda: run.verified_steps() == [10, 20])
        janitor.stop()
        assert not any(thread.name == "janitor" for thread in threading.enumerate())

    def test_a_bug_is_told(self, store: Store) -> None:
        bugs: list[BaseException] = []
        hooks = Hooks(damaged=lambda *told: None, say=lambda *told: None, broke=bugs.append)
        run = Untidy(store).commit_all(10)
        janitor = Janitor(store, run.log, CheckpointSection(), hooks, rest=lambda seconds: 1 / 0 > 0)
        janitor.start()
        assert eventually(lambda: bool(bugs))
        assert isinstance(bugs[0], ZeroDivisionError)
        janitor.stop()

    def test_the_coordinator_quarantines_what_its_janitor_found_and_goes_on(self, tmp_path: Path) -> None:
        run = Untidy(Store.open(tmp_path)).commit_all(10, 20)
        flip(run.store, f"{run.directory(20)}/{shard_name(0)}")
        config = configs.parse(f'[run]\nroot = "{tmp_path}"\n', "run.toml")
        run.log.open_term(run="tiny", identity="tiny", host="here", pid=1, url="http://127.0.0.1:9")

        async def reign() -> list[dict[str, Any]]:
            said: list[dict[str, Any]] = []
            coordinator = Coordinator(config, run.store, run.log, said.append)
            reign = asyncio.create_task(coordinator.reign(opened_event(run.log)))
            done = await asyncio.to_thread(eventually, lambda: bool(run.log.lineage.quarantined and run.log.lineage.verified))
            reign.cancel()
            await asyncio.gather(reign, return_exceptions=True)
            assert done, said
            return said

        said = asyncio.run(reign())
        (quarantined,) = [event for event in said if event["kind"] == "quarantined"]
        assert shard_name(0) in quarantined["why"]
        assert run.verified_steps() == [10]
        newest = RunLog.open(run.store).lineage.newest_committed()
        assert newest
        assert newest.step == 10
