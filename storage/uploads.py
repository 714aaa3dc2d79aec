"""Large objects in parts: in parallel, without copying a byte, and nothing begun after an error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final

from .errors import StoreError

PART_BYTES: Final = 32 << 20
MAX_PARTS: Final = 10_000
PARALLEL_PARTS: Final = 4  # of one object
PARALLEL_PARTS_OF_ALL: Final = 8  # of this process: more of them share a slow line, and each must end within its deadline

Body = Sequence[memoryview]  # one part, cut into the blocks that it was made of
SendPart = Callable[[int, Body], dict[str, Any]]  # (number from 1, body) -> what the completion needs of it

_places: Final = threading.BoundedSemaphore(PARALLEL_PARTS_OF_ALL)


def send_parts(blocks: Iterable[bytes | memoryview], num_bytes: int, part_bytes: int, send: SendPart) -> Sequence[dict[str, Any]]:
    """Sends the blocks in parts of `part_bytes`, or more where the store's limit of parts demands it; what `send` gave for each, in order.

    The blocks are not copied: they must stay as they are until this returns. Where they are made on the way, PARALLEL_PARTS + 1 parts of
    them are in memory at most.

    Raises:
        StoreError: other bytes came than were announced.
        the first error of `send` or `blocks`, after the parts under way have ended; no further one is begun.
    """
    parts: list[Future[dict[str, Any]]] = []
    sent = 0
    with _sending() as pool:
        for number, body in enumerate(in_parts(blocks, max(part_bytes, -(-num_bytes // MAX_PARTS))), start=1):
            sent += sum(view.nbytes for view in body)
            _places.acquire()  # ends: every send has a deadline
            parts.append(pool.submit(send, number, body))
            parts[-1].add_done_callback(lambda _: _places.release())
            if len(parts) >= PARALLEL_PARTS:
                parts[-PARALLEL_PARTS].result()  # as soon as one has failed, no more blocks are asked for
        if sent != num_bytes:
            raise StoreError(f"{sent} bytes came, {num_bytes} were announced")
        return [part.result() for part in parts]


@contextmanager
def _sending() -> Iterator[ThreadPoolExecutor]:
    """Threads for the parts of one object. Left with an error, it drops what has not begun and waits for what has."""
    pool = ThreadPoolExecutor(PARALLEL_PARTS, thread_name_prefix="upload")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def in_parts(blocks: Iterable[bytes | memoryview], size: int) -> Iterator[Body]:
    """The same memory in parts of exactly `size` bytes, the last one shorter."""
    part, room = list[memoryview](), size
    for block in blocks:
        rest = memoryview(block).cast("B") if len(block) else memoryview(b"")
        while rest:
            part.append(rest[:room])
            rest, room = rest[room:], room - part[-1].nbytes
            if not room:
                yield part
                part, room = [], size
    if part:
        yield part
