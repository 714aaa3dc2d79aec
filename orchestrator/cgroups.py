"""A cgroup for everything that a process starts: freeze it, limit its memory, kill it for certain. Version 2, or 1 beside it (hybrid).

Version 2 must be mounted and writable: it freezes and kills. Memory is limited by whichever version has that controller.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

EMPTY_S = 10.0  # how long dying processes may take to be gone
POLL_S = 0.005


def base_of(kind: str, option: str = "") -> Path | None:
    """Where the cgroups of this kind ("cgroup" is version 1, "cgroup2") with this controller are mounted; None: nowhere."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount_point, found, options, *_ = line.split()
        if found == kind and (not option or option in options.split(",")):
            return Path(mount_point)
    return None


def missing() -> str:
    """Why this process cannot make cgroups; "" if it can."""
    base = base_of("cgroup2")
    if base is None:
        return "cgroup version 2 is mounted nowhere"
    return "" if os.access(base, os.W_OK) else f"{base} cannot be written to"


class Cgroup:
    """One group, `name` may have parts ("lab/host1"). Raises OSError where the kernel refuses."""

    def __init__(self, name: str) -> None:
        base = base_of("cgroup2")
        assert base, missing()
        self.path = base / name
        legacy = base_of("cgroup", "memory")
        self._legacy = legacy / name if legacy else None  # version 1's memory controller

    @property
    def folders(self) -> tuple[Path, ...]:
        """What a process must enter to be in the group."""
        return (self.path, self._legacy) if self._legacy else (self.path,)

    def make(self) -> None:
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)
        if self._legacy is None:
            _pass_on_memory(self.path)

    def pids(self) -> tuple[int, ...]:
        return tuple(map(int, (self.path / "cgroup.procs").read_text().split()))

    def freeze(self) -> None:
        """Returns when every process stands still."""
        (self.path / "cgroup.freeze").write_text("1")
        self._await("frozen 1")

    def thaw(self) -> None:
        (self.path / "cgroup.freeze").write_text("0")
        self._await("frozen 0")

    def limit_memory(self, num_bytes: int) -> None:
        """Beyond it the kernel's OOM killer chooses among the group's processes."""
        if self._legacy:
            (self._legacy / "memory.limit_in_bytes").write_text(str(num_bytes))
            return
        (self.path / "memory.max").write_text(str(num_bytes))
        (self.path / "memory.swap.max").write_text("0")

    def enter(self, pid: int) -> None:
        """Moves a process in; what it starts from then on is in, too."""
        for folder in self.folders:
            (folder / "cgroup.procs").write_text(str(pid))

    def memory_bytes(self) -> int:
        """What its processes use now, cached files included."""
        file = self._legacy / "memory.usage_in_bytes" if self._legacy else self.path / "memory.current"
        return int(file.read_text())

    def kill(self) -> None:
        """SIGKILL to all, frozen ones and groups below included; returns when none is left."""
        (self.path / "cgroup.kill").write_text("1")
        self._await("populated 0")

    def remove(self) -> None:
        """With all groups below. They must be empty."""
        for folder in self.folders:
            with contextlib.suppress(FileNotFoundError):
                for group in _from_below(folder):
                    group.rmdir()

    def _await(self, state: str) -> None:
        deadline = time.monotonic() + EMPTY_S
        while state not in (self.path / "cgroup.events").read_text().splitlines():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.path}: not {state!r} within {EMPTY_S:g} s")
            time.sleep(POLL_S)


def _pass_on_memory(folder: Path) -> None:
    """Version 2 gives a controller only to groups whose parents pass it on."""
    base = base_of("cgroup2")
    assert base
    for parent in reversed([above for above in folder.parents if above.is_relative_to(base)]):
        with contextlib.suppress(OSError):  # hurts only who limits memory later, and then there is no memory.max to write to
            (parent / "cgroup.subtree_control").write_text("+memory")


def _from_below(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        folders = [Path(entry.path) for entry in entries if entry.is_dir()]
    for each in folders:
        yield from _from_below(each)
    yield folder
