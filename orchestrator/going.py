"""A node that was told to go: by whom, how long it will still be there, and that it is gone by then, whatever hangs."""

from __future__ import annotations

import asyncio
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from keepstep.trainer.contract import ENV_GRACE, EXIT_REQUEUE

from .errors import InputError

STOPPING_S: Final = 0.5  # killing the ranks, burying what is left, leaving: 0.1 s where nothing else runs
PERIOD_S: Final = 0.05  # how often a node that must go looks whether it is still needed


@dataclass(frozen=True, slots=True)
class Grace:
    """Instants are of this process's monotonic clock."""

    why: str  # who told us, and how long it gave
    stop_at: float  # whatever still runs is stopped
    until: float  # this process has ended


def shortened(known: Grace | None, why: str, seconds: float, now: float) -> Grace:
    """`known` itself, unless this notice is the first or leaves less time: one that is repeated changes nothing."""
    until = now + seconds
    if known is not None and known.until <= until:
        return known
    return Grace(why, until - min(STOPPING_S, seconds / 5), until)


class Going:
    """Notices in, time left out. Event loop's thread only."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._grace: Grace | None = None
        self._told = asyncio.Event()
        self._on_change = on_change

    @property
    def why(self) -> str:
        """The reason; "" while the node stays."""
        return self._grace.why if self._grace else ""

    @property
    def left_s(self) -> float | None:
        """How long its ranks may still run; None while the node stays."""
        return None if self._grace is None else max(0.0, self._grace.stop_at - time.monotonic())

    def hear(self, why: str, seconds: float) -> None:
        """The platform takes the node away in so many seconds."""
        grace = shortened(self._grace, why, seconds, time.monotonic())
        if grace is self._grace:
            return
        print(f"keepstep agent: this node must go: {why}", file=sys.stderr)  # noqa: T201
        self._grace = grace
        _exit_after(max(seconds, STOPPING_S))
        self._told.set()
        self._on_change()

    async def wait(self, is_needed: Callable[[], bool]) -> None:
        """Returns once the node must go, and is not needed any more or has no time left."""
        await self._told.wait()
        while is_needed() and (left_s := self.left_s):
            await asyncio.sleep(min(PERIOD_S, left_s))


def _exit_after(seconds: float) -> None:
    """A store that does not answer, or a thread that waits for it, must not keep this process beyond the platform's patience."""
    timer = threading.Timer(seconds, os._exit, (EXIT_REQUEUE,))
    timer.daemon = True
    timer.start()


def signal_grace_s(default_s: float) -> float:
    """How long the platform waits after its signal. Raises InputError."""
    text = os.environ.get(ENV_GRACE, "")
    try:
        seconds = float(text) if text else default_s
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise InputError(f"{ENV_GRACE} = {text!r} must be a number of seconds: how long the platform waits between its signal and the end")
    return seconds
