"""The tokens of a run's root, opened on a node: mapped into memory, or read where they lie. What the files hold says index.py."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from keepstep.storage.canonical import sha256_hex
from keepstep.storage.store import Store

from .index import FOLDER, INDEX, PARTS, TOKENIZER, Extent, Part, TokenIndex, documents_key, marks_key, read_index, shard_key
from .streaming import StreamedFile, StreamedTokens
from .tokenizer import Tokenizer, load_tokenizer

__all__ = ["Extent", "MappedTokens", "TokenArray", "TokenIndex", "TokenReader", "Tokens", "open_tokens", "read_index"]

_BLOCK_BYTES: Final = 8 << 20

TokenArray = npt.NDArray[np.unsignedinteger[Any]]
Starts = npt.NDArray[np.uint64]
Marks = npt.NDArray[np.uint32]


class TokenReader(Protocol):
    """Token ids by place: `MappedTokens`, `StreamedTokens`, or an array."""

    def __len__(self) -> int: ...
    def __getitem__(self, places: npt.NDArray[np.int64] | slice, /) -> TokenArray: ...


class MappedTokens:
    """Arrays that follow each other, as one. Read-only."""

    def __init__(self, arrays: Sequence[TokenArray]) -> None:
        self._arrays = tuple(arrays)
        self._bounds = np.cumsum([0, *map(len, arrays)])

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def __getitem__(self, places: npt.NDArray[np.int64] | slice) -> TokenArray:
        if len(self._arrays) == 1:
            return self._arrays[0][places]
        if isinstance(places, slice):
            return self._slice(*places.indices(len(self)))
        numbers = np.searchsorted(self._bounds, places, side="right") - 1
        out = np.empty(places.shape, dtype=self._arrays[0].dtype)
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            out[mine] = self._arrays[number][places[mine] - self._bounds[number]]
        return out

    def _slice(self, first: int, last: int, step: int) -> TokenArray:
        if step != 1:
            return self[np.arange(first, last, step)]
        bounds = zip(self._arrays, self._bounds[:-1].tolist(), strict=True)
        return np.concatenate([array[max(0, first - start) : max(0, last - start)] for array, start in bounds])


@dataclass(frozen=True)
class Tokens:
    """What a rank trains and evaluates on; read-only, and memory-mapped unless it is streamed."""

    index: TokenIndex
    train: TokenReader
    held_out: TokenReader
    starts: Starts  # of the training documents, in tokens
    held_out_starts: Starts
    marks: Marks | None  # see index.py
    held_out_marks: Marks | None
    tokenizer_json: bytes

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Parsed at first use: training itself only needs numbers."""
        return load_tokenizer(self.tokenizer_json)


def open_tokens(store: Store, scratch: Path | None = None, alive: Callable[[], None] = lambda: None, *, streaming: bool = False) -> Tokens:
    """The root's tokens, memory-mapped: in place on a file system, otherwise from a verified copy in this node's `scratch`.

    Several ranks of a node may call it at once: each would write the same bytes, and renames them into place.

    Args:
        alive: called for each block that is read to be verified.
        streaming: the training tokens stay where they are, and are read and verified block by block.

    Raises:
        ValueError: nothing was prepared, or the bytes are not those that were.
    """
    index = read_index(store)
    if index is None:
        raise ValueError(f"{store.name} holds no tokens yet: run `keepstep prepare` first")
    local = _Local(store, scratch, alive)
    held_out = local.tokens(index, "held_out")
    starts, held_out_starts = (local.starts(name, index.part(name)) for name in PARTS)
    marks, held_out_marks = (local.marks(name, index.part(name)) for name in PARTS)
    train = _streamed(store, index) if streaming else local.tokens(index, "train")
    tokenizer_json = store.get(TOKENIZER)
    if sha256_hex(tokenizer_json) != index.tokenizer_sha256:
        raise _damaged(store, TOKENIZER)
    return Tokens(index, train, held_out, starts, held_out_starts, marks, held_out_marks, tokenizer_json)


def _streamed(store: Store, index: TokenIndex) -> StreamedTokens:
    shards = enumerate(index.train.shards)
    files = tuple(StreamedFile(key=shard_key("train", i), num_tokens=shard.tokens, hashes=shard.blocks) for i, shard in shards)
    return StreamedTokens(store, files, np.dtype(index.dtype), index.block_bytes)


@dataclass(frozen=True)
class _Local:
    """Objects of a root as mapped arrays. They are verified once per node: the copy or the marker is named after the hash."""

    store: Store
    scratch: Path | None
    alive: Callable[[], None]

    def tokens(self, index: TokenIndex, name: str) -> MappedTokens:
        shards = enumerate(index.part(name).shards)
        return MappedTokens([self._mapped(shard_key(name, i), shard.sha256, index.dtype, shard.tokens) for i, shard in shards])

    def starts(self, name: str, part: Part) -> Starts:
        return self._mapped(documents_key(name), part.starts_sha256, "<u8", part.documents)

    def marks(self, name: str, part: Part) -> Marks | None:
        return self._mapped(marks_key(name), part.marks_sha256, "<u4", part.documents) if part.marks_sha256 else None

    def _mapped(self, key: str, sha256: str, dtype: str, count: int) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = np.memmap(self._path(key, sha256, count * np.dtype(dtype).itemsize), dtype=np.dtype(dtype), mode="r")
        assert len(array) == count
        return array

    def _path(self, key: str, sha256: str, num_bytes: int) -> Path:
        """A local file with the object's bytes, verified."""
        in_place = self.store.local_path(key)
        if self.scratch is None:
            if in_place is None:
                raise ValueError(f"{self.store.name} is remote: its tokens need a local folder for a copy")
            return self._verified(key, in_place, sha256)
        name = key.rpartition("/")[2].removesuffix(".bin")
        copy = self.scratch / FOLDER / f"{name}-{sha256[:16]}.bin"
        if copy.exists():
            return copy.resolve()
        copy.parent.mkdir(parents=True, exist_ok=True)
        temporary = copy.with_suffix(f".{uuid.uuid4().hex}")
        if in_place is not None:
            temporary.symlink_to(self._verified(key, in_place, sha256).absolute())
        else:
            self._copy(key, temporary, num_bytes)
            self._verified(key, temporary, sha256)
        temporary.replace(copy)
        return copy.resolve()

    def _copy(self, key: str, path: Path, num_bytes: int) -> None:
        with path.open("wb") as file:
            for start in range(0, num_bytes, _BLOCK_BYTES):
                file.write(self.store.get_range(key, start, min(_BLOCK_BYTES, num_bytes - start)))
                self.alive()

    def _verified(self, key: str, path: Path, sha256: str) -> Path:
        sha = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                sha.update(block)
                self.alive()
        if sha.hexdigest() != sha256:
            raise _damaged(self.store, key)
        return path


def _damaged(store: Store, key: str) -> ValueError:
    return ValueError(f"{store.name}: {key} is not what {INDEX} says; delete the folder {FOLDER}/ and run `keepstep prepare` again")
