"""A token file that is read where it lies: block by block, each verified with its hash, so many of them in memory and no more."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from keepstep.storage.errors import NotFound
from keepstep.storage.manifest import hash_block
from keepstep.storage.store import Store

CACHE_BYTES: Final = 64 << 20


class DamagedTokens(ValueError):
    """A block of the token file is not what was prepared."""


@dataclass
class StreamedTokens:
    """Token ids by place, like the array that the file holds. A block is found by its number: nothing before it is read.

    Thread-safe. A block that does not verify is read once more before it counts as damaged.
    """

    store: Store
    key: str
    dtype: np.dtype[np.unsignedinteger[Any]]
    num_tokens: int
    block_bytes: int
    hashes: tuple[str, ...]
    cache_bytes: int = CACHE_BYTES
    reads: int = 0  # blocks that were asked of the store
    _cache: OrderedDict[int, npt.NDArray[np.unsignedinteger[Any]]] = field(default_factory=OrderedDict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __len__(self) -> int:
        return self.num_tokens

    def __getitem__(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.unsignedinteger[Any]]:
        """The ids at these places, in their shape. Raises DamagedTokens, or StoreError."""
        blocks, offsets = np.divmod(places, self.block_bytes // self.dtype.itemsize)
        out = np.empty(places.shape, dtype=self.dtype)
        for number in np.unique(blocks).tolist():
            chosen = blocks == number
            out[chosen] = self._block(number)[offsets[chosen]]
        return out

    def _block(self, number: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        with self._lock:
            if number in self._cache:
                self._cache.move_to_end(number)
                return self._cache[number]
            body = self._read(number)
            self._cache[number] = block = np.frombuffer(body, dtype=self.dtype)
            while len(self._cache) > max(1, self.cache_bytes // self.block_bytes):
                self._cache.popitem(last=False)
            return block

    def _read(self, number: int) -> bytes:
        for _ in range(2):
            self.reads += 1
            try:
                body = self.store.get_range(self.key, number * self.block_bytes, self.block_bytes)
            except NotFound:
                break
            if hash_block(body) == self.hashes[number]:
                return body
        first = number * self.block_bytes
        raise DamagedTokens(
            f"{self.store.name}: bytes {first} to {min(first + self.block_bytes, self.num_tokens * self.dtype.itemsize)} of {self.key} "
            "(data.streaming) are not what was prepared; put the file back as it was, or delete the folder tokens/ and run "
            "`keepstep prepare` again"
        )
