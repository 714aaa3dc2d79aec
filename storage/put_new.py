"""The one primitive that everything rests on: an atomic create-if-absent of a small complete object.

`put_new(key, body)` is true if and only if the object under `key` holds exactly `body` afterwards. Bodies that must have one winner
carry a UUID; then true means "we won". This one sentence also settles every ambiguous answer (a time-out, a 409, a 412 that our own
retried request caused): read back, compare, and the truth is known. It makes the call idempotent, too.
"""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final

from .errors import NotFound

_NO_LINKS: Final = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})  # exFAT, some FUSE and SMB mounts
TEMPORARY: Final = re.compile(r"^\.new-[0-9a-f]{32}$")


def temporary_name() -> str:
    """Beside the final file, so that link and rename stay within one file system; listings skip it."""
    return f".new-{uuid.uuid4().hex}"


def put_new_posix(path: Path, body: bytes) -> bool:
    """Creates `path` with `body` unless it exists; durable on return. `link` is atomic and fails when the name is taken, on NFS too.

    Raises:
        OSError: from the file system, unless the object turns out to be there with our bytes.
    """
    make_directories(path.parent)
    temporary = path.parent / temporary_name()
    try:
        write_durably(temporary, body)
        won = _link(temporary, path, body)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)
    return won


def _link(temporary: Path, path: Path, body: bytes) -> bool:
    try:
        os.link(temporary, path)
    except OSError as error:  # taken, or an ambiguous answer (NFS repeats requests): the bytes tell
        if path.exists():
            return path.read_bytes() == body
        if error.errno in _NO_LINKS:
            raise OSError(errno.ENOTSUP, f"{path.parent} has no hard links, which an atomic create-if-absent needs") from error
        raise
    return True


def write_durably(path: Path, body: bytes) -> None:
    """A new file with these bytes, on the disk when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        write_all(descriptor, body)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)  # raises what the file system reports at close (NFS: a failed delayed write)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def sync_directory(path: Path) -> None:
    """Makes creations, links and renames in this directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(path: Path) -> None:
    """Like mkdir -p, with every new name durable in its parent. Raises NotADirectoryError where a file is in the way."""
    if path.is_dir():
        return
    make_directories(path.parent)
    try:
        path.mkdir(exist_ok=True)  # not looked up first: another writer may be making it right now
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, f"{path} is a file, not a folder", str(path)) from None
    sync_directory(path.parent)


def put_new_remote(
    create: Callable[[], bool], read: Callable[[], bytes], body: bytes, *, is_ambiguous: Callable[[BaseException], bool]
) -> bool:
    """One try of put_new on an object store; the caller repeats it while it raises something transient.

    Args:
        create: a conditional PUT; false when the store says that the object exists.
        read: the whole object; raises NotFound.
        is_ambiguous: errors after which the object may or may not have been written.

    Raises:
        the error of `create`, when the object is not there.
    """
    try:
        if create():
            return True
    except Exception as error:  # every library has its own; all are raised again unless the object is there
        if not is_ambiguous(error):
            raise
        try:
            return read() == body
        except NotFound:
            raise error from None
    return read() == body
