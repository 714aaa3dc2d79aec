"""What can go wrong below a root, as one tree.

    StorageError
      +-- StoreError               the storage root did not do what was asked
      |     +-- NotFound           no object under this key
      |     +-- StoreForbidden     the root is there, these credentials or permissions are not enough
      |     +-- StoreFull          no space, no quota
      |     +-- StoreUnavailable   transient errors until the deadline of the call was over
      |     +-- StoreRefused       the start-up probe: this root must not hold a run, with the remedy
      +-- Fenced                   a coordinator of a newer term reigns: stop acting
      +-- CorruptRecord            the bytes of a run-log record are not what was written
      +-- IncompleteCheckpoint     rank indexes do not make a whole checkpoint (yet)
      +-- DamagedCheckpoint        a committed checkpoint is not what was committed
      +-- TornStage                a staging buffer was written while it was filled or read

A damaged checkpoint is never a `StoreError` and the other way round: a store that cannot be reached says nothing about the bytes in it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .records import Opened


class StorageError(Exception):
    """Base of everything that storage raises on purpose."""


class StoreError(StorageError):
    """The storage root did not do what was asked."""


class NotFound(StoreError):
    """No object under this key."""


class StoreForbidden(StoreError):
    """The root is there, but these credentials or permissions are not enough."""


class StoreFull(StoreError):
    """No space or no quota is left."""


class StoreUnavailable(StoreError):
    """Transient errors until the deadline of the call was over."""


class StoreRefused(StoreError):
    """The start-up probe says that this root must not hold a run; the message names the remedy."""


class Fenced(StorageError):
    """A coordinator of a newer term reigns, or may reign; `opened` is its record, as far as we could read it."""

    def __init__(self, opened: Opened, why: str = "") -> None:
        why = why or f"term {opened.term} was opened by {opened.host} (pid {opened.pid}, {opened.url or 'no address'})"
        super().__init__(f"fenced: {why}")
        self.opened = opened


class CorruptRecord(StorageError):
    """The bytes of a run-log record are not what was written."""


class TornStage(StorageError):
    """Somebody else wrote into a staging buffer while it was filled or read: its bytes are nobody's checkpoint."""


class IncompleteCheckpoint(StorageError):
    """The rank indexes of a directory do not make a whole checkpoint."""


class DamagedCheckpoint(StorageError):
    """A committed checkpoint is not what was committed: quarantine `directory`, resume from the commit before it."""

    def __init__(self, directory: str, file: str, why: str) -> None:
        super().__init__(f"damaged checkpoint {directory}: {file}: {why}")
        self.directory = directory
        self.file = file
        self.why = why

    def __reduce__(self) -> tuple[type[DamagedCheckpoint], tuple[str, str, str]]:
        return type(self), (self.directory, self.file, self.why)


_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def from_os_error(error: OSError, what: str) -> StoreError:
    """The member of the tree for an operating system's error; `what` says what was tried, e.g. "write data/x"."""
    message = f"cannot {what}: {error.strerror or error}"
    if isinstance(error, FileNotFoundError):
        return NotFound(message)
    if error.errno in _FORBIDDEN or isinstance(error, PermissionError):
        return StoreForbidden(message)
    if error.errno in _FULL:
        return StoreFull(message)
    return StoreError(message)
