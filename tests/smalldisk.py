"""A small disk that can be filled, made read-only and given back: a tmpfs of its own. Needs root."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

BALLAST = "ballast"
PAGE = 4096


@dataclass(frozen=True, slots=True)
class SmallDisk:
    path: Path

    def fill(self, *, leave_pages: int = 0) -> None:
        """Takes what is free, but for so many pages of 4 KiB; others may be writing. Called again: what was freed since, too."""
        descriptor = os.open(self.path / BALLAST, os.O_WRONLY | os.O_CREAT)
        pages = 1024
        try:
            while pages:
                if not self._take(descriptor, pages, leave_pages):
                    pages //= 2
        finally:
            os.close(descriptor)

    def _take(self, descriptor: int, pages: int, leave_pages: int) -> bool:
        if os.statvfs(self.path).f_bfree - leave_pages < pages:
            return False
        try:
            os.posix_fallocate(descriptor, os.fstat(descriptor).st_size, pages * PAGE)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return False
        return True

    def free(self) -> None:
        (self.path / BALLAST).unlink()

    def remount(self, option: str) -> None:
        """ "ro" or "rw"."""
        subprocess.run(["mount", "-o", f"remount,{option}", str(self.path)], check=True, capture_output=True)


@contextlib.contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[SmallDisk]:
    """Skips the test for who may not mount; a container that drops the right to is no failure of ours."""
    path.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=755", "keepstep-test", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True, capture_output=True)
