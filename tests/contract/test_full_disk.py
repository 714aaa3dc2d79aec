"""No room, at every place where a checkpoint needs some: the save fails with a reason, nothing half stays, the next one works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from smalldisk import SmallDisk, small_disk
from tiny import INTERVAL, TinyRun, load

from keepstep.storage import buffers
from keepstep.storage.errors import StoreError, StoreForbidden, StoreFull
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", megabytes=2) as disk:
        yield disk


@pytest.fixture
def run(disk: SmallDisk) -> TinyRun:
    """One checkpoint is committed."""
    run = TinyRun(Store.open(disk.path / "root"))
    run.launch()
    run.save(INTERVAL)
    return run


def before(run: TinyRun, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, strike: Callable[[], None]) -> None:
    """Strikes when the next object of this kind is about to be written."""
    real = getattr(run.store, name)

    def struck(key: str, *arguments: Any, **options: Any) -> Any:
        if kind in key:
            strike()
        return real(key, *arguments, **options)

    monkeypatch.setattr(run.store, name, struck)


WRITES = {
    "shard": (".distcp", "write_file"),
    "rank index": ("/rank-", "put_new"),
    "manifest": ("MANIFEST", "put_new"),
    "commit record": ("log/", "put_new"),
}


def assert_newest_is(run: TinyRun, step: int) -> None:
    """For a reader of the root, too, and every byte of it is right."""
    log = RunLog.open(run.store)
    commit = log.lineage.newest_committed()
    assert commit
    assert (commit.step, log.alarms) == (step, [])
    load(run.store, commit)


def temporaries(disk: SmallDisk) -> list[Path]:
    return list(disk.path.rglob(".new-*"))


@pytest.mark.parametrize("write", WRITES.values(), ids=[name.replace(" ", "-") for name in WRITES])
class TestTheRoot:
    def test_a_full_disk_fails_the_save_and_the_next_one_works(
        self, run: TinyRun, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, write: tuple[str, str]
    ) -> None:
        with monkeypatch.context() as patch:
            before(run, patch, *write, disk.fill)
            with pytest.raises(StoreFull, match="o space left"):
                run.save(2 * INTERVAL)
        assert temporaries(disk) == []
        assert_newest_is(run, INTERVAL)
        disk.free()
        run.save(3 * INTERVAL)
        assert_newest_is(run, 3 * INTERVAL)

    def test_a_root_that_turns_read_only_fails_the_save_and_the_next_one_works(
        self, run: TinyRun, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, write: tuple[str, str]
    ) -> None:
        with monkeypatch.context() as patch:
            before(run, patch, *write, lambda: disk.remount("ro"))
            with pytest.raises(StoreForbidden, match="ead-only"):
                run.save(2 * INTERVAL)
        assert_newest_is(run, INTERVAL)
        disk.remount("rw")
        run.save(3 * INTERVAL)
        assert_newest_is(run, 3 * INTERVAL)

    def test_the_same_save_may_be_tried_again(
        self, run: TinyRun, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, write: tuple[str, str]
    ) -> None:
        with monkeypatch.context() as patch:
            before(run, patch, *write, disk.fill)
            with pytest.raises(StoreFull):
                run.save(2 * INTERVAL)
        disk.free()
        run.save(2 * INTERVAL)
        assert_newest_is(run, 2 * INTERVAL)


def test_a_disk_with_room_for_half_a_shard_keeps_none_of_it(disk: SmallDisk) -> None:
    """The room is asked for before the first byte is written."""
    store = Store.open(disk.path / "root")
    store.put("x", b"")
    disk.fill(leave_pages=100)
    with pytest.raises(StoreFull):
        store.write_file("data/shard", [bytes(1 << 20)], num_bytes=1 << 20)
    assert store.list("data") == []
    store.write_file("data/shard", [bytes(1 << 18)], num_bytes=1 << 18)


def test_a_full_disk_hurts_no_reader_and_a_hint_that_cannot_be_written_nobody(run: TinyRun, disk: SmallDisk) -> None:
    disk.fill()
    assert_newest_is(run, INTERVAL)
    run.log._hinted = 0  # as if records had come since
    assert run.log.tidy() is False
    with pytest.raises(StoreError):
        run.save(2 * INTERVAL)
    assert_newest_is(run, INTERVAL)


def test_staging_asks_for_memory_before_it_touches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "available_bytes", lambda: 1 << 20)
    slot = buffers.Slot()
    with pytest.raises(OSError, match="only 1048576 bytes are available"):
        slot.hand_out(2 << 20, "layout")
    assert slot.buffers == []
    monkeypatch.setattr(buffers, "available_bytes", lambda: 1 << 30)
    buffer, is_fresh, _ = slot.hand_out(2 << 20, "layout")
    assert (buffer.num_bytes, is_fresh) == (2 << 20, True)
    slot.free()
