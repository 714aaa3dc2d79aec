"""The power goes at any instant: whatever of the un-fsynced changes reached the disk, the old or the new checkpoint loads."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from powerloss import Crash, Disk, Event, Mark, Recorder, Sync, torn_shapes
from tiny import INTERVAL, KEEP, TinyRun, load

from keepstep.orchestrator import events as ev
from keepstep.orchestrator.commits import write_manifest
from keepstep.storage import posix, put_new
from keepstep.storage.disposal import dispose
from keepstep.storage.errors import StorageError
from keepstep.storage.layout import log_key, rank_index_name
from keepstep.storage.manifest import RankIndex, merge
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store

RANDOM_SUBSETS = 1  # at each instant, beside every prefix
GOES_ON = 8  # after every so many power losses the run goes on

Scenario = Callable[[Store, Recorder], None]


def life(store: Store, recorder: Recorder) -> None:
    """Two reigns: saves that retire older ones, snapshots of the log, a save without a commit record, a successor that goes on."""
    first = play(store, recorder, saves=4)
    recorder.mark("saving", 5 * INTERVAL)
    first.persist(5 * INTERVAL)
    play(store, recorder, saves=2)


def play(store: Store, recorder: Recorder, *, saves: int, run: type[TinyRun] = TinyRun) -> TinyRun:
    reign = run(store, tell=recorder.mark)
    recorder.mark("log", len(reign.log.records))
    reign.launch()
    for _ in range(saves):
        reign.save(reign.newest_step + INTERVAL)
        recorder.mark("log", len(reign.log.records))
    return reign


def record(root: Path, scenario: Scenario = life, *, forgets: frozenset[str] = frozenset()) -> list[Event]:
    """Everything that the scenario did to the disk, in order."""
    root.mkdir()
    recorder = Recorder(root, forgets)
    with recorder.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(RunLog.__init__.__kwdefaults__, "period", 4)  # records from one snapshot to the next
        scenario(Store.open(root), recorder)
    return recorder.events


@dataclass(frozen=True, slots=True)
class Known:
    """What the program was sure of when the power went."""

    num_records: int
    committed: int  # step, 0: none
    saving: int

    @staticmethod
    def of(marks: tuple[Mark, ...]) -> Known:
        newest = {mark.what: mark.number for mark in marks}
        return Known(newest.get("log", 0), newest.get("committed", 0), newest.get("saving", 0))


def disks(events: list[Event], chance: random.Random) -> Iterator[tuple[Known, Disk]]:
    """Every disk that the model allows after each change: prefixes of what was pending, torn ends, and random parts of it."""
    for at, event in enumerate(events, start=1):
        if isinstance(event, Sync | Mark):
            continue  # fewer disks are possible after it than before it
        crash = Crash(events[:at])
        known, pending = Known.of(crash.marks), crash.pending()
        for cut in range(len(pending) + 1):
            yield known, crash.disk(lost=pending[cut:])
        for shape in torn_shapes(event):
            yield known, crash.disk(lost=(), torn={at - 1: shape})
        for _ in range(RANDOM_SUBSETS if len(pending) > 1 else 0):
            yield known, crash.disk(lost=[position for position in pending if chance.random() < 0.5])


def distinct(found: Iterator[tuple[Known, Disk]]) -> Iterator[tuple[Known, dict[str, bytes]]]:
    seen: set[tuple[Known, bytes]] = set()
    for known, disk in found:
        tree = disk.tree()
        digest = hashlib.blake2b(repr(sorted(tree.items())).encode()).digest()
        if (known, digest) not in seen:
            seen.add((known, digest))
            yield known, tree


def write_tree(folder: Path, tree: dict[str, bytes]) -> Path:
    for name, body in tree.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    return folder


def judge(folder: Path, known: Known, records: dict[str, bytes], *, goes_on: bool) -> None:
    """What a successor finds. Raises AssertionError or StorageError when a promise is broken.

    Args:
        records: the bytes of every record that was ever written.
        goes_on: the successor saves, too.
    """
    store = Store.open(folder)
    store.parallel_reads = 1  # threads cost more than these few bytes
    log = RunLog.open(store)
    assert log.alarms == [], "a half record is taken for one, or one is missing"
    assert log.lineage == RunLog.read_all(store).lineage, "a snapshot says something else than the records"
    found = store.list("log")
    assert list(found[: known.num_records]) == [log_key(number) for number in range(known.num_records)]
    assert all(store.get(key) == records[key] for key in found if key in records)
    successor = TinyRun(store)
    successor.launch()
    assert known.committed <= successor.newest_step <= max(known.committed, known.saving)
    for commit in successor.log.lineage.commits:
        if successor.log.lineage.is_usable(commit):
            load(store, commit)
    if goes_on:
        successor.save(successor.newest_step + INTERVAL)


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is possible: thousands of small files are written, and nobody has to fsync them."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def failures(events: list[Event], scratch: Path, *, stop_after: int = 1) -> list[str]:
    """What is wrong after which power losses."""
    records = {path: body for path, body in whole(events).tree().items() if path.startswith("log/")}
    found: list[str] = []
    for number, (known, tree) in enumerate(distinct(disks(events, random.Random(0)))):
        folder = scratch / str(number)
        try:
            judge(write_tree(folder, tree), known, records, goes_on=number % GOES_ON == 0)
        except (AssertionError, StorageError) as error:
            found.append(f"{known}: {type(error).__name__}: {error}; on the disk: {sorted(tree)}")
        shutil.rmtree(folder, ignore_errors=True)
        if len(found) == stop_after:
            break
    return found


def whole(events: list[Event]) -> Disk:
    """Nothing was lost."""
    return Crash(events).disk(lost=())


def files_below(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_old_or_the_new_checkpoint_always_loads(scratch: Path) -> None:
    events = record(scratch / "recorded")
    assert whole(events).tree() == files_below(scratch / "recorded"), "a call was not recorded: the model is blind for it"
    assert failures(events, scratch) == []


class CommitsFirst(TinyRun):
    """The commit record comes before the manifest."""

    def commit(self, request: ev.Commit) -> None:
        bodies = [self.store.get(f"{request.directory}/{rank_index_name(part.rank)}") for part in request.indexes]
        self.logbook.commit(merge([RankIndex.parse(body) for body in bodies]))
        self.tell("committed", request.step)
        write_manifest(self.store, request)


class DeletesFirst(TinyRun):
    """The oldest checkpoint is deleted before the record that retires it."""

    def tidy(self) -> None:
        if len(self.log.lineage.commits) > KEEP:
            dispose(self.store, self.log.lineage.commits[0].directory)
        super().tidy()


def life_of(run: type[TinyRun]) -> Scenario:
    def scenario(store: Store, recorder: Recorder) -> None:
        play(store, recorder, saves=3, run=run)

    return scenario


def in_place(path: Path, body: bytes) -> bool:
    """put_new without a temporary file: it writes under the final name."""
    put_new.make_directories(path.parent)
    put_new.write_durably(path, body)
    put_new.sync_directory(path.parent)
    return True


def write_without_sync(store: posix.PosixStore, key: str, blocks: Iterable[bytes | memoryview], *, num_bytes: int) -> None:
    WRITE_FILE(store, key, blocks, num_bytes=num_bytes, sync=False)


WRITE_FILE = posix.PosixStore.write_file
LEFT_OUT: dict[str, list[tuple[object, str, Callable[..., object]]]] = {
    "the fsync of shards": [(posix.PosixStore, "write_file", write_without_sync)],
    "the fsync of folders": [(put_new, "sync_directory", lambda path: None), (posix, "sync_directory", lambda path: None)],
    "the fsync of a new folder's parent": [
        (module, "make_directories", lambda path: path.mkdir(parents=True, exist_ok=True)) for module in (put_new, posix)
    ],
    "the temporary file": [(posix, "put_new_posix", in_place)],
}


@pytest.mark.slow
class TestMutants:
    """The model is worth something: whatever the protocol leaves out, it finds."""

    def test_without_any_fsync_of_files(self, scratch: Path) -> None:
        (failure,) = failures(record(scratch / "recorded", life_of(TinyRun), forgets=frozenset({"file"})), scratch)
        assert "a half record" in failure

    @pytest.mark.parametrize("run", [CommitsFirst, DeletesFirst])
    def test_another_order(self, scratch: Path, run: type[TinyRun]) -> None:
        (failure,) = failures(record(scratch / "recorded", life_of(run)), scratch)
        assert "damaged checkpoint" in failure

    @pytest.mark.parametrize("left_out", LEFT_OUT.values(), ids=[name.replace(" ", "-") for name in LEFT_OUT])
    def test_without(self, scratch: Path, left_out: list[tuple[object, str, Callable[..., object]]]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for owner, name, mutant in left_out:
                patch.setattr(owner, name, mutant)
            events = record(scratch / "recorded", life_of(TinyRun))
        assert failures(events, scratch)
