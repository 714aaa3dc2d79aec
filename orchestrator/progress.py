"""The agent's side of the ranks' progress pages: small memory-mapped files, one per rank (layout: trainer/contract.py)."""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path

from keepstep.trainer.contract import (
    PROGRESS_BYTES,
    REQUEST_OFFSET,
    STANDS_BY_OFFSET,
    Pacing,
    Phase,
    Progress,
    Request,
    SaveCosts,
    read_marks,
)

_REQUEST = struct.Struct("<I")


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
        first = Progress(Phase.INIT, Request.NONE, step, beats=0, at=time.monotonic()).to_bytes()
        self._page[: len(first)] = first

    def read(self) -> Progress:
        return Progress.read(self._page)

    def marks(self) -> tuple[float, ...]:
        return read_marks(self._page)

    @property
    def stands_by(self) -> bool:
        return bool(self._page[STANDS_BY_OFFSET])

    def costs(self) -> SaveCosts | None:
        return SaveCosts.read(self._page)

    def ask(self, request: Request) -> None:
        _REQUEST.pack_into(self._page, REQUEST_OFFSET, request)

    def pace(self, pacing: Pacing) -> None:
        pacing.write(self._page)

    def close(self) -> None:
        self._page.close()
        self.path.unlink(missing_ok=True)
