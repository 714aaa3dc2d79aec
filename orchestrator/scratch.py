"""A node's own directory: one living agent at a time, and the memory of who lived here before."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from pathlib import Path

from .errors import InputError

MAX_REMEMBERED = 16


def default_scratch(root: str, node: str) -> Path:
    """Short (a Unix socket's path has at most 107 bytes), stable over restarts, private to this user, run and node."""
    base = Path(os.environ.get("KEEPSTEP_SCRATCH_BASE") or tempfile.gettempdir())
    return base / f"keepstep-{os.getuid()}" / hashlib.sha256(root.encode()).hexdigest()[:8] / node


class Scratch:
    """Raises InputError when the directory cannot be used, or an agent lives there already."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InputError(f"--scratch {path}: {error.strerror}; name a directory that this user may write") from error

    @property
    def staging_socket(self) -> Path:
        return self.path / "persister.sock"

    def lock(self) -> None:
        """Held until the process ends, however it ends."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--scratch {self.path}: another agent lives there; stop it, or name another directory") from None

    def begin(self, incarnation: str) -> tuple[str, ...]:
        """Enters a new incarnation; returns the earlier ones, whose processes the caller has buried."""
        earlier = self._incarnations()
        for leftover in (*self.path.glob("progress-*"), *self.path.glob("stacks-*"), *self.path.glob("error-*.json")):
            leftover.unlink(missing_ok=True)
        self._remember((*earlier, incarnation)[-MAX_REMEMBERED:])
        return earlier

    def _incarnations(self) -> tuple[str, ...]:
        try:
            return tuple(json.loads((self.path / "incarnations.json").read_text()))
        except (FileNotFoundError, json.JSONDecodeError):  # torn by a crash: the lease covers those that we no longer know
            return ()

    def _remember(self, incarnations: tuple[str, ...]) -> None:
        temporary = self.path / "incarnations.json.new"
        temporary.write_text(json.dumps(incarnations))
        temporary.replace(self.path / "incarnations.json")
