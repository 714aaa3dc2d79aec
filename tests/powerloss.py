"""What a disk may hold after a power loss: every file system call of a program is recorded, and replayed with less than all of it.

POSIX promises little. Bytes are durable once their file was fsynced, names once their folder was; of everything else any part may have
reached the disk, in any order, and a write torn. `Recorder` notes the calls, `Crash` says what was durable at one instant, `Disk` is
what a choice of the rest leaves behind.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pytest

ROOT = 0  # number of the recorded folder; every file and folder gets a number of its own


@dataclass(frozen=True, slots=True)
class Write:
    node: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Resize:
    """Truncation or allocation: `is_least` leaves a file that is larger as it is."""

    node: int
    num_bytes: int
    is_least: bool


@dataclass(frozen=True, slots=True)
class Enter:
    """A name appears: file or folder created, or a link."""

    folder: int
    name: str
    node: int
    is_folder: bool = False


@dataclass(frozen=True, slots=True)
class Leave:
    """A name goes. `emptied`: number of the folder that it was, if it was one."""

    folder: int
    name: str
    emptied: int | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """Rename, within one folder or not; atomic."""

    source: int
    source_name: str
    folder: int
    name: str
    node: int


@dataclass(frozen=True, slots=True)
class Sync:
    """fsync of a file or of a folder."""

    node: int


@dataclass(frozen=True, slots=True)
class Mark:
    """Not a call: what the program was sure of at this instant."""

    what: str
    number: int


Change: TypeAlias = Write | Resize | Enter | Leave | Move
Event: TypeAlias = Change | Sync | Mark


def place(change: Change) -> int:
    """The file or folder whose fsync makes the change durable."""
    return change.node if isinstance(change, Write | Resize) else change.folder


@dataclass(slots=True)
class Disk:
    """Files and folders by number; only what can be reached by a name counts."""

    files: dict[int, bytearray] = field(default_factory=dict)
    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})

    def apply(self, change: Change) -> None:
        match change:
            case Write(node, offset, data):
                body = self.files.setdefault(node, bytearray())
                body.extend(bytes(max(0, offset + len(data) - len(body))))
                body[offset : offset + len(data)] = data
            case Resize(node, num_bytes, is_least):
                body = self.files.setdefault(node, bytearray())
                body.extend(bytes(max(0, num_bytes - len(body))))
                del body[len(body) if is_least else num_bytes :]
            case Enter(folder, name, node, is_folder):
                self._entries(folder)[name] = node
                if is_folder:
                    self._entries(node)
                else:
                    self.files.setdefault(node, bytearray())
            case Leave(folder, name, _):
                self._entries(folder).pop(name, None)
            case Move(source, source_name, folder, name, node):
                self._entries(source).pop(source_name, None)
                self._entries(folder)[name] = node

    def _entries(self, folder: int) -> dict[str, int]:
        return self.folders.setdefault(folder, {})

    def tree(self) -> dict[str, bytes]:
        """What a reader finds: path -> bytes."""
        return dict(self._below(ROOT, ""))

    def _below(self, folder: int, prefix: str) -> Iterator[tuple[str, bytes]]:
        for name, node in sorted(self.folders[folder].items()):
            if node in self.folders:
                yield from self._below(node, f"{prefix}{name}/")
            else:
                yield prefix + name, bytes(self.files.get(node, b""))


@dataclass(frozen=True, slots=True)
class Crash:
    """The instant after `events[:at]`: what was durable, and what was on its way to the disk."""

    before: Sequence[Event]

    @property
    def marks(self) -> tuple[Mark, ...]:
        return tuple(event for event in self.before if isinstance(event, Mark))

    def pending(self) -> list[int]:
        """Positions of the changes that no fsync followed."""
        synced: set[int] = set()
        found = []
        for position in range(len(self.before) - 1, -1, -1):
            event = self.before[position]
            if isinstance(event, Sync):
                synced.add(event.node)
            elif isinstance(event, Mark):
                continue
            elif place(event) not in synced:
                found.append(position)
            elif isinstance(event, Leave) and event.emptied is not None:
                synced.add(event.emptied)  # what happened in a folder that is gone for good does not matter any more
        return found[::-1]

    def disk(self, lost: Collection[int], torn: Mapping[int, Change] = {}) -> Disk:
        """What is there when `lost` never reached the disk and `torn` did so in another shape."""
        disk = Disk()
        for position, event in enumerate(self.before):
            if not isinstance(event, Sync | Mark) and position not in lost:
                disk.apply(torn.get(position, event))
        return disk


@dataclass(slots=True)
class Recorder:
    """Notes what happens below `root` while it is installed.

    Attributes:
        forgets: kinds of fsync ("file", "folder") that are not noted, as if the program had left them out.
    """

    root: Path
    forgets: frozenset[str] = frozenset()
    events: list[Event] = field(default_factory=list)
    _numbers: dict[tuple[int, int], int] = field(default_factory=dict)  # (device, inode) -> our number
    _next: int = 1
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def mark(self, what: str, number: int) -> None:
        with self._lock:
            self.events.append(Mark(what, number))

    @contextlib.contextmanager
    def installed(self) -> Iterator[Recorder]:
        """In place of the calls in `os`. The root must be an empty folder."""
        self._numbers[self._identity(self.root)] = ROOT
        with pytest.MonkeyPatch.context() as patch:
            for name in ("open", "write", "pwrite", "posix_fallocate", "ftruncate", "fsync", "link", "unlink", "mkdir", "rmdir", "rename"):
                patch.setattr(os, name, self._locked(getattr(self, f"_{name}"), getattr(os, name)))
            patch.setattr(os, "remove", os.unlink)
            patch.setattr(os, "replace", os.rename)
            patch.setattr(os, "fdatasync", os.fsync)
            yield self

    def _locked(self, call: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                return call(real, *arguments, **options)

        return recorded

    # --- the calls: do it, then note it -----------------------------------------------------------------------------

    def _open(self, real: Any, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        is_new = bool(flags & os.O_CREAT) and not self._exists(path, dir_fd)
        descriptor: int = real(path, flags, mode, dir_fd=dir_fd)
        if is_new:
            self._enter(path, dir_fd, self._number_new(path, dir_fd))
        elif flags & os.O_TRUNC and (node := self._numbers.get(self._identity(descriptor))) is not None:
            self.events.append(Resize(node, 0, is_least=False))
        return descriptor

    def _write(self, real: Any, descriptor: int, data: Any) -> int:
        node = self._numbers.get(self._identity(descriptor))
        if node is None:
            return int(real(descriptor, data))
        count = int(real(descriptor, data))
        self.events.append(Write(node, os.lseek(descriptor, 0, os.SEEK_CUR) - count, bytes(memoryview(data).cast("B")[:count])))
        return count

    def _pwrite(self, real: Any, descriptor: int, data: Any, offset: int) -> int:
        count = int(real(descriptor, data, offset))
        if (node := self._numbers.get(self._identity(descriptor))) is not None:
            self.events.append(Write(node, offset, bytes(memoryview(data).cast("B")[:count])))
        return count

    def _posix_fallocate(self, real: Any, descriptor: int, offset: int, num_bytes: int) -> None:
        real(descriptor, offset, num_bytes)
        if (node := self._numbers.get(self._identity(descriptor))) is not None:
            self.events.append(Resize(node, offset + num_bytes, is_least=True))

    def _ftruncate(self, real: Any, descriptor: int, num_bytes: int) -> None:
        real(descriptor, num_bytes)
        if (node := self._numbers.get(self._identity(descriptor))) is not None:
            self.events.append(Resize(node, num_bytes, is_least=False))

    def _fsync(self, real: Any, descriptor: int) -> None:
        real(descriptor)
        node = self._numbers.get(self._identity(descriptor))
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        if node is not None and kind not in self.forgets:
            self.events.append(Sync(node))

    def _link(self, real: Any, source: Any, target: Any, **options: Any) -> None:
        real(source, target, **options)
        if (node := self._numbers.get(self._identity(target))) is not None:
            self._enter(target, None, node)

    def _unlink(self, real: Any, path: Any, *, dir_fd: int | None = None) -> None:
        real(path, dir_fd=dir_fd)
        folder, name = self._parent(path, dir_fd)
        if folder is not None:
            self.events.append(Leave(folder, name))

    def _mkdir(self, real: Any, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        real(path, mode, dir_fd=dir_fd)
        self._enter(path, dir_fd, self._number_new(path, dir_fd), is_folder=True)

    def _rmdir(self, real: Any, path: Any, *, dir_fd: int | None = None) -> None:
        emptied = self._numbers.get(self._identity(path, dir_fd))
        real(path, dir_fd=dir_fd)
        folder, name = self._parent(path, dir_fd)
        if folder is not None:
            self.events.append(Leave(folder, name, emptied))

    def _rename(self, real: Any, source: Any, target: Any, **options: Any) -> None:
        real(source, target, **options)
        node = self._numbers.get(self._identity(target))
        (folder, name), (old_folder, old_name) = self._parent(target, None), self._parent(source, None)
        if node is not None and folder is not None and old_folder is not None:
            self.events.append(Move(old_folder, old_name, folder, name, node))

    # --- who is who -------------------------------------------------------------------------------------------------

    def _enter(self, path: Any, dir_fd: int | None, node: int | None, *, is_folder: bool = False) -> None:
        folder, name = self._parent(path, dir_fd)
        if folder is not None and node is not None:
            self.events.append(Enter(folder, name, node, is_folder))

    def _parent(self, path: Any, dir_fd: int | None) -> tuple[int | None, str]:
        """The number of the folder (None: not below the root) and the name in it."""
        text = os.fspath(path)
        folder = self._identity(dir_fd) if dir_fd is not None else self._identity(os.path.dirname(text) or ".")
        return self._numbers.get(folder), os.path.basename(text)

    def _number_new(self, path: Any, dir_fd: int | None) -> int | None:
        """Inodes are used again after a deletion, our numbers are not. None outside the root."""
        if self._parent(path, dir_fd)[0] is None:
            return None
        number, self._next = self._next, self._next + 1
        self._numbers[self._identity(path, dir_fd)] = number
        return number

    @staticmethod
    def _identity(path: Any, dir_fd: int | None = None) -> tuple[int, int]:
        status = os.stat(path, dir_fd=dir_fd)
        return status.st_dev, status.st_ino

    @staticmethod
    def _exists(path: Any, dir_fd: int | None) -> bool:
        try:
            os.stat(path, dir_fd=dir_fd)
        except FileNotFoundError:
            return False
        return True


def torn_shapes(change: Change) -> tuple[Change, ...]:
    """What may be left of one change of which not everything reached the disk."""
    if not isinstance(change, Write) or not change.data:
        return ()
    half = len(change.data) // 2
    blank = Write(change.node, change.offset, bytes(len(change.data)))  # the size arrived, the blocks did not
    return Write(change.node, change.offset, change.data[:half]), blank
