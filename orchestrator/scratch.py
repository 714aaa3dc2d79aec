"""A node's own directory: one living agent at a time, and the memory of who lived here before."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from .errors import InputError

MAX_REMEMBERED = 16
MAX_SOCKET_BYTES = 107  # of a Unix socket's path
LISTENER_BYTES = len("/pymp-12345678/listener-12345678")  # multiprocessing's, for the forkserver


def default_scratch(root: str, node: str) -> Path:
    """Short (a Unix socket's path has at most 107 bytes), stable over restarts, private to this user, run and node."""
    base = Path(os.environ.get("KEEPSTEP_SCRATCH_BASE") or tempfile.gettempdir())
    return base / f"keepstep-{os.getuid()}" / hashlib.sha256(root.encode()).hexdigest()[:8] / node


class Scratch:
    """Raises InputError when the directory cannot be used, or an agent lives there already."""

    def __init__(self, path: Path) -> None:
        self.path = path = path.absolute()
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
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
        with contextlib.suppress(
            OSError
        ):  # a file system without it: systemd-tmpfiles, which passes over what is locked, does not clean there
            fcntl.flock(self._folder, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def gather_temporary_files(self) -> None:
        """This process's temporary files lie here from now on (the forkserver's socket is one), and those of its predecessors are gone.

        Only once the predecessors are buried, and before anything temporary is made.
        """
        for leftover in self.path.glob("pymp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if len(os.fsencode(self.path)) + LISTENER_BYTES <= MAX_SOCKET_BYTES:
            tempfile.tempdir = str(self.path)

    def check(self) -> None:
        """Raises InputError when somebody cleared the directory away under us: no rank could be launched from here."""
        if not (self.path / "lock").exists():
            why = "somebody cleared it away while its agent was living there; keep it out of reach of what clears temporary files away"
            raise InputError(f"--scratch {self.path}: {why}")

    def begin(self, incarnation: str) -> tuple[str, ...]:
        """Enters a new incarnation; returns the earlier ones, whose processes the caller has buried."""
        earlier = self._incarnations()
        for leftover in (*self.path.glob("progress-*"), *self.path.glob("stacks-*"), *self.path.glob("error-*.json")):
            leftover.unlink(missing_ok=True)
        shutil.rmtree(self.path / "elastic", ignore_errors=True)
        self._remember((*earlier, incarnation)[-MAX_REMEMBERED:])
        return earlier

    def _incarnations(self) -> tuple[str, ...]:
        try:
            known = json.loads((self.path / "incarnations.json").read_bytes())
        except (FileNotFoundError, ValueError):  # torn by a crash: the lease covers those that we no longer know
            return ()
        return tuple(map(str, known)) if isinstance(known, list) else ()

    def _remember(self, incarnations: tuple[str, ...]) -> None:
        temporary = self.path / "incarnations.json.new"
        temporary.write_text(json.dumps(incarnations))
        temporary.replace(self.path / "incarnations.json")
