"""How the persister keeps out of the training's way, and how it shows that it lives.

It needs a tenth of a second of a core per few hundred megabytes, at a moment when every core computes a step that all other ranks wait
for. So the ranks go first: it takes what they leave. What it then still costs is measured by benchmarks/slowdown.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

HEARTBEAT_S: Final = 1.0
_IOPRIO_SET: Final = {"x86_64": 251, "aarch64": 30}
_IOPRIO_WHO_PROCESS: Final = 1
_LAST_OF_BEST_EFFORT: Final = (2 << 13) | 7


def step_back(niceness: int) -> None:
    """Lets others go first, for the processor and, where the disk's scheduler knows ranks, for the disk. Before any thread is started.

    Linux may group processes by session (autogroup) and then compares groups alone: every rank has a session of its own, so this process
    begins one, too, and steps back as a group. Nothing here can fail in a way that matters: then it competes as any process does.
    """
    if niceness <= 0:
        return
    with contextlib.suppress(OSError):
        os.setsid()
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(niceness))
    with contextlib.suppress(OSError):
        os.nice(niceness)
    if (call := _IOPRIO_SET.get(platform.machine())) is not None:
        ctypes.CDLL(None).syscall(call, _IOPRIO_WHO_PROCESS, 0, _LAST_OF_BEST_EFFORT)


class Pace:
    """At most so many bytes per second, whoever asks; 0: any number. Thread-safe.

    Time that nobody used is not saved up.
    """

    def __init__(
        self, bytes_per_s: float, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._bytes_per_s, self._clock, self._sleep = bytes_per_s, clock, sleep
        self._lock = threading.Lock()
        self._free_at = clock()

    def __call__(self, num_bytes: int) -> None:
        """Waits until these bytes may go."""
        if not self._bytes_per_s:
            return
        with self._lock:
            now = self._clock()
            wait_s = max(0.0, self._free_at - now)
            self._free_at = max(self._free_at, now) + num_bytes / self._bytes_per_s
        if wait_s:
            self._sleep(wait_s)


class Heartbeat:
    """Says how many bytes of one submission are on their way, once a second at most."""

    def __init__(self, tell: Callable[[int], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._tell, self._clock = tell, clock
        self._told_at, self._done = clock(), 0

    def __call__(self, num_bytes: int) -> None:
        self._done += num_bytes
        if (now := self._clock()) - self._told_at >= HEARTBEAT_S:
            self._told_at = now
            self._tell(self._done)
