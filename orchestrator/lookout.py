"""What a node that may have lost its coordinator sees in the run log. One look at a time, each bounded: a store behind a cut cable takes
its time to fail, and must neither hold up a node that hears its coordinator again nor take all of its threads."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from keepstep.storage.errors import StoreError
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store

from .roots import storage_options
from .sections import RunConfig


class Lookout:
    """Reads the log with a store of its own, whose calls end within a lease."""

    def __init__(self, config: RunConfig) -> None:
        lease_s = config.cluster.lease_s
        patient = storage_options(config.storage)
        hasty = {"connect_timeout_s": lease_s / 3, "read_timeout_s": lease_s / 2, "deadline_s": lease_s}
        options = replace(patient, **{name: min(limit, getattr(patient, name)) for name, limit in hasty.items()})
        self.log = RunLog(Store.open(config.run.root, options))
        self._patience_s = lease_s / 2
        self._reading: asyncio.Future[float] | None = None

    async def look(self) -> float | None:
        """Reads what is new. The moment at which the reading began that has ended now; None: cannot observe, or not yet."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(asyncio.to_thread(self._read))
        done, _ = await asyncio.wait((self._reading,), timeout=self._patience_s)
        if not done:
            return None
        reading, self._reading = self._reading, None
        try:
            return reading.result()
        except (StoreError, OSError):
            return None

    def _read(self) -> float:
        asked_at = time.monotonic()
        self.log.refresh()
        return asked_at
