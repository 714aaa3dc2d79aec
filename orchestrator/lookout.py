"""What a node that may have lost its coordinator sees in the run log. One look at a time, each bounded: a store behind a cut cable takes
its time to fail, and must neither hold up a node that hears its coordinator again nor take all of its threads."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, replace

from keepstep.storage.errors import StoreError
from keepstep.storage.layout import ALONE_ENDED
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store

from .roots import storage_options
from .sections import RunConfig


@dataclass(frozen=True, slots=True)
class Sight:
    """A reading of the log that has ended."""

    began_at: float
    alone: str  # the key under which we had said before that we go on alone


class Lookout:
    """Reads the log with a store of its own, whose calls end within a lease."""

    def __init__(self, config: RunConfig) -> None:
        lease_s = config.cluster.lease_s
        patient = storage_options(config.storage)
        hasty = {"connect_timeout_s": lease_s / 3, "read_timeout_s": lease_s / 2, "deadline_s": lease_s}
        options = replace(patient, **{name: min(limit, getattr(patient, name)) for name, limit in hasty.items()})
        self.log = RunLog(Store.open(config.run.root, options))
        self._patience_s = lease_s / 2
        self._reading: asyncio.Future[Sight] | None = None
        self._alone = ""  # under which key we have said last that we go on alone,
        self._ended = ""  # and that this is over

    async def look(self, alone: str = "", *, has_ended: bool = False) -> Sight | None:
        """Reads what is new; None: cannot observe, or not yet.

        Args:
            alone: the key under which to say first that we go on without our coordinator's answers; "": we need not.
            has_ended: our ranks are dead: if we had said that, we take it back.
        """
        if self._reading is None:
            self._reading = asyncio.ensure_future(asyncio.to_thread(self._read, alone, has_ended))
        done, _ = await asyncio.wait((self._reading,), timeout=self._patience_s)
        if not done:
            return None
        reading, self._reading = self._reading, None
        try:
            return reading.result()
        except (StoreError, OSError):
            return None

    def _read(self, alone: str, has_ended: bool) -> Sight:
        with contextlib.suppress(StoreError, OSError):  # it may be said or not: we do not count on it; whoever looks waits for longer
            self._say(alone, has_ended)
        sight = Sight(time.monotonic(), self._alone)
        self.log.refresh()
        return sight

    def _say(self, alone: str, has_ended: bool) -> None:
        if has_ended and alone == self._alone != self._ended:
            self.log.store.put(alone, ALONE_ENDED)
            self._ended = alone
        elif not has_ended and alone not in ("", self._alone):
            self.log.store.put(alone, b"")
            self._alone = alone
