"""The processes that a fault is meant for, and signals that cannot reach any other.

A process gets a signal only while it is the one that the status spoke of: it is held by a pidfd *before* its mark is compared (the node's
scratch directory in its environment or on its command line), so a pid that was given to somebody else meanwhile is never hit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from .faultkinds import Fault
from .processes import ENV_SCRATCH

Status = Mapping[str, Any]

_SCRATCH: Final = f"{ENV_SCRATCH}=".encode()


class CannotBreak(RuntimeError):
    """What should be broken is not there, or not any more."""


def victim(fault: Fault, status: Status) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """The node that is meant and, unless the plan names a node, the rank. Raises CannotBreak."""
    for node in status["nodes"]:
        if node["state"] == "lost":
            continue
        if fault.node:
            if name_of(node) == fault.node:
                return node, None
            continue
        for rank in node["ranks"]:
            if rank["rank"] == fault.rank and rank["phase"] != "exited":
                return node, rank
    raise CannotBreak(f"{fault}: nobody of that name is there")


def name_of(node: Mapping[str, Any]) -> str:
    """ "node1#3f9c" -> "node1"."""
    return str(node["id"]).partition("#")[0]


def hold(pid: int, *marks: bytes) -> int:
    """A pidfd of the process that has this pid on its host and carries the marks. Raises CannotBreak."""
    for candidate in _pids_here(pid):
        try:
            descriptor = os.pidfd_open(candidate)
        except ProcessLookupError:
            continue
        if words(candidate).issuperset(marks):
            return descriptor
        os.close(descriptor)
    raise CannotBreak(f"pid {pid} is not the process that the status spoke of, or it has ended")


def _pids_here(pid: int) -> Iterator[int]:
    """As seen from this machine, of all processes that see themselves as `pid`: in a host's namespace it has another one here."""
    assert pid > 1, "0 and 1 would be far more than a rank"
    yield pid
    for name in os.listdir("/proc"):
        if name.isdigit() and _innermost_pid(name) == pid:
            yield int(name)


def _innermost_pid(pid: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return 0


def words(pid: int) -> set[bytes]:
    """Of a process's command line, and the scratch directory in its environment."""
    with contextlib.suppress(OSError):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        scratch = {entry.removeprefix(_SCRATCH) for entry in environment if entry.startswith(_SCRATCH)}
        return scratch | set(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))
    return set()


def send(pidfds: Sequence[int], number: int) -> float:
    """To all of them; returns the instant of the first. Those that have ended meanwhile are no matter."""
    at_s = time.monotonic()
    for pidfd in pidfds:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)
    return at_s


def close(pidfds: Sequence[int]) -> None:
    for pidfd in pidfds:
        os.close(pidfd)


def resume(pidfds: Sequence[int]) -> None:
    """After SIGSTOP."""
    send(pidfds, signal.SIGCONT)
    close(pidfds)
