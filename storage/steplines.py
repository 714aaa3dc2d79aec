"""The attempt's step records on their way from rank 0 to the root: kept in memory, written at every checkpoint and every second or so."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any, Final

from .canonical import canonical_json
from .layout import steps_key
from .store import Store

FLUSH_PERIOD_S: Final = 1.0


class StepLines:
    """The growing steps file of one attempt. Thread-safe; lines leave in the order in which they came."""

    def __init__(self, store: Store, attempt: int) -> None:
        self._store = store
        self._key = steps_key(attempt)
        self._waiting = bytearray()
        self._lock = threading.Lock()
        self._flush_lock = threading.Lock()
        self._flushed_at = time.monotonic()

    def add(self, record: Mapping[str, Any]) -> None:
        line = canonical_json(dict(record)) + b"\n"
        with self._lock:
            self._waiting += line

    def flush(self, *, sync: bool) -> None:
        """Writes all lines that were added before the call. Raises StoreError: they are kept and come again with the next flush."""
        with self._flush_lock:
            with self._lock:
                lines = bytes(self._waiting)
            if lines:
                self._store.append(self._key, lines, sync=sync)
                with self._lock:
                    del self._waiting[: len(lines)]
            self._flushed_at = time.monotonic()

    def flush_if_due(self) -> None:
        """As `flush`, when the store's period for growing files is over. Not synced: only a checkpoint depends on its lines."""
        if time.monotonic() - self._flushed_at >= max(FLUSH_PERIOD_S, self._store.segment_period_s):
            self.flush(sync=False)
