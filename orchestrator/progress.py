"""The agent's side of the ranks' progress pages: small memory-mapped files, one per rank (layout: trainer/contract.py)."""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from keepstep.trainer.contract import PROGRESS, PROGRESS_BYTES, REQUEST_OFFSET, Phase, Request

_REQUEST = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Progress:
    phase: Phase
    step: int
    beats: int
    quiet_s: float  # since the rank's last beat


class ProgressPage:
    """Made by the agent before the rank starts, so that the rank only opens it. Survives the rank, not the attempt."""

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.truncate(descriptor, PROGRESS_BYTES)
            self._page = mmap.mmap(descriptor, PROGRESS_BYTES)
        finally:
            os.close(descriptor)
        PROGRESS.pack_into(self._page, 0, Phase.INIT, Request.NONE, step, 0, time.monotonic())

    def read(self) -> Progress:
        """A torn read of a page being written costs at most one wrong number for one period; nothing is decided on it alone."""
        phase, _, step, beats, at = PROGRESS.unpack_from(self._page, 0)
        return Progress(Phase(phase), step, beats, max(0.0, time.monotonic() - at))

    def ask(self, request: Request) -> None:
        _REQUEST.pack_into(self._page, REQUEST_OFFSET, request)

    def close(self) -> None:
        self._page.close()
        self.path.unlink(missing_ok=True)
