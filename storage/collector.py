"""Python's collector of reference cycles, out of the way while thousands of small objects are made at once."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Every few thousand new objects the collector looks for cycles among all there are, torch's included: up to 0.2 s within a restore."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
