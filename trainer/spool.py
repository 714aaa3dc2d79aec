"""Numbers on their way to a root: collected in a local file, hashed, and written as an object."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from keepstep.storage.manifest import hash_block
from keepstep.storage.store import Store

from .index import Shard

HASHED_BYTES: Final = 1 << 20  # what streaming reads at once
_WRITE_BYTES: Final = 8 << 20

Array = npt.NDArray[Any]


class Spool:
    """Numbers on their way to the root, in a local file without a name: nothing of it stays, however this process ends."""

    def __init__(self, dtype: str) -> None:
        self._dtype = np.dtype(dtype)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, values: Array) -> None:
        self._file.write(values.astype(self._dtype, copy=False).tobytes())
        self._length += len(values)

    def blocks(self, first: int, count: int, block_bytes: int) -> Iterator[bytes]:
        """The bytes of so many numbers, block by block."""
        self._file.seek(first * self._dtype.itemsize)
        left = count * self._dtype.itemsize
        while left:
            block = self._file.read(min(block_bytes, left))
            left -= len(block)
            yield block

    def write(self, store: Store, key: str, first: int = 0, count: int = -1) -> Shard:
        """Into the root; returns what was written."""
        count = self._length - first if count < 0 else count
        sha, hashes = hashlib.sha256(), []
        for block in self.blocks(first, count, HASHED_BYTES):
            sha.update(block)
            hashes.append(hash_block(block))
        store.write_file(key, self.blocks(first, count, _WRITE_BYTES), num_bytes=count * self._dtype.itemsize)
        return Shard(tokens=count, sha256=sha.hexdigest(), blocks=tuple(hashes))

    def close(self) -> None:
        self._file.close()
