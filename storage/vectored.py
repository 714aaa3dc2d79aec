"""Reading and writing at a place of a file, all of it: system calls may do less than they were asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

MAX_VIEWS: Final = 1024  # IOV_MAX of Linux


def read_at(descriptor: int, start: int, destinations: Sequence[memoryview]) -> int:
    """Fills memory, one destination after the other; the number of bytes read, fewer only where the file ends. Raises OSError."""
    left, done = [view for view in destinations if view.nbytes], 0
    while left and (count := os.preadv(descriptor, left[:MAX_VIEWS], start + done)):
        done += count
        left = _not_filled(left, count)
    return done


def write_at(descriptor: int, start: int, data: bytes | memoryview) -> None:
    """Raises OSError."""
    view = memoryview(data).cast("B")
    while view:
        count = os.pwrite(descriptor, view, start)
        view, start = view[count:], start + count


def _not_filled(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left to fill after `count` bytes."""
    for index, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[index + 1 :]]
        count -= view.nbytes
    return []
