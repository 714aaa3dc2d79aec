"""What ranks print, and where they stood: files below the root, written there or shipped there now and then."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from keepstep.storage.errors import StoreError
from keepstep.storage.store import Store

TAIL_LINES: Final = 8
TAIL_BYTES: Final = 64 << 10  # that are looked at
LINE_CHARACTERS: Final = 300
_CRASH: Final = "Fatal Python error:"  # faulthandler's first words; what matters stands right behind them


class RankLogs:
    """Where ranks print to: the root itself where it is a local directory that takes files; else scratch, shipped now and then."""

    def __init__(self, store: Store, scratch: Path) -> None:
        self._store = store
        self._scratch = scratch
        self._shipped: dict[str, int] = {}  # remote keys -> bytes that the root has

    def path(self, key: str) -> Path:
        local = self._store.local_path(key)
        if local is not None and _can_write_to(local):
            return local
        self._shipped.setdefault(key, 0)
        path = self._scratch / key
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, texts: Mapping[str, str]) -> None:
        """Whole files, by key. What does not fit on the disk is lost."""
        for key, text in texts.items():
            with contextlib.suppress(OSError):  # hurts only who wants to read it
                self.path(key).write_text(text)

    def ship(self) -> None:
        for key, shipped in list(self._shipped.items()):
            body = (self._scratch / key).read_bytes() if (self._scratch / key).exists() else b""
            if len(body) == shipped:
                continue
            try:
                self._store.put(key, body)
            except StoreError:
                return  # hurts only who reads logs; the next round tries again
            self._shipped[key] = len(body)


def _can_write_to(path: Path) -> bool:
    """Creates the file. A full or read-only disk must not keep ranks from training."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        return False
    return True


def tail(path: Path, start: int = 0) -> tuple[str, ...]:
    """The last lines of what was printed from byte `start` on; of a crash in native code those in which Python says where it happened."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            text = file.read(TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ()
    lines = [line.rstrip()[:LINE_CHARACTERS] for line in text.splitlines() if line.strip()]
    crash = next((i for i, line in enumerate(lines) if line.startswith(_CRASH)), None)
    return tuple(lines[-TAIL_LINES:] if crash is None else lines[crash : crash + TAIL_LINES])
