"""The persister's buffers: two per rank, in anonymous shared memory that outlives the rank.

While one is filled, the other still holds the newest durable checkpoint: the memory tier of this node.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from .arena import StagedFile
from .memory import available_bytes
from .sequence import HEADER_BYTES, SequenceLock

BUFFERS_PER_RANK: Final = 2
_numbers: Iterator[int] = itertools.count(1)


class Use(Enum):
    FREE = auto()
    FILLING = auto()  # a rank writes into it
    SUBMITTED = auto()  # we write it to the store
    RESIDENT = auto()  # holds a durable checkpoint


@dataclass(slots=True, eq=False)
class SharedBuffer:
    """One memfd: `num_bytes` for files, then a header. `files`: where those of `directory` lie, while it is submitted or resident."""

    num_bytes: int
    number: int
    descriptor: int
    view: memoryview
    lock: SequenceLock
    use: Use = Use.FREE
    template: str = ""
    directory: str = ""
    files: dict[str, StagedFile] = field(default_factory=dict)
    age: int = 0  # grows with every durable checkpoint of the rank

    @staticmethod
    def allocate(num_bytes: int) -> SharedBuffer:
        """Every page is touched here, once: first touch costs 5 to 10 times a copy.

        Raises:
            OSError: not enough memory. Asked before touching: shared memory has no limit of its own, the kernel would kill somebody.
        """
        size = max(mmap.PAGESIZE, -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        if size > (available := available_bytes()):
            raise OSError(errno.ENOMEM, f"only {available} bytes are available")
        descriptor = os.memfd_create("keepstep-arena", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, size + HEADER_BYTES)
            view = memoryview(mmap.mmap(descriptor, size + HEADER_BYTES, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ))
        except OSError:
            os.close(descriptor)
            raise
        lock = SequenceLock(view[size:])
        return SharedBuffer(num_bytes=size, number=next(_numbers), descriptor=descriptor, view=view[:size], lock=lock)

    def free(self) -> None:
        """Our part of the memory; a rank that still maps it keeps its own."""
        os.close(self.descriptor)
        self.view = memoryview(b"")  # the mapping goes with its last reader
        self.lock = SequenceLock(memoryview(bytes(HEADER_BYTES)))


class Slot:
    """The buffers of one rank number. Not locked: the persister's lock covers it."""

    def __init__(self) -> None:
        self.buffers: list[SharedBuffer] = []
        self.attempt = 0  # newest attempt that connected

    @property
    def is_busy(self) -> bool:
        return any(buffer.use is Use.SUBMITTED for buffer in self.buffers)

    def reserve(self, num_bytes: int) -> list[tuple[SharedBuffer, int | None]]:
        """All buffers, at least `num_bytes` large, each with the number of the one that it replaced."""
        while len(self.buffers) < BUFFERS_PER_RANK:
            self.buffers.append(SharedBuffer.allocate(num_bytes))
        return [self._grow(buffer, num_bytes) if buffer.use is Use.FREE else (buffer, None) for buffer in list(self.buffers)]

    def hand_out(self, num_bytes: int, template: str) -> tuple[SharedBuffer, bool, int | None]:
        """The buffer to fill next, whether it is fresh, and the number of the buffer that it replaced."""
        assert not self.is_busy
        if len(self.buffers) < BUFFERS_PER_RANK:
            self.buffers.insert(0, SharedBuffer.allocate(num_bytes))
        oldest = min(self.buffers, key=lambda buffer: buffer.age)
        buffer, replaced = self._grow(oldest, num_bytes)
        is_fresh = not template or buffer.template != template
        if is_fresh:
            buffer.template = ""  # its headers are about to be overwritten; the next submission names them
        buffer.use, buffer.directory, buffer.files = Use.FILLING, "", {}
        return buffer, is_fresh, replaced

    def reclaim(self) -> None:
        """The rank's connection is gone: what it was filling is given to nobody again.

        It may live on for a moment, in the middle of a copy that needs no system call; it then writes into memory that nobody reads.
        """
        for buffer in [buffer for buffer in self.buffers if buffer.use is Use.FILLING]:
            self.buffers.remove(buffer)
            buffer.free()

    def submitted(self, number: int, *, template: str, directory: str, files: list[StagedFile]) -> SharedBuffer:
        buffer = next(buffer for buffer in self.buffers if buffer.number == number)
        assert buffer.use is Use.FILLING
        buffer.use, buffer.template, buffer.directory = Use.SUBMITTED, template, directory
        buffer.files = {file.name: file for file in files}
        return buffer

    def settled(self, buffer: SharedBuffer, *, is_durable: bool) -> None:
        if is_durable:
            buffer.use, buffer.age = Use.RESIDENT, 1 + max(other.age for other in self.buffers)
        else:
            buffer.use, buffer.directory, buffer.files = Use.FREE, "", {}

    def find(self, directory: str, file: str) -> SharedBuffer | None:
        return next((b for b in self.buffers if b.use is Use.RESIDENT and b.directory == directory and file in b.files), None)

    def free(self) -> None:
        for buffer in self.buffers:
            buffer.free()
        self.buffers.clear()

    def _grow(self, buffer: SharedBuffer, num_bytes: int) -> tuple[SharedBuffer, int | None]:
        if buffer.num_bytes >= num_bytes:
            return buffer, None
        larger = SharedBuffer.allocate(num_bytes)
        larger.age = buffer.age
        self.buffers[self.buffers.index(buffer)] = larger
        buffer.free()
        return larger, buffer.number
