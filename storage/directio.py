"""Writing a large file past the page cache, several blocks at once.

A checkpoint is read back by another process, after a while, or never; a copy of it in the page cache costs the training that goes on the
CPU time of copying and of finding the pages. So large blocks go to the disk straight from the caller's memory (O_DIRECT), a few at a time:
while the disk takes some, the next one is hashed. What O_DIRECT does not take (a file system without it, the unaligned end, memory that
does not begin at a page) goes through the page cache. Either way nothing is durable before fsync.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Final, TypeAlias

from .vectored import write_at

Block: TypeAlias = bytes | memoryview

ALIGNMENT: Final = 4096  # of offsets, lengths and memory: no disk wants more
LARGE_BYTES: Final = 4 << 20  # smaller files are not worth threads
WRITERS: Final = 4  # 268 MB on a virtual disk: see benchmarks/storage.py
_REFUSED: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP})


class DirectFile:
    """A file that exists and is open for writing at `descriptor`; fsync is the caller's business.

    Args:
        num_bytes: how large it will be.
    """

    def __init__(self, path: Path, descriptor: int, num_bytes: int) -> None:
        self._descriptor = descriptor
        self._is_large = num_bytes >= LARGE_BYTES
        self._direct = _open_direct(path) if self._is_large else None

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._direct is not None:
            os.close(self._direct)  # an error of the file system counts, as everywhere

    def write_all(self, blocks: Iterable[Block]) -> int:
        """Writes consecutive blocks, which stay as they are until this returns; the number of bytes.

        Raises:
            OSError: one of them could not be written; or what `blocks` raises.
        """
        places = _Places(blocks)
        if not self._is_large:
            self._write_some(places)
            return places.end
        with ThreadPoolExecutor(WRITERS, thread_name_prefix="disk") as pool:
            for done in [pool.submit(self._write_some, places) for _ in range(WRITERS)]:
                done.result()
        return places.end

    def _write_some(self, places: _Places) -> None:
        try:
            for start, block in places:
                self._write(start, memoryview(block).cast("B"))
        except BaseException:
            places.stop()
            raise

    def _write(self, start: int, block: memoryview) -> None:
        whole = block.nbytes // ALIGNMENT * ALIGNMENT if start % ALIGNMENT == 0 else 0
        done = whole if whole and self._write_direct(start, block[:whole]) else 0
        if done < block.nbytes:
            write_at(self._descriptor, start + done, block[done:])

    def _write_direct(self, start: int, block: memoryview) -> bool:
        """Whether it could be written like this; what a refused or short write has done is written again through the page cache."""
        if self._direct is None:
            return False
        try:
            return os.pwrite(self._direct, block, start) == block.nbytes
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            return False


class _Places:
    """Blocks and where they go, for several threads: each block is asked for by one of them, one after the other."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._blocks = iter(blocks)
        self._lock = Lock()
        self._is_over = False
        self.end = 0

    def __iter__(self) -> Iterator[tuple[int, Block]]:
        while (place := self._next()) is not None:
            yield place

    def _next(self) -> tuple[int, Block] | None:
        with self._lock:
            if self._is_over:
                return None
            block = next(self._blocks, None)
            if block is None:
                self._is_over = True
                return None
            start, self.end = self.end, self.end + memoryview(block).nbytes
            return start, block

    def stop(self) -> None:
        """The others finish the block that they are at."""
        self._is_over = True


def _open_direct(path: Path) -> int | None:
    """None where the file system does not know O_DIRECT."""
    with contextlib.suppress(OSError):
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    return None
