"""Did the kernel kill a process because memory ran out? Its own word for it, never a guess from SIGKILL alone.

Two witnesses. The kernel's log names the process, where it may be read and numbers processes as we do. Each memory cgroup (version 1
or 2) counts the processes that the OOM killer ended in it, so a rise while a rank died of SIGKILL says the same.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

WINDOW_S: Final = 5.0  # a count is compared with one that is at least so old: a large process takes seconds to die
MAX_NAMED: Final = 64
_KMSG: Final = "/dev/kmsg"
_KMSG_RECORD_BYTES: Final = 8192
_INITIAL_PIDS: Final = "pid:[4026531836]"  # fixed in the kernel's source: here the kernel's log counts processes as we do
_KILLED: Final = re.compile(r"Killed process (\d+) .*?anon-rss:(\d+)kB")
_UNLIMITED: Final = 1 << 60  # version 1 has a huge number for "no limit"


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """The cgroup that some process's memory is counted in. `events`: the file with its count of OOM kills."""

    events: Path

    @property
    def kills(self) -> int:
        return read_count(_text(self.events))

    @property
    def figures(self) -> str:
        """ "its cgroup's limit is 512 MB, its peak was 512 MB", as far as the kernel tells."""
        limit = _bytes(self.events.parent, "memory.max", "memory.limit_in_bytes")
        peak = _bytes(self.events.parent, "memory.peak", "memory.max_usage_in_bytes")
        known = (("its cgroup's limit is", limit), ("the most that was used in it", peak))
        return ", ".join(f"{name} {number / 1e6:.0f} MB" for name, number in known if number)


def read_count(text: str) -> int:
    """Of memory.events (version 2) and memory.oom_control (version 1): a line "oom_kill 3"."""
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), 0)


def memory_group(cgroups: str, mounts: str) -> MemoryGroup | None:
    """The group that counts a process's memory; the nearest one above it that is visible here. None: there is none.

    Args:
        cgroups: /proc/PID/cgroup.
        mounts: /proc/self/mountinfo.
    """
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in cgroups.splitlines())}
    for mount in map(str.split, mounts.splitlines()):
        kind, options = mount[mount.index("-") + 1], mount[-1].split(",")
        if kind == "cgroup" and "memory" in options:
            path = next((path for controllers, path in paths.items() if "memory" in controllers.split(",")), None)
            name = "memory.oom_control"
        elif kind == "cgroup2":
            path, name = paths.get(""), "memory.events"
        else:
            continue
        if path is not None and (found := _nearest(Path(mount[4]), _below(path, mount[3]), name)):
            return MemoryGroup(found)
    return None


def _below(path: str, mounted: str) -> str:
    """In a container only a part of the tree is mounted, and the path may be one of the host."""
    return path.removeprefix(mounted) if mounted != "/" and path.startswith(mounted) else path


def _nearest(mount_point: Path, path: str, name: str) -> Path | None:
    folder = mount_point / path.strip("/")
    for group in (folder, *folder.parents):
        if (group / name).is_file():
            return group / name
        if group == mount_point:
            return None
    return None


@dataclass(slots=True)
class KernelLog:
    """What the kernel says from now on; silent where it may not be read."""

    named: dict[int, int] = field(default_factory=dict)  # pid -> bytes of its own that it had when the OOM killer chose it
    _file: int = -1

    @staticmethod
    def open() -> KernelLog:
        log = KernelLog()
        with contextlib.suppress(OSError):  # not permitted: the cgroups' counts must do
            if os.readlink("/proc/self/ns/pid") == _INITIAL_PIDS:
                log._file = os.open(_KMSG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                os.lseek(log._file, 0, os.SEEK_END)
        return log

    def refresh(self) -> None:
        while self._file >= 0:
            try:
                record = os.read(self._file, _KMSG_RECORD_BYTES)
            except BrokenPipeError:
                continue  # records were overwritten before we came: the next one is read
            except OSError:
                return  # nothing new
            self.named |= killed_in(record.decode(errors="replace"))
            for pid in list(self.named)[:-MAX_NAMED]:
                del self.named[pid]

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


def killed_in(text: str) -> Mapping[int, int]:
    """pid -> bytes, of all that the OOM killer says it has killed."""
    return {int(pid): int(kilobytes) << 10 for pid, kilobytes in _KILLED.findall(text)}


class OomWitness:
    """For one node: `watch` its ranks when they start, `refresh` now and then, ask when one has died of SIGKILL."""

    def __init__(self, kernel_log: KernelLog) -> None:
        self._kernel_log = kernel_log
        self._groups: dict[int, MemoryGroup] = {}  # by pid
        self._older: dict[MemoryGroup, int] = {}
        self._newer: dict[MemoryGroup, int] = {}
        self._counted_at = 0.0

    def watch(self, pids: Iterable[int]) -> None:
        """A new attempt's ranks."""
        mounts = _text(Path("/proc/self/mountinfo"))
        found = {pid: memory_group(_text(Path(f"/proc/{pid}/cgroup")), mounts) for pid in pids}
        self._groups = {pid: group for pid, group in found.items() if group}
        self._older, self._newer = self._count(), self._count()

    def refresh(self, now: float) -> None:
        """Keeps counts that are old enough to compare with, and no older than needed."""
        if now - self._counted_at >= WINDOW_S:
            self._older, self._newer, self._counted_at = self._newer, self._count(), now

    def verdict(self, pid: int) -> str:
        """Why SIGKILL came to this process, if the OOM killer sent it; "" if somebody else did."""
        self._kernel_log.refresh()
        group = self._groups.get(pid)
        own_bytes = self._kernel_log.named.pop(pid, None)
        if own_bytes is None and (group is None or not self._take_unexplained(group)):
            return ""
        own = f"{own_bytes / 1e6:.0f} MB of its own" if own_bytes else ""
        return ", ".join(filter(None, ("SIGKILL by the kernel's OOM killer", own, group.figures if group else "")))

    def _take_unexplained(self, group: MemoryGroup) -> bool:
        """One of the kills that were counted and are nobody's yet."""
        explained = len(self._kernel_log.named)
        if group.kills - self._older.get(group, 0) <= explained:
            return False
        for counts in (self._older, self._newer):
            counts[group] = counts.get(group, 0) + 1
        return True

    def _count(self) -> dict[MemoryGroup, int]:
        return {group: group.kills for group in self._groups.values()}


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


def _bytes(folder: Path, *names: str) -> int:
    """The first of the files that has a number; 0 for no limit, or where the kernel does not tell."""
    texts = (_text(folder / name).strip() for name in names)
    number = next((int(text) for text in texts if text.isdigit()), 0)
    return number if number < _UNLIMITED else 0
