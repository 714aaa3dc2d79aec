"""Every byte of a checkpoint is checked before anybody trusts it, from whichever tier it comes."""

from __future__ import annotations

import itertools
import random
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from s3server import S3Server

from keepstep.storage.errors import DamagedCheckpoint, StoreUnavailable
from keepstep.storage.layout import MANIFEST_NAME, METADATA_NAME, rank_index_name
from keepstep.storage.manifest import FileEntry, Manifest, RankIndex, hash_blocks, merge
from keepstep.storage.memory import available_bytes
from keepstep.storage.posix import PosixStore
from keepstep.storage.remote import MemoryStore
from keepstep.storage.store import OpenFile, Store, scatter
from keepstep.storage.verify import MAX_CUTS, CheckpointReader, Piece, read_manifest, verify_checkpoint

DIRECTORY = "data/a000001/s000000020-00000000"
BLOCK = 100
CONTENT = {name: random.Random(name).randbytes(1_050) for name in ("__0_0.distcp", "__1_0.distcp", METADATA_NAME)}
SMALL = "__0_0.distcp"
OTHER = {SMALL: "__1_0.distcp", METADATA_NAME: SMALL, MANIFEST_NAME: rank_index_name(0), rank_index_name(0): rank_index_name(1)}


def write_checkpoint(store: Store) -> Manifest:
    """Two ranks: a shard of ten and a half blocks each, and rank 0's .metadata; the rank indexes, and the manifest."""
    indexes = []
    for rank, names in enumerate(((SMALL, METADATA_NAME), ("__1_0.distcp",))):
        files = tuple(write_file(store, name) for name in names)
        indexes.append(RankIndex(attempt=1, step=20, rank=rank, world_size=2, directory=DIRECTORY, files=files, tensors=()))
        assert store.put_new(f"{DIRECTORY}/{rank_index_name(rank)}", indexes[-1].body())
    manifest = merge(indexes)
    assert store.put_new(f"{DIRECTORY}/{MANIFEST_NAME}", manifest.body())
    return manifest


def write_file(store: Store, name: str) -> FileEntry:
    content = CONTENT[name]
    store.write_file(f"{DIRECTORY}/{name}", [content], num_bytes=len(content))
    return FileEntry(name=name, num_bytes=len(content), block_bytes=BLOCK, hashes=hash_blocks(memoryview(content), BLOCK))


def change(store: Store, name: str, how: Callable[[bytes], bytes]) -> None:
    store.put(f"{DIRECTORY}/{name}", how(store.get(f"{DIRECTORY}/{name}")))


def flipped(body: bytes, position: int) -> bytes:
    return body[:position] + bytes([body[position] ^ 1]) + body[position + 1 :]


def flip(store: Store, name: str, position: int) -> None:
    change(store, name, lambda body: flipped(body, position))


def swap(store: Store, one: str, other: str) -> None:
    bodies = [store.get(f"{DIRECTORY}/{name}") for name in (one, other)]
    for name, body in zip((other, one), bodies, strict=True):
        store.put(f"{DIRECTORY}/{name}", body)


def read(reader: CheckpointReader, name: str, start: int, stop: int) -> bytes:
    memory = bytearray(stop - start)
    reader.read_into(name, start, memoryview(memory))
    return bytes(memory)


DAMAGE: dict[str, Callable[[Store, str], None]] = {
    "first bit": lambda store, name: flip(store, name, 0),
    "last bit": lambda store, name: flip(store, name, -1 % len(store.get(f"{DIRECTORY}/{name}"))),
    "truncated": lambda store, name: change(store, name, lambda body: body[:-1]),
    "cut at a block": lambda store, name: change(store, name, lambda body: body[:BLOCK]),
    "empty": lambda store, name: change(store, name, lambda body: b""),
    "longer": lambda store, name: change(store, name, lambda body: body + b"x"),
    "zeroed": lambda store, name: change(store, name, lambda body: body[:200] + bytes(50) + body[250:]),
    "deleted": lambda store, name: store.delete(f"{DIRECTORY}/{name}"),
    "swapped": lambda store, name: swap(store, name, OTHER[name]),
}


def check_that_damage_is_found(store: Store, damage: str, kind: str) -> None:
    manifest = write_checkpoint(store)
    DAMAGE[damage](store, kind)
    with pytest.raises(DamagedCheckpoint) as caught:
        verify_checkpoint(store, DIRECTORY, manifest.sha256())
    assert caught.value.directory == DIRECTORY
    assert caught.value.file in ((kind, OTHER[kind]) if damage == "swapped" else (kind,))
    store.delete_tree(DIRECTORY)


class TestVerifying:
    def test_an_intact_checkpoint_passes_and_tells_its_progress(self, store: Store) -> None:
        manifest, seen = write_checkpoint(store), list[tuple[int, int]]()
        assert verify_checkpoint(store, DIRECTORY, manifest.sha256(), lambda done, all_: seen.append((done, all_))) == manifest
        assert seen == sorted(seen)
        assert (len(seen), seen[-1]) == (33, (3_150, 3_150))

    @pytest.mark.parametrize("damage", list(DAMAGE))
    def test_any_damage_to_any_kind_of_file_is_found_and_named(self, tmp_path: Path, damage: str) -> None:
        for kind in OTHER:
            check_that_damage_is_found(Store.open(tmp_path / kind), damage, kind)

    @pytest.mark.s3
    @pytest.mark.slow
    def test_any_damage_in_an_object_store_is_found_and_named(self, s3_server: S3Server) -> None:
        store = Store.open(f"{s3_server.url}/{uuid.uuid4().hex}", s3_server.options)
        for damage, kind in zip(DAMAGE, itertools.cycle(OTHER), strict=False):
            check_that_damage_is_found(store, damage, kind)

    @pytest.mark.parametrize(
        ("damage", "file", "why"),
        [
            (lambda store: flip(store, SMALL, 0), SMALL, "block 0 (from byte 0) does not have the hash"),
            (lambda store: flip(store, SMALL, 1_049), SMALL, "block 10 (from byte 1000)"),
            (lambda store: store.delete(f"{DIRECTORY}/{SMALL}"), SMALL, "is missing"),
            (lambda store: store.put(f"{DIRECTORY}/{SMALL}", CONTENT[SMALL][:-1]), SMALL, "has 1049 bytes, 1050 were written"),
            (lambda store: store.put(f"{DIRECTORY}/{SMALL}", CONTENT[SMALL] + b"x"), SMALL, "has 1051 bytes"),
            (lambda store: store.delete(f"{DIRECTORY}/{MANIFEST_NAME}"), MANIFEST_NAME, "is missing"),
            (lambda store: flip(store, MANIFEST_NAME, 50), MANIFEST_NAME, "was committed"),
            (lambda store: store.delete(f"{DIRECTORY}/rank-00001.json"), "rank-00001.json", "is missing"),
            (lambda store: flip(store, "rank-00001.json", 9), "rank-00001.json", "is not the index that the manifest was made of"),
        ],
    )
    def test_the_reason_says_where_and_what(self, tmp_path: Path, damage: Callable[[Store], None], file: str, why: str) -> None:
        store = Store.open(tmp_path)
        manifest = write_checkpoint(store)
        damage(store)
        with pytest.raises(DamagedCheckpoint) as caught:
            verify_checkpoint(store, DIRECTORY, manifest.sha256())
        assert caught.value.file == file
        assert why in caught.value.why

    def test_a_manifest_of_another_checkpoint_is_not_the_committed_one(self, store: Store) -> None:
        manifest = write_checkpoint(store)
        store.put(f"{DIRECTORY}/{MANIFEST_NAME}", replace(manifest, step=40).body())
        with pytest.raises(DamagedCheckpoint, match="was committed"):
            read_manifest(store, DIRECTORY, manifest.sha256())

    def test_a_store_that_cannot_be_asked_is_no_damage(self) -> None:
        class Unreachable(MemoryStore):
            def get(self, key: str) -> bytes:
                raise StoreUnavailable("time-out")

        store = Unreachable(uuid.uuid4().hex)
        with pytest.raises(StoreUnavailable):
            read_manifest(store, DIRECTORY, "00")
        body = write_checkpoint(store).body()
        store.get = lambda key: body if key.endswith(MANIFEST_NAME) else Unreachable.get(store, key)  # type: ignore[method-assign]
        with pytest.raises(StoreUnavailable):
            verify_checkpoint(store, DIRECTORY, Manifest.parse(body).sha256())

    def test_whoever_watches_the_progress_can_end_it(self, tmp_path: Path) -> None:
        store = Counting(tmp_path)
        manifest = write_checkpoint(store)

        def enough(done: int, total: int) -> None:
            raise InterruptedError

        with pytest.raises(InterruptedError):
            verify_checkpoint(store, DIRECTORY, manifest.sha256(), enough)
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("read")]
        assert threads == []


class Counting(PosixStore):
    """Counts how often each block is read; damages the first reading of those in `lies`."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: Counter[tuple[str, int]] = Counter()
        self.lies: set[tuple[str, int]] = set()

    def open_file(self, key: str) -> OpenFile:
        return CountedFile(self, key.rpartition("/")[2], super().open_file(key))


@dataclass(frozen=True)
class CountedFile:
    store: Counting
    name: str
    inner: OpenFile

    def read_into(self, start: int, *destinations: memoryview) -> int:
        place = (self.name, start // BLOCK)
        count = self.inner.read_into(start, *destinations)
        if place in self.store.lies and not self.store.reads[place]:
            destinations[-1][-1] ^= 1
        self.store.reads[place] += 1
        return count

    def close(self) -> None:
        self.inner.close()


@dataclass(frozen=True)
class Held:
    """A file in memory."""

    body: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.body)

    def read_into(self, start: int, *destinations: memoryview) -> int:
        scatter(self.body[start : start + sum(view.nbytes for view in destinations)], destinations)
        return min(len(self.body) - start, sum(view.nbytes for view in destinations))

    def close(self) -> None:
        """Nothing is open."""


class TestReader:
    def test_any_pieces_together_give_the_bytes_that_were_written_and_read_each_block_once(self, tmp_path: Path) -> None:
        store, chance = Counting(tmp_path), random.Random(0)
        reader = CheckpointReader(store, DIRECTORY, write_checkpoint(store))
        for _ in range(100):
            store.reads.clear()
            wanted = [(chance.choice(list(CONTENT)), *sorted(chance.choices(range(1_051), k=2))) for _ in range(chance.randrange(20))]
            memory = [bytearray(stop - start) for _, start, stop in wanted]
            reader.read_pieces(Piece(name, start, memoryview(body)) for (name, start, _), body in zip(wanted, memory, strict=True))
            assert [bytes(body) for body in memory] == [CONTENT[name][start:stop] for name, start, stop in wanted]
            touched = {(name, at // BLOCK) for name, start, stop in wanted for at in range(start, stop)}
            assert store.reads == Counter(touched)
        assert (reader.alarms, reader.bytes_from_memory) == ([], 0)

    def test_more_crumbs_than_a_system_call_takes(self, tmp_path: Path) -> None:
        store, body = PosixStore(tmp_path), random.Random(1).randbytes(10 * MAX_CUTS)
        store.write_file(f"{DIRECTORY}/{SMALL}", [body], num_bytes=len(body))
        file = FileEntry(name=SMALL, num_bytes=len(body), block_bytes=len(body), hashes=hash_blocks(memoryview(body), len(body)))
        index = RankIndex(attempt=1, step=20, rank=0, world_size=1, directory=DIRECTORY, files=(file,), tensors=())
        reader, places = CheckpointReader(store, DIRECTORY, merge([index])), range(0, len(body), 5)
        crumbs = [bytearray(3) for _ in places]
        reader.read_pieces(Piece(SMALL, at, memoryview(crumb)) for at, crumb in zip(places, crumbs, strict=True))
        assert [bytes(crumb) for crumb in crumbs] == [body[at : at + 3] for at in places]
        views = [memoryview(bytearray(1)) for _ in body]
        assert store.read_into(f"{DIRECTORY}/{SMALL}", 0, *views) == len(body)
        assert b"".join(views) == body

    def test_a_range_and_a_whole_file(self, store: Store) -> None:
        reader = CheckpointReader(store, DIRECTORY, write_checkpoint(store))
        assert read(reader, SMALL, 99, 301) == CONTENT[SMALL][99:301]
        assert reader.read_file(SMALL) == CONTENT[SMALL]
        assert reader.bytes_from_store == 202 + 1_050

    def test_every_flipped_byte_is_found_by_every_range_that_touches_its_block(self, tmp_path: Path) -> None:
        store, chance = Store.open(tmp_path), random.Random(0)
        manifest = write_checkpoint(store)
        for _ in range(50):
            position = chance.randrange(1_050)
            flip(store, SMALL, position)
            reader = CheckpointReader(store, DIRECTORY, manifest)
            with pytest.raises(DamagedCheckpoint, match=f"block {position // BLOCK} "):
                read(reader, SMALL, position // BLOCK * BLOCK, position // BLOCK * BLOCK + 1)
            with pytest.raises(DamagedCheckpoint):
                reader.read_file(SMALL)
            flip(store, SMALL, position)

    def test_damage_in_several_places_names_the_first_one(self, tmp_path: Path) -> None:
        store = Store.open(tmp_path)
        manifest = write_checkpoint(store)
        for name, position in itertools.product(CONTENT, (910, 310, 750)):
            flip(store, name, position)
        with pytest.raises(DamagedCheckpoint, match=r"\.metadata: block 3 "):
            CheckpointReader(store, DIRECTORY, manifest).read_pieces(Piece(name, 0, memoryview(bytearray(1_050))) for name in CONTENT)

    def test_what_was_damaged_on_its_way_only_is_read_again_and_told(self, tmp_path: Path) -> None:
        store = Counting(tmp_path)
        reader = CheckpointReader(store, DIRECTORY, write_checkpoint(store))
        store.lies.add((SMALL, 4))
        assert reader.read_file(SMALL) == CONTENT[SMALL]
        assert reader.alarms == [f"{DIRECTORY}/{SMALL}: block 4 came damaged from the store, and was right when it was read again"]
        assert store.reads[SMALL, 4] == 2

    def test_damage_elsewhere_in_the_file_does_not_spoil_what_is_intact(self, store: Store) -> None:
        manifest = write_checkpoint(store)
        flip(store, SMALL, 500)
        assert read(CheckpointReader(store, DIRECTORY, manifest), SMALL, 600, 900) == CONTENT[SMALL][600:900]

    def test_a_file_that_was_cut_is_damaged(self, store: Store) -> None:
        manifest = write_checkpoint(store)
        store.put(f"{DIRECTORY}/{SMALL}", CONTENT[SMALL][:450])
        reader = CheckpointReader(store, DIRECTORY, manifest)
        with pytest.raises(DamagedCheckpoint, match="ends at byte 450, 1050 were written"):
            reader.read_file(SMALL)

    def test_a_range_behind_the_end_and_a_file_that_nobody_wrote(self, tmp_path: Path) -> None:
        store = Store.open(tmp_path)
        reader = CheckpointReader(store, DIRECTORY, write_checkpoint(store))
        with pytest.raises(DamagedCheckpoint, match="bytes up to 1051 are wanted"):
            read(reader, SMALL, 1_000, 1_051)
        with pytest.raises(KeyError):
            reader.read_file("absent")

    def test_wider_elements_are_filled_as_bytes(self, tmp_path: Path) -> None:
        store, memory = Store.open(tmp_path), memoryview(bytearray(400)).cast("f")
        CheckpointReader(store, DIRECTORY, write_checkpoint(store)).read_into(SMALL, 3, memory)
        assert memory.cast("B") == CONTENT[SMALL][3:403]


class TestMemoryTier:
    def reader(self, store: Store, held: dict[str, bytes]) -> CheckpointReader:
        manifest = write_checkpoint(store)
        return CheckpointReader(store, DIRECTORY, manifest, lambda _, name: Held(held[name]) if name in held else None)

    def test_what_is_in_memory_is_not_read_from_the_store(self, tmp_path: Path) -> None:
        store = Store.open(tmp_path)
        reader = self.reader(store, {SMALL: CONTENT[SMALL]})
        store.delete(f"{DIRECTORY}/{SMALL}")
        assert reader.read_file(SMALL) == CONTENT[SMALL]
        assert (reader.bytes_from_memory, reader.bytes_from_store) == (1_050, 0)

    def test_what_is_not_in_memory_comes_from_the_store(self, tmp_path: Path) -> None:
        reader = self.reader(Store.open(tmp_path), {})
        assert reader.read_file(SMALL) == CONTENT[SMALL]
        assert (reader.bytes_from_memory, reader.bytes_from_store) == (0, 1_050)

    def test_damage_in_memory_is_reported_and_repaired_from_the_store(self, tmp_path: Path) -> None:
        reader = self.reader(Store.open(tmp_path), {SMALL: flipped(CONTENT[SMALL], 450)})
        assert reader.read_file(SMALL) == CONTENT[SMALL]
        assert (reader.bytes_from_memory, reader.bytes_from_store) == (950, 100)
        assert reader.alarms == [f"{DIRECTORY}/{SMALL}: block 4 in this node's memory is damaged, read from the store instead"]

    def test_damage_in_every_tier_is_damage(self, tmp_path: Path) -> None:
        store = Store.open(tmp_path)
        reader = self.reader(store, {SMALL: flipped(CONTENT[SMALL], 450)})
        flip(store, SMALL, 420)
        with pytest.raises(DamagedCheckpoint, match="block 4"):
            reader.read_file(SMALL)

    def test_memory_of_another_size_is_not_used(self, tmp_path: Path) -> None:
        reader = self.reader(Store.open(tmp_path), {SMALL: CONTENT[SMALL] + b"x"})
        assert reader.read_file(SMALL) == CONTENT[SMALL]
        assert reader.bytes_from_memory == 0

    def test_verifying_trusts_no_memory(self, tmp_path: Path) -> None:
        store = Store.open(tmp_path)
        reader = self.reader(store, CONTENT)
        reader.read_file(SMALL)
        flip(store, SMALL, 0)
        with pytest.raises(DamagedCheckpoint, match=r"__0_0.distcp: block 0"):
            list(reader.verify_blocks())


class TestAvailableMemory:
    """What staging may take is the least of the machine's and of every cgroup's rest."""

    def folders(self, tmp_path: Path, cgroup: str, **files: str) -> tuple[Path, Path]:
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "meminfo").write_text("MemTotal:  100 kB\nMemAvailable:  50 kB\n")
        (tmp_path / "proc" / "self" / "cgroup").write_text(cgroup)
        for name, text in files.items():
            path = tmp_path / "cgroups" / name.replace("__", "/").replace("_of_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "proc", tmp_path / "cgroups"

    def test_without_a_limit_the_machine_decides(self, tmp_path: Path) -> None:
        assert available_bytes(*self.folders(tmp_path, "0::/job\n", job__memory_of_max="max")) == 50 * 1024

    def test_a_limit_of_a_parent_counts_and_page_cache_is_free(self, tmp_path: Path) -> None:
        files = {"a__memory_of_max": "30000\n", "a__memory_of_current": "20000\n", "a__memory_of_stat": "anon 1\ninactive_file 500\n"}
        assert available_bytes(*self.folders(tmp_path, "0::/a/b\n", a__b__memory_of_max="max", **files)) == 10_500

    def test_the_older_version_is_read_too(self, tmp_path: Path) -> None:
        folder = {"memory__a__memory_of_limit_in_bytes": "9000", "memory__a__memory_of_usage_in_bytes": "9500"}
        assert available_bytes(*self.folders(tmp_path, "4:memory:/a\n1:cpu:/\n0::/\n", **folder)) == 0
