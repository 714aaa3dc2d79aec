"""Large files: whatever way a block goes to the disk, the file holds the bytes in order, or nothing of it stays."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepstep.storage import directio
from keepstep.storage.errors import StoreError, StoreFull
from keepstep.storage.posix import PosixStore

LARGE = 3 * directio.ALIGNMENT


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directio, "LARGE_BYTES", LARGE)


def aligned(num_bytes: int, seed: int = 0) -> memoryview:
    """As a staging buffer is: beginning at a page."""
    memory = memoryview(mmap.mmap(-1, max(1, num_bytes)))[:num_bytes]
    memory[:] = random.Random(seed).randbytes(num_bytes)
    return memory


def cut(body: memoryview, sizes: list[int]) -> Iterator[memoryview]:
    at = 0
    for size in sizes:
        yield body[at : at + size]
        at += size
    yield body[at:]


pages = st.integers(0, 5).map(lambda count: count * directio.ALIGNMENT)
sizes = st.lists(st.one_of(pages, st.integers(0, 2 * directio.ALIGNMENT)), max_size=6)


class TestBytes:
    @settings(max_examples=60, deadline=None)
    @given(sizes=sizes, rest=st.integers(0, 3 * LARGE), misplaced=st.booleans())
    def test_blocks_of_any_size_and_place_follow_each_other(
        self, tmp_path_factory: pytest.TempPathFactory, sizes: list[int], rest: int, misplaced: bool
    ) -> None:
        body = aligned(sum(sizes) + rest + 1)[int(misplaced) :]
        store = PosixStore(tmp_path_factory.mktemp("root"))
        store.write_file("data/f", cut(body, sizes), num_bytes=body.nbytes)
        assert store.get("data/f") == body

    def test_many_blocks_are_written_by_several_threads_in_their_places(self, tmp_path: Path) -> None:
        body = aligned(200 * directio.ALIGNMENT + 17)
        store = PosixStore(tmp_path)
        store.write_file("f", cut(body, [directio.ALIGNMENT] * 200), num_bytes=body.nbytes)
        assert store.get("f") == body

    def test_without_direct_writes_the_page_cache_takes_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real, body = os.open, aligned(2 * LARGE)

        def refusing(path: Any, flags: int, *more: Any, **options: Any) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "no O_DIRECT here")
            return real(path, flags, *more, **options)

        monkeypatch.setattr(os, "open", refusing)
        store = PosixStore(tmp_path)
        store.write_file("f", [body], num_bytes=body.nbytes)
        assert store.get("f") == body

    def test_a_block_that_is_refused_or_written_in_part_goes_through_the_page_cache(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, body, answers = os.pwrite, aligned(4 * LARGE), iter([errno.EINVAL, 0, None, errno.EINVAL])

        def fickle(descriptor: int, data: Any, offset: int) -> int:
            if not os.get_blocking(descriptor) or not _is_direct(descriptor):
                return real(descriptor, data, offset)
            answer = next(answers, None)
            if answer:
                raise OSError(answer, "not like this")
            return real(descriptor, data[: directio.ALIGNMENT] if answer == 0 else data, offset)

        monkeypatch.setattr(os, "pwrite", fickle)
        store = PosixStore(tmp_path)
        store.write_file("f", cut(body, [LARGE] * 3), num_bytes=body.nbytes)
        assert store.get("f") == body


def _is_direct(descriptor: int) -> bool:
    flags = Path(f"/proc/self/fdinfo/{descriptor}").read_text().split("flags:")[1].split()[0]
    return bool(int(flags, 8) & os.O_DIRECT)


class TestTrouble:
    def test_an_error_of_the_disk_is_told_and_nothing_stays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*arguments: Any) -> int:
            raise OSError(errno.ENOSPC, "no space left")

        store = PosixStore(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(StoreFull):
                store.write_file("f", cut(aligned(4 * LARGE), [LARGE] * 3), num_bytes=4 * LARGE)
        assert store.list() == []

    def test_what_the_blocks_raise_is_told_and_nothing_stays(self, tmp_path: Path) -> None:
        def blocks() -> Iterator[memoryview]:
            yield aligned(LARGE)
            raise KeyError("torn")

        store = PosixStore(tmp_path)
        with pytest.raises(KeyError, match="torn"):
            store.write_file("f", blocks(), num_bytes=4 * LARGE)
        assert store.list() == []

    def test_too_few_bytes_are_no_file(self, tmp_path: Path) -> None:
        store = PosixStore(tmp_path)
        with pytest.raises(StoreError, match="bytes came"):
            store.write_file("f", [aligned(LARGE)], num_bytes=4 * LARGE)
        assert store.list() == []

    def test_blocks_are_asked_for_one_after_the_other(self, tmp_path: Path) -> None:
        """Their hashes are made in that order, into one list."""
        asked, body = list[int](), aligned(64 * LARGE)

        def blocks() -> Iterator[memoryview]:  # a generator that two threads enter at once raises ValueError
            for start in range(0, body.nbytes, LARGE):
                asked.append(start)
                yield body[start : start + LARGE]

        PosixStore(tmp_path).write_file("f", blocks(), num_bytes=body.nbytes)
        assert asked == sorted(asked)
