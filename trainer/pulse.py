"""A rank's pulse: a thread that says ten times a second that the interpreter runs, and how many collectives have been begun. Torch-free.

A rank that is stopped, or stuck in native code that holds the interpreter's lock, has none; one that waits for others has. The number of
collectives tells who the others wait for: the rank that has begun fewer.
"""

from __future__ import annotations

import struct
import sys
import threading
import time
import weakref
from mmap import mmap
from typing import Final

PULSE_S: Final = 0.1
_PULSE: Final = struct.Struct("<dq")
_PULSE_OFFSET: Final = 40  # of contract.PROGRESS: `pulse_at`, `collective`


class Pulse(threading.Thread):
    """Ends with its page. A daemon keeps no process from exiting, and a forked child (a loader's worker) has no such thread."""

    def __init__(self, page: mmap) -> None:
        super().__init__(name="keepstep-pulse", daemon=True)
        self._page = weakref.ref(page)

    def run(self) -> None:
        newest = -1
        while (page := self._page()) is not None:
            begun = collectives_begun()
            newest = newest if begun < 0 else begun  # what was begun stays begun when the group is gone
            _PULSE.pack_into(page, _PULSE_OFFSET, time.monotonic(), newest)
            del page
            time.sleep(PULSE_S)


def collectives_begun() -> int:
    """Sequence number of the default process group, -1 where there is none, or where another torch hides it.

    Gloo and NCCL count when the host begins a collective, so the rank that does not come stays behind; 0.7 microseconds.
    """
    c10d = sys.modules.get("torch.distributed.distributed_c10d")
    try:
        group = c10d.GroupMember.WORLD if c10d else None
        return -1 if group is None else int(group._get_sequence_number_for_group())
    except (AttributeError, RuntimeError, TypeError, ValueError):  # half imported, being destroyed, or of another version
        return -1
