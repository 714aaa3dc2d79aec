"""Every byte of a checkpoint is checked before anybody trusts it, from whichever tier it comes."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from keepstep.storage.errors import DamagedCheckpoint, StoreUnavailable
from keepstep.storage.layout import MANIFEST_NAME
from keepstep.storage.manifest import FileEntry, Manifest, RankIndex, hash_blocks, merge
from keepstep.storage.memory import available_bytes
from keepstep.storage.remote import MemoryStore
from keepstep.storage.store import Store
from keepstep.storage.verify import CheckpointReader, read_manifest, verify_checkpoint

DIRECTORY = "data/a000001/s000000020-00000000"
BLOCK = 100
CONTENT = {f"__{rank}_0.distcp": random.Random(rank).randbytes(1_050) for rank in range(2)}
SMALL = "__0_0.distcp"


def write_checkpoint(store: Store) -> Manifest:
    """Two ranks, a file each, of ten and a half blocks."""
    indexes = []
    for rank, (name, content) in enumerate(CONTENT.items()):
        store.write_file(f"{DIRECTORY}/{name}", [content], num_bytes=len(content))
        file = FileEntry(name=name, num_bytes=len(content), block_bytes=BLOCK, hashes=hash_blocks(memoryview(content), BLOCK))
        indexes.append(RankIndex(attempt=1, step=20, rank=rank, world_size=2, directory=DIRECTORY, files=(file,), tensors=()))
    manifest = merge(indexes)
    assert store.put_new(f"{DIRECTORY}/{MANIFEST_NAME}", manifest.body())
    return manifest


def flip(store: Store, name: str, position: int) -> None:
    body = bytearray(store.get(f"{DIRECTORY}/{name}"))
    body[position] ^= 1
    store.put(f"{DIRECTORY}/{name}", bytes(body))


def read(reader: CheckpointReader, name: str, start: int, stop: int) -> bytes:
    memory = bytearray(stop - start)
    reader.read_into(name, start, memoryview(memory))
    return bytes(memory)


class TestVerifying:
    def test_an_intact_checkpoint_passes_and_tells_its_progress(self, store: Store) -> None:
        manifest, seen = write_checkpoint(store), list[tuple[int, int]]()
        assert verify_checkpoint(store, DIRECTORY, manifest.sha256(), lambda done, all_: seen.append((done, all_))) == manifest
        assert seen == [(1_050, 2_100), (2_100, 2_100)]

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
        ],
    )
    def test_damage_is_found_and_named(self, store: Store, damage: Callable[[Store], None], file: str, why: str) -> None:
        manifest = write_checkpoint(store)
        damage(store)
        with pytest.raises(DamagedCheckpoint) as caught:
            verify_checkpoint(store, DIRECTORY, manifest.sha256())
        assert (caught.value.directory, caught.value.file) == (DIRECTORY, file)
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

        with pytest.raises(StoreUnavailable):
            read_manifest(Unreachable(uuid.uuid4().hex), DIRECTORY, "00")


class TestReader:
    def test_any_range_gives_the_bytes_that_were_written(self, tmp_path: Path) -> None:
        store, chance = Store.open(tmp_path), random.Random(0)
        reader = CheckpointReader(store, DIRECTORY, write_checkpoint(store), cache_bytes=250)
        for _ in range(300):
            start, stop = sorted(chance.choices(range(1_051), k=2))
            assert read(reader, SMALL, start, stop) == CONTENT[SMALL][start:stop]
        assert reader.read_file(SMALL) == CONTENT[SMALL]
        assert (reader.alarms, reader.bytes_from_memory) == ([], 0)

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
        return CheckpointReader(store, DIRECTORY, manifest, lambda _, name: memoryview(held[name]) if name in held else None)

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
        spoilt = bytearray(CONTENT[SMALL])
        spoilt[450] ^= 1
        reader = self.reader(Store.open(tmp_path), {SMALL: bytes(spoilt)})
        assert reader.read_file(SMALL) == CONTENT[SMALL]
        assert (reader.bytes_from_memory, reader.bytes_from_store) == (950, 100)
        assert reader.alarms == [f"{DIRECTORY}/{SMALL}: block 4 in this node's memory is damaged, read from the store instead"]

    def test_damage_in_every_tier_is_damage(self, tmp_path: Path) -> None:
        store, spoilt = Store.open(tmp_path), bytearray(CONTENT[SMALL])
        spoilt[450] ^= 1
        reader = self.reader(store, {SMALL: bytes(spoilt)})
        flip(store, SMALL, 420)
        with pytest.raises(DamagedCheckpoint, match="block 4"):
            reader.read_file(SMALL)

    def test_memory_of_another_size_is_not_used(self, tmp_path: Path) -> None:
        reader = self.reader(Store.open(tmp_path), {SMALL: CONTENT[SMALL] + b"x"})
        assert reader.read_file(SMALL) == CONTENT[SMALL]
        assert reader.bytes_from_memory == 0


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
