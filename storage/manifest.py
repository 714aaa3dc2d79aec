"""What a checkpoint consists of: one index per rank, merged into the manifest whose hash is committed. Pure.

A rank index is written after all bytes of its rank are durable; the manifest exists when the indexes of all ranks together cover
every tensor exactly. All bytes are canonical JSON, so two coordinators that merge the same indexes write the same manifest.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, TypeVar

import xxhash

from .canonical import canonical_json, seal, sha256_hex, unseal
from .errors import CorruptRecord, IncompleteCheckpoint

FORMAT: Final = 1
BLOCK_BYTES: Final = 4 << 20
BEST_STEP: Final = "best_step"  # in a rank's state: the step with the best evaluation so far, whose checkpoint is to stay
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file of a checkpoint: its size and the xxh3-64 of each block of `block_bytes` (the last one is shorter)."""

    name: str
    num_bytes: int
    block_bytes: int = BLOCK_BYTES
    hashes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """A chunk of a global tensor: where its raw bytes (row-major) lie in a file of the same rank."""

    name: str
    file: str
    offset: int
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]  # of the chunk
    starts: tuple[int, ...]  # of the chunk within the global tensor
    global_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankIndex:
    """Everything that one rank contributes to a checkpoint. `state`: JSON of the rank itself (RNG, data position, ...)."""

    attempt: int
    step: int
    rank: int
    world_size: int
    directory: str
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]
    state: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    def body(self) -> bytes:
        """Sealed: a successor that rolls the checkpoint forward knows no hash of it from elsewhere."""
        return seal(_rank_fields(self))

    @staticmethod
    def parse(body: bytes) -> RankIndex:
        """Raises ValueError saying what is wrong."""
        try:
            fields = unseal(body, "rank index")
        except CorruptRecord as error:
            raise ValueError(str(error)) from None
        return _parse_rank(_of_format(fields, "rank index"))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All rank indexes of a checkpoint, in rank order, known to be complete."""

    attempt: int
    step: int
    directory: str
    world_size: int
    ranks: tuple[RankIndex, ...]

    @property
    def num_bytes(self) -> int:
        return sum(rank.num_bytes for rank in self.ranks)

    @property
    def best_step(self) -> int:
        """The best evaluation up to this checkpoint is of this step; -1: none counted."""
        return best_step_in(self.ranks[0].state)

    @property
    def files(self) -> dict[str, FileEntry]:
        return {file.name: file for rank in self.ranks for file in rank.files}

    def body(self) -> bytes:
        return self._body

    @cached_property
    def _body(self) -> bytes:
        head = {"format": FORMAT, "attempt": self.attempt, "step": self.step, "directory": self.directory, "world_size": self.world_size}
        return canonical_json(head | {"ranks": [_rank_fields(rank) for rank in self.ranks]}) + b"\n"

    def sha256(self) -> str:
        return sha256_hex(self._body)

    @staticmethod
    def parse(body: bytes) -> Manifest:
        """Raises ValueError saying what is wrong, IncompleteCheckpoint if the indexes in it do not make a whole."""
        fields = _loads(body, "manifest")
        return merge([_parse_rank(rank) for rank in _take(fields, "ranks", list, "manifest")])


def best_step_in(state: Mapping[str, Any]) -> int:
    """The step of the best evaluation, as a rank's state has it; -1: none."""
    step = state.get(BEST_STEP)
    return step if type(step) is int and step >= 0 else -1


def hash_blocks(data: memoryview, block_bytes: int = BLOCK_BYTES) -> tuple[str, ...]:
    """xxh3-64 of each block, as 16 hex digits. No bytes, no blocks."""
    return tuple(hash_block(block) for block in split_blocks(data, block_bytes))


def hash_block(*pieces: bytes | memoryview) -> str:
    """xxh3-64 of bytes that follow each other, as 16 hex digits."""
    if len(pieces) == 1:
        return xxhash.xxh3_64_hexdigest(pieces[0])
    hasher = block_hasher()
    for piece in pieces:
        hasher.update(piece)
    return hasher.hexdigest()


def block_hasher() -> xxhash.xxh3_64:
    """`hash_block` for bytes that come one after the other: `update`, in the end `hexdigest`."""
    return xxhash.xxh3_64()


def split_blocks(data: memoryview, block_bytes: int = BLOCK_BYTES) -> Iterator[memoryview]:
    for start in range(0, data.nbytes, block_bytes):
        yield data[start : start + block_bytes]


def merge(indexes: Sequence[RankIndex]) -> Manifest:
    """The manifest of these rank indexes, in any order.

    Raises:
        IncompleteCheckpoint: a rank is missing or there twice, they are not of one checkpoint, a file is listed twice, or the
            chunks of a tensor leave a gap or overlap.
    """
    if not indexes:
        raise IncompleteCheckpoint("no rank index")
    ranks = tuple(sorted(indexes, key=lambda index: index.rank))
    first = ranks[0]
    _check_same_checkpoint(ranks)
    _check_ranks(ranks)
    _check_files(ranks)
    _check_coverage(ranks)
    return Manifest(attempt=first.attempt, step=first.step, directory=first.directory, world_size=first.world_size, ranks=ranks)


def _check_same_checkpoint(ranks: Sequence[RankIndex]) -> None:
    of = {(rank.attempt, rank.step, rank.directory, rank.world_size) for rank in ranks}
    if len(of) != 1:
        raise IncompleteCheckpoint(f"rank indexes of different checkpoints: {sorted(of)}")


def _check_ranks(ranks: Sequence[RankIndex]) -> None:
    found, expected = [rank.rank for rank in ranks], list(range(ranks[0].world_size))
    if found != expected:
        missing, extra = sorted(set(expected) - set(found)), sorted(rank for rank in found if found.count(rank) > 1 or rank not in expected)
        raise IncompleteCheckpoint(f"{ranks[0].directory}: ranks missing {missing}, too many {extra} of {len(expected)}")


def _check_files(ranks: Sequence[RankIndex]) -> None:
    owner: dict[str, int] = {}
    for rank in ranks:
        for file in rank.files:
            if file.name in owner:
                raise IncompleteCheckpoint(f"{rank.directory}: {file.name} is listed by rank {owner[file.name]} and by rank {rank.rank}")
            owner[file.name] = rank.rank
        _check_tensors_in_files(rank)


def _check_tensors_in_files(rank: RankIndex) -> None:
    sizes = {file.name: file.num_bytes for file in rank.files}
    for tensor in rank.tensors:
        if tensor.offset + tensor.num_bytes > sizes.get(tensor.file, -1):
            raise IncompleteCheckpoint(f"{rank.directory}: rank {rank.rank}: {tensor.name} does not lie within {tensor.file}")


def _check_coverage(ranks: Sequence[RankIndex]) -> None:
    chunks: dict[str, list[TensorEntry]] = defaultdict(list)
    for rank in ranks:
        for tensor in rank.tensors:
            chunks[tensor.name].append(tensor)
    for name, of_tensor in chunks.items():
        if why := coverage_gap(of_tensor):
            raise IncompleteCheckpoint(f"{ranks[0].directory}: {name}: {why}")


def coverage_gap(chunks: Sequence[TensorEntry]) -> str:
    """Why these chunks do not tile their global tensor exactly; "" if they do."""
    shape, dtype = chunks[0].global_shape, chunks[0].dtype
    if len(chunks) == 1 and chunks[0].shape == shape and len(chunks[0].starts) == len(shape) and not any(chunks[0].starts):
        return ""
    if any(chunk.global_shape != shape or chunk.dtype != dtype for chunk in chunks):
        return "its chunks disagree about shape or dtype of the whole"
    for chunk in chunks:
        if why := _misplaced(chunk):
            return why
    covered = sum(math.prod(chunk.shape) for chunk in chunks)
    if covered != math.prod(shape):
        return f"its chunks hold {covered} elements of {math.prod(shape)}"
    if _overlap([chunk for chunk in chunks if math.prod(chunk.shape)]):
        return "its chunks overlap"
    return ""


def _misplaced(chunk: TensorEntry) -> str:
    if not len(chunk.shape) == len(chunk.starts) == len(chunk.global_shape):
        return f"a chunk of shape {chunk.shape} at {chunk.starts} cannot lie in {chunk.global_shape}"
    fits = all(
        start >= 0 and start + size <= whole for start, size, whole in zip(chunk.starts, chunk.shape, chunk.global_shape, strict=True)
    )
    return "" if fits else f"a chunk of shape {chunk.shape} at {chunk.starts} sticks out of {chunk.global_shape}"


def _overlap(chunks: Sequence[TensorEntry]) -> bool:
    """Sorting suffices when only one dimension is cut (FSDP); otherwise all pairs are compared."""
    cut = (
        [axis for axis in range(len(chunks[0].shape)) if any(chunk.shape[axis] != chunk.global_shape[axis] for chunk in chunks)]
        if chunks
        else []
    )
    if len(cut) == 1:
        spans = sorted((chunk.starts[cut[0]], chunk.starts[cut[0]] + chunk.shape[cut[0]]) for chunk in chunks)
        return any(left[1] > right[0] for left, right in itertools.pairwise(spans))
    return any(_intersect(left, right) for index, left in enumerate(chunks) for right in chunks[:index])


def _intersect(left: TensorEntry, right: TensorEntry) -> bool:
    spans = zip(left.starts, left.shape, right.starts, right.shape, strict=True)
    return all(a < b + b_size and b < a + a_size for a, a_size, b, b_size in spans)


def _rank_fields(rank: RankIndex) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "attempt": rank.attempt,
        "step": rank.step,
        "rank": rank.rank,
        "world_size": rank.world_size,
        "directory": rank.directory,
        "files": [{"name": f.name, "bytes": f.num_bytes, "block_bytes": f.block_bytes, "hashes": list(f.hashes)} for f in rank.files],
        "tensors": [tensor_fields(tensor) for tensor in rank.tensors],
        "state": dict(rank.state),
    }


def tensor_fields(tensor: TensorEntry) -> dict[str, Any]:
    """The JSON of a tensor's chunk; `parse_tensor` is its inverse."""
    return {
        "name": tensor.name,
        "file": tensor.file,
        "offset": tensor.offset,
        "bytes": tensor.num_bytes,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "starts": list(tensor.starts),
        "global_shape": list(tensor.global_shape),
    }


def parse_tensor(fields: Mapping[str, Any]) -> TensorEntry:
    values: tuple[Any, ...] = tuple(map(fields.get, _TENSOR_KINDS))
    if tuple(map(type, values)) != _KINDS:  # one comparison for a tensor: a manifest may hold a hundred thousand
        for name, kind in _TENSOR_KINDS.items():
            _take(fields, name, kind, f"tensor {fields.get('name')!r}")
    full_name, file, offset, num_bytes, dtype, shape, starts, global_shape = values
    return TensorEntry(
        name=full_name,
        file=file,
        offset=offset,
        num_bytes=num_bytes,
        dtype=dtype,
        shape=tuple(shape),
        starts=tuple(starts),
        global_shape=tuple(global_shape),
    )


_TENSOR_KINDS: Final[Mapping[str, type]] = {
    "name": str,
    "file": str,
    "offset": int,
    "bytes": int,
    "dtype": str,
    "shape": list,
    "starts": list,
    "global_shape": list,
}
_KINDS: Final = tuple(_TENSOR_KINDS.values())


def _parse_file(fields: Mapping[str, Any]) -> FileEntry:
    where = f"file {fields.get('name')!r}"
    entry = FileEntry(
        name=_take(fields, "name", str, where),
        num_bytes=_take(fields, "bytes", int, where),
        block_bytes=_take(fields, "block_bytes", int, where),
        hashes=tuple(_take(fields, "hashes", list, where)),
    )
    if len(entry.hashes) != -(-entry.num_bytes // max(entry.block_bytes, 1)):
        raise ValueError(f"{where} of {entry.num_bytes} bytes has {len(entry.hashes)} block hashes")
    return entry


def _parse_rank(fields: Mapping[str, Any]) -> RankIndex:
    where = f"rank index {fields.get('rank')!r}"
    return RankIndex(
        attempt=_take(fields, "attempt", int, where),
        step=_take(fields, "step", int, where),
        rank=_take(fields, "rank", int, where),
        world_size=_take(fields, "world_size", int, where),
        directory=_take(fields, "directory", str, where),
        files=tuple(_parse_file(file) for file in _take(fields, "files", list, where)),
        tensors=tuple(parse_tensor(tensor) for tensor in _take(fields, "tensors", list, where)),
        state=_take(fields, "state", dict, where),
    )


def _loads(body: bytes, what: str) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except ValueError as error:
        raise ValueError(f"{what} is no JSON: {error}") from None
    return _of_format(fields, what)


def _of_format(fields: Any, what: str) -> dict[str, Any]:
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ValueError(f"{what} is not of format {FORMAT}")
    return fields


def _take(fields: Mapping[str, Any], name: str, kind: type[T], where: str) -> T:
    value = fields.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: {name} is {value!r}, not {kind.__name__}")
    return value
