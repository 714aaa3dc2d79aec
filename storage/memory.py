"""How much memory this process may still take, so that staging is refused with a sentence and not by the kernel's killer."""

from __future__ import annotations

from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
CGROUPS: Final = Path("/sys/fs/cgroup")


def available_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """The least of what the machine and this process' memory cgroups (version 1 or 2) have left."""
    limits = (_cgroup_bytes(folder) for folder in _cgroup_folders(proc, cgroups))
    return min([_machine_bytes(proc), *(limit for limit in limits if limit is not None)])


def _machine_bytes(proc: Path) -> int:
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _cgroup_folders(proc: Path, cgroups: Path) -> list[Path]:
    """Those of our own cgroup and its parents, as far as they are visible here."""
    found = []
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount = cgroups / "memory" if controllers else cgroups
        own = mount / path.lstrip("/")
        found += [folder for folder in (own, *own.parents) if folder.is_relative_to(mount)]
    return found


def _cgroup_bytes(folder: Path) -> int | None:
    """Page cache that the kernel would give back counts as free."""
    for limit, usage, inactive in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limited = _number(folder / limit)
        if limited is not None:
            return max(0, limited - (_number(folder / usage) or 0) + _stat(folder / "memory.stat", inactive))
    return None


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _stat(path: Path, name: str) -> int:
    try:
        fields = dict(line.split() for line in path.read_text().splitlines())
    except OSError:
        return 0
    return int(fields.get(name, 0))
