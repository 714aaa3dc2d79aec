"""The sequence lock of a staging buffer: whoever copies bytes out of it can tell whether somebody wrote into it meanwhile.

A header behind the bytes holds a number that is odd while a rank fills the buffer and even when it has finished; every filling raises it.
A rank names the even number when it submits. The persister compares before it reads and again after: the same number twice proves that
no filling began in between (Lamport 1977, "Concurrent reading and writing"). It never makes a writer wait.
"""

from __future__ import annotations

import struct
from typing import Final

from .errors import TornStage

HEADER_BYTES: Final = 4096
_NUMBER: Final = struct.Struct("<Q")


class SequenceLock:
    """The header of one buffer, as this process maps it."""

    def __init__(self, header: memoryview) -> None:
        self._header = header

    @property
    def number(self) -> int:
        value: int = _NUMBER.unpack_from(self._header)[0]
        return value

    def begin(self) -> int:
        """The bytes are about to change; the odd number for `end`."""
        odd = (self.number + 1) | 1
        _NUMBER.pack_into(self._header, 0, odd)
        return odd

    def end(self, odd: int) -> int:
        """The bytes stand; the even number that names them. Raises TornStage: somebody else began to fill, too."""
        self.check(odd)
        _NUMBER.pack_into(self._header, 0, odd + 1)
        return odd + 1

    def check(self, expected: int) -> None:
        """Raises TornStage unless nothing has begun since the header held `expected`."""
        if (found := self.number) != expected:
            raise TornStage(f"the staging buffer changed hands while it was used: filling {found} where {expected} was expected")
