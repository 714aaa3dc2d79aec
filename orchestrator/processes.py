"""Linux processes: die with the parent, kill for certain, find what an earlier incarnation left behind.

Every process that a node starts inherits `KEEPSTEP_SCRATCH=<the node's scratch directory>` in its initial environment, forked ranks and
their loader workers included, so `strays()` finds them without any bookkeeping that a crash could have torn.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import io
import os
import select
import signal
import sys
import time
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

ENV_SCRATCH = "KEEPSTEP_SCRATCH"
ENV_PARENT = "KEEPSTEP_PARENT_PID"

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def die_with_parent(parent_pid: int | None = None) -> None:
    """Asks the kernel to SIGKILL this process when its parent dies; leaves at once if the parent is gone already.

    The kernel means the parent *thread*: the parent must start us from its main thread.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(128 + signal.SIGKILL)


def die_with_parent_if_told() -> None:
    """The same, where the parent named itself in the environment; a process started by hand lives on its own."""
    parent = os.environ.pop(ENV_PARENT, "")
    if parent:
        die_with_parent(int(parent))


def adopt_orphans() -> None:
    """Grandchildren whose parent dies become our children instead of init's."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def is_alive(pid: int) -> bool:
    """True while the process runs; a zombie is dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat[stat.rindex(")") + 2] not in "ZX"


def strays(scratch: str | os.PathLike[str]) -> list[int]:
    """Living processes that carry this scratch directory in their environment, ourselves and our ancestors excepted."""
    return marked(f"{ENV_SCRATCH}={os.fspath(scratch)}")


def marked(entry: str) -> list[int]:
    """Living processes with this entry ("NAME=value") in their initial environment, ourselves and our ancestors excepted."""
    spared = _ancestors()
    found = []
    for process in os.scandir("/proc"):
        if not process.name.isdigit() or int(process.name) in spared:
            continue
        try:
            with open(f"/proc/{process.name}/environ", "rb") as file:
                environ = file.read()
        except OSError:  # gone in the meantime, or another user's
            continue
        if entry.encode() in environ.split(b"\0") and is_alive(int(process.name)) and not _is_resource_tracker(process.name):
            found.append(int(process.name))
    return found


def _is_resource_tracker(pid: str) -> bool:
    """multiprocessing's helper, which removes a script's named semaphores when the last of us is gone, and then leaves by itself."""
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True  # gone


def command_line(pid: int) -> str:
    """For people; "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _ancestors() -> set[int]:
    pids, pid = set(), os.getpid()
    while pid > 0:
        pids.add(pid)
        stat = Path(f"/proc/{pid}/stat").read_text()
        pid = int(stat[stat.rindex(")") + 2 :].split()[1])
    return pids


def kill(pids: Iterable[int], *, deadline_s: float = 10.0) -> list[int]:
    """SIGKILLs processes and waits until the kernel confirms; returns those that would not die in time (uninterruptible sleep)."""
    waiting = {}
    for pid in pids:
        try:
            waiting[pid] = os.pidfd_open(pid)
            signal.pidfd_send_signal(waiting[pid], signal.SIGKILL)
        except ProcessLookupError:
            continue
    end = time.monotonic() + deadline_s
    alive = [pid for pid, fd in waiting.items() if not _ended(fd, end - time.monotonic())]
    for fd in waiting.values():
        os.close(fd)
    return alive


def _ended(pidfd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout_s) * 1000))


async def wait_ended(pid: int) -> None:
    """Returns when this process has ended, whoever's child it is."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def bury(scratch: str | os.PathLike[str], *, deadline_s: float = 10.0) -> list[int]:
    """Kills everything an earlier incarnation on this scratch directory left; returns what still lives after the deadline.

    Looks again until nothing new shows up: a dying process may have been forking.
    """
    end = time.monotonic() + deadline_s
    while found := strays(scratch):
        kill(found, deadline_s=end - time.monotonic())
        if time.monotonic() >= end:
            return strays(scratch)
    return []


def kill_session(pid: int) -> None:
    """SIGKILLs a rank and everything in its session (loader workers); a rank that has not called setsid yet dies alone."""
    kill_group(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_group(pid: int) -> None:
    """SIGKILLs what a rank that is dead has left in its group; its number is not given to anybody else while somebody is there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def strays_of_ranks(scratch: str | os.PathLike[str], spared: Set[int] = frozenset()) -> list[int]:
    """What descends from ranks: it carries our mark, and every rank began a session of its own. Those sessions are `spared`."""
    ours, found = {os.getsid(0), *spared}, []
    for pid in strays(scratch):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) not in ours and not _is_persister(pid):
                found.append(pid)
    return found


def _is_persister(pid: int) -> bool:
    """The node's own, in a session of its own, too: it goes on when ranks have ended."""
    return "keepstep.storage.persister" in command_line(pid)


def signal_name(exit_code: int) -> str:
    """-9 -> "SIGKILL"; a signal that Python does not know by name stays a number."""
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"


def python_command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


class _LossyFile(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


def print_or_lose() -> None:
    """Logs often lie on the disk that is full: what this process prints is lost then, and the process lives on."""
    sys.stdout, sys.stderr = _lossy(1), _lossy(2)


def _lossy(descriptor: int) -> io.TextIOWrapper:
    raw = _LossyFile(descriptor, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True)
