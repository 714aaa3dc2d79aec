"""Large objects in parts: in parallel, with a bounded amount of memory for all writers of the process, and nothing left of a failed one."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final

from .errors import StoreError

PART_BYTES: Final = 16 << 20
MAX_PARTS: Final = 10_000
PARALLEL_PARTS: Final = 4  # of one object
MEMORY_BYTES: Final = 8 * PART_BYTES

SendPart = Callable[[int, bytes], dict[str, Any]]  # (number from 1, body) -> what the completion needs of it


class PartMemory:
    """Bytes that all writers together may hold in copies of parts. Thread-safe.

    Nobody waits for a second part while he holds an unfinished one, so there is always somebody who goes on.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._free = num_bytes
        self._changed = threading.Condition()

    def take(self, num_bytes: int) -> int:
        """Waits for room; what to give back. A part that is larger than all there is gets all there is."""
        taken = min(num_bytes, self._num_bytes)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= taken)  # ends: every send has a deadline
            self._free -= taken
        return taken

    def give_back(self, taken: int) -> None:
        with self._changed:
            self._free += taken
            self._changed.notify_all()


_MEMORY: Final = PartMemory(MEMORY_BYTES)


def send_parts(blocks: Iterable[bytes | memoryview], num_bytes: int, part_bytes: int, send: SendPart) -> Sequence[dict[str, Any]]:
    """Sends the blocks in parts of `part_bytes`, or more where the store's limit of parts demands it; what `send` gave for each, in order.

    Raises:
        StoreError: other bytes came than were announced.
        the first error of `send` or `blocks`, after the parts under way have ended; no further one is begun.
    """
    parts: list[Future[dict[str, Any]]] = []
    sent = 0
    with _sending() as pool:
        for number, (body, taken) in enumerate(_held_parts(blocks, max(part_bytes, -(-num_bytes // MAX_PARTS))), start=1):
            sent += len(body)
            parts.append(pool.submit(send, number, body))
            parts[-1].add_done_callback(_giving_back(taken))
            if len(parts) >= PARALLEL_PARTS:
                parts[-PARALLEL_PARTS].result()  # as soon as one has failed, no more blocks are asked for
        if sent != num_bytes:
            raise StoreError(f"{sent} bytes came, {num_bytes} were announced")
        return [part.result() for part in parts]


def _giving_back(taken: int) -> Callable[[object], None]:
    return lambda _: _MEMORY.give_back(taken)


@contextmanager
def _sending() -> Iterator[ThreadPoolExecutor]:
    """Threads for the parts of one object. Left with an error, it drops what has not begun and waits for what has."""
    pool = ThreadPoolExecutor(PARALLEL_PARTS, thread_name_prefix="upload")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _held_parts(blocks: Iterable[bytes | memoryview], size: int) -> Iterator[tuple[bytes, int]]:
    """The same bytes in parts of exactly `size`, the last one shorter, each with the memory that was taken for it.

    Each part is a copy (botocore takes no memoryview), made while its blocks come, and belongs to the caller from then on.
    """
    part, taken = io.BytesIO(), 0
    try:
        for block in blocks:
            rest = memoryview(block).cast("B")
            while rest:
                taken = taken or _MEMORY.take(size)
                rest = rest[part.write(rest[: size - part.tell()]) :]
                if part.tell() == size:
                    given, part, taken = (part.getvalue(), taken), io.BytesIO(), 0
                    yield given
        if taken:
            given, taken = (part.getvalue(), taken), 0
            yield given
    finally:
        _MEMORY.give_back(taken)
