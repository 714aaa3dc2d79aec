"""Token files that are read where they lie: block by block, each verified with its hash, so many of them in memory and no more."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from keepstep.storage.errors import NotFound
from keepstep.storage.manifest import hash_block
from keepstep.storage.store import Store

CACHE_BYTES: Final = 64 << 20

Ids = npt.NDArray[np.unsignedinteger[Any]]
Places = npt.NDArray[np.int64]


class DamagedTokens(ValueError):
    """A block of a token file is not what was prepared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedFile:
    """One of the files that follow each other."""

    key: str
    num_tokens: int
    hashes: tuple[str, ...]  # of its blocks


@dataclass
class StreamedTokens:
    """Token ids by place, like the array that the files hold together. A block is found by its number: nothing before it is read.

    Thread-safe. A block that does not verify is read once more before it counts as damaged.
    """

    store: Store
    files: tuple[StreamedFile, ...]
    dtype: np.dtype[np.unsignedinteger[Any]]
    block_bytes: int
    cache_bytes: int = CACHE_BYTES
    _cache: OrderedDict[int, Ids] = field(default_factory=OrderedDict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        self._first_token = np.cumsum([0, *(file.num_tokens for file in self.files)])
        self._first_block = np.cumsum([0, *(len(file.hashes) for file in self.files)])

    def __len__(self) -> int:
        return int(self._first_token[-1])

    def __getitem__(self, places: Places | slice) -> Ids:
        """The ids at these places, in their shape. Raises DamagedTokens, or StoreError."""
        if isinstance(places, slice):
            places = np.arange(*places.indices(len(self)))
        blocks, offsets = self._blocks(places.ravel())
        by_block = np.argsort(blocks, kind="stable")
        numbers, starts = np.unique(blocks[by_block], return_index=True)
        chosen = dict(zip(numbers.tolist(), np.split(by_block, starts[1:]), strict=False))  # of no place np.split makes one part
        wanted = list(chosen)
        out = np.empty(blocks.shape, dtype=self.dtype)
        with self._lock:
            for some in (wanted[i : i + self._capacity] for i in range(0, len(wanted), self._capacity)):
                self._fetch(some)
                for number in some:
                    out[chosen[number]] = self._cache[number][offsets[chosen[number]]]
        return out.reshape(places.shape)

    def _blocks(self, places: Places) -> tuple[Places, Places]:
        """(number of the block, counted over all files; place in it) of each."""
        files = np.searchsorted(self._first_token, places, side="right") - 1
        blocks, offsets = np.divmod(places - self._first_token[files], self.block_bytes // self.dtype.itemsize)
        return blocks + self._first_block[files], offsets

    @property
    def _capacity(self) -> int:
        return max(1, self.cache_bytes // self.block_bytes)

    def _fetch(self, numbers: Sequence[int]) -> None:
        """Into the cache, together; what was used longest ago goes."""
        missing = [number for number in numbers if number not in self._cache]
        for number in numbers:
            if number in self._cache:
                self._cache.move_to_end(number)
        for _ in range(len(self._cache) + len(missing) - self._capacity):
            self._cache.popitem(last=False)
        if len(missing) == 1:
            self._cache[missing[0]] = self._read(missing[0])
        elif missing:
            with ThreadPoolExecutor(min(self.store.parallel_reads, len(missing)), thread_name_prefix="tokens") as pool:
                self._cache.update(zip(missing, pool.map(self._read, missing), strict=True))

    def _read(self, number: int) -> Ids:
        place = int(np.searchsorted(self._first_block, number, side="right")) - 1
        file, block = self.files[place], number - int(self._first_block[place])
        first = block * self.block_bytes
        for _ in range(2):
            try:
                body = self.store.get_range(file.key, first, self.block_bytes)
            except NotFound:
                break
            if hash_block(body) == file.hashes[block]:
                return np.frombuffer(body, dtype=self.dtype)
        raise DamagedTokens(
            f"{self.store.name}: bytes {first} to {min(first + self.block_bytes, file.num_tokens * self.dtype.itemsize)} of {file.key} "
            "(data.streaming) are not what was prepared; put the file back as it was, or delete the folder tokens/ and run "
            "`keepstep prepare` again"
        )
