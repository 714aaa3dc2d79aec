"""Restoring: every byte is verified against the committed manifest before it reaches a tensor, and nothing is unpickled.

A rank whose tensors are cut as they were saved (the same world size) reads its chunks straight into them. Otherwise DCP says
which parts of which saved chunks make up each local one, and those rows alone are read. Either way it is one call for all tensors, so that
the reader can read many blocks at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from keepstep.storage.collector import collector_paused
from keepstep.storage.errors import DamagedCheckpoint
from keepstep.storage.faults import fault_point
from keepstep.storage.manifest import Manifest, TensorEntry
from keepstep.storage.store import Store
from keepstep.storage.verify import CheckpointReader, Piece, read_manifest

from .attach import Attached
from .contract import DAMAGED_KIND, Phase
from .matching import skipped
from .portions import Portion, box, chunks_of, parts_of
from .registry import Registry
from .state import NestedTensors, byte_view, flatten, owner_of

log = logging.getLogger("keepstep.trainer")


_COPIES_BYTES: Final = 256 << 20  # in flight, for tensors that cannot be read into directly (on a GPU, a cut across rows)


class ResumeDamaged(RuntimeError):
    """The agent passes `directory` on, the coordinator quarantines it and picks an older checkpoint for all ranks."""

    kind = DAMAGED_KIND

    def __init__(self, error: DamagedCheckpoint) -> None:
        super().__init__(str(error))
        self.directory = error.directory


class VerifiedReader(Protocol):
    """What restoring needs of `storage.verify.CheckpointReader`."""

    def read_pieces(self, pieces: Iterable[Piece], /) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    num_bytes: int
    resharded: bool  # cut otherwise than it was saved
    skipped: tuple[str, ...] = ()  # tensors that differ, and may


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """The checkpoint that was loaded, beside its tensors."""

    step: int
    world_size: int  # that saved it
    state: Mapping[str, Any]  # what this rank had saved; at another world size, what rank 0 had
    first_state: Mapping[str, Any]  # what rank 0 had saved


def resume(me: Attached, tensors: NestedTensors, registry: Registry | None = None) -> Resumed:
    """Loads the one checkpoint that this attempt was told, from this node's memory where it still is, else from the root.

    Args:
        registry: what is put back beside the tensors; it is compared before a tensor is touched.

    Raises:
        ResumeDamaged: it does not verify.
        CheckpointMismatch: it is of another model.
        StateMismatch: it does not hold the parts of `registry`.
        StoreError: the root cannot be read.
    """
    assert me.spec is not None
    assert me.resume is not None
    me.mark("built")
    fault_point("rank.restore", rank=me.rank, step=me.resume.step)
    store, directory = Store.open(me.spec.root), me.resume.directory
    try:
        manifest = read_manifest(store, directory, me.resume.manifest_sha256)
        resident = me.staging.resident if me.staging else None
        reader = CheckpointReader(store, directory, manifest, resident, alive=lambda: me.report(Phase.LOAD, manifest.step))
        states = [index.state for index in manifest.ranks]
        if registry is not None:
            registry.check(states)
        restored = restore(manifest, reader, tensors)
    except DamagedCheckpoint as error:
        raise ResumeDamaged(error) from error
    if registry is not None:
        registry.restore(states)
    for alarm in reader.alarms:
        log.warning("%s", alarm)
    log.info(
        "resumed step %d from %s: %d bytes, %d of them from memory", manifest.step, directory, restored.num_bytes, reader.bytes_from_memory
    )
    me.mark("loaded")
    own = manifest.ranks[me.rank if manifest.world_size == me.world_size else 0]
    return Resumed(step=manifest.step, world_size=manifest.world_size, state=own.state, first_state=manifest.ranks[0].state)


def restore(manifest: Manifest, reader: VerifiedReader, tensors: NestedTensors, *, partial: Sequence[str] = ()) -> Restored:
    """Fills every tensor of this rank.

    Only the parts that `tensors` has keys for are read, each of them whole: {"model": ...} leaves the optimizer alone.

    Args:
        partial: patterns of names. A tensor whose name matches one may be missing in the checkpoint, extra, or of another shape or
            dtype: it is skipped and keeps the value it has. All others must be the same.

    Raises:
        CheckpointMismatch: it is of another model; no byte was read.
        ValueError: a pattern matches no tensor.
        DamagedCheckpoint: it does not verify.
    """
    flat = flatten(tensors)
    saved = _for(flat, [entry for rank in manifest.ranks for entry in rank.tensors if entry.name.partition(".")[0] in tensors])
    if skip := skipped(saved, flat, partial):
        log.warning("skipped %d tensors that differ, as told: %s", len(skip), ", ".join(sorted(skip)))
        flat = {name: tensor for name, tensor in flat.items() if name not in skip}
        saved = [entry for entry in saved if entry.name not in skip]
    with torch.no_grad(), collector_paused():
        same = _uncut(saved, flat)
        parts = _resharded(saved, flat) if same is None else same
        read_parts(reader, parts)
    return Restored(num_bytes=sum(part.num_bytes for part in parts), resharded=same is None, skipped=tuple(sorted(skip)))


def _for(flat: Mapping[str, Tensor], saved: Sequence[TensorEntry]) -> list[TensorEntry]:
    """Without those of other ranks, provided that as many ranks have tensors of their own there as here."""
    mine = {owner_of(name) for name in flat} - {None}
    if not mine or len({owner_of(entry.name) for entry in saved} - {None}) != dist.get_world_size():
        return list(saved)
    return [entry for entry in saved if owner_of(entry.name) in {None, *mine}]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows of a saved chunk, and the tensor that they (or, where `inner` cuts across them, some columns of them) go to."""

    entry: TensorEntry
    first_row: int
    shape: tuple[int, ...]  # of what is read: rows, and the rest of the chunk's shape
    inner: tuple[slice, ...]
    target: Tensor

    @property
    def offset(self) -> int:
        """Of the first byte, in the file."""
        row_bytes = math.prod(self.shape[1:]) * self.target.dtype.itemsize if self.first_row else 0
        return self.entry.offset + self.first_row * row_bytes

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.target.dtype.itemsize

    @property
    def is_direct(self) -> bool:
        """Whether the bytes can be read straight into the target."""
        return self.target.is_cpu and self.target.is_contiguous() and self.target.shape == self.shape


def part_of(entry: TensorEntry, starts: Sequence[int], sizes: Sequence[int], target: Tensor) -> Part:
    """The box of `sizes` at `starts` of a saved chunk goes to `target`, which has that shape. A scalar has no rows and is one part."""
    if not sizes:
        return whole_chunk(entry, target)
    inner = tuple(slice(start, start + size) for start, size in zip(starts[1:], sizes[1:], strict=True))
    return Part(entry=entry, first_row=starts[0], shape=(sizes[0], *entry.shape[1:]), inner=(slice(None), *inner), target=target)


def whole_chunk(entry: TensorEntry, target: Tensor) -> Part:
    return Part(entry=entry, first_row=0, shape=entry.shape, inner=(), target=target)


def _uncut(saved: Iterable[TensorEntry], flat: Mapping[str, Tensor]) -> list[Part] | None:
    """Each local tensor is one saved chunk; None when one is not."""
    saved = list(saved)
    whole = {entry.name: entry for entry in saved if entry.shape == entry.global_shape}
    chunks = {(entry.name, entry.starts, entry.shape): entry for entry in saved if entry.shape != entry.global_shape}
    parts = []
    for name, tensor in flat.items():
        if not isinstance(tensor, (DTensor, Portion)) and name in whole and tensor.numel():
            parts.append(whole_chunk(whole[name], tensor))  # of the same shape: that was compared
            continue
        for (starts, sizes), part in zip(chunks_of(tensor), parts_of(tensor), strict=True):
            if not part.numel():
                continue
            entry = chunks.get((name, starts, sizes)) or whole.get(name)
            if entry is None or (entry.starts, entry.shape) != (starts, sizes):
                return None
            parts.append(whole_chunk(entry, part))
    return parts


def _resharded(saved: Iterable[TensorEntry], flat: Mapping[str, Tensor]) -> list[Part]:
    saved = list(saved)
    entries = {(entry.name, entry.starts): entry for entry in saved}
    described = metadata_of(saved).state_dict_metadata
    parts = []
    for name, tensor in flat.items():
        there = described[name]
        assert isinstance(there, TensorStorageMetadata)
        for (starts, sizes), mine in zip(chunks_of(tensor), parts_of(tensor), strict=True):
            here = ChunkStorageMetadata(offsets=torch.Size(starts), sizes=torch.Size(sizes))
            for item in create_read_items_for_chunk_list(name, there, [here]) if mine.numel() else ():
                assert item.storage_index.offset is not None
                target = mine.detach()[box((tuple(item.dest_offsets), tuple(item.lengths)))]
                parts.append(part_of(entries[name, tuple(item.storage_index.offset)], item.storage_offsets, item.lengths, target))
    return parts


def read_parts(reader: VerifiedReader, parts: Iterable[Part]) -> None:
    """In one call, unless copies would need too much memory. Raises DamagedCheckpoint, StoreError."""
    for batch in _batches(parts):
        reader.read_pieces([Piece(part.entry.file, part.offset, byte_view(memory)) for part, memory in batch])
        for part, memory in batch:
            if memory is not part.target:
                part.target.copy_(memory[part.inner])
        batch.clear()  # gives the copies back before the next ones are made


def _batches(parts: Iterable[Part]) -> Iterator[list[tuple[Part, Tensor]]]:
    """With the memory to read into: the target itself or a copy. All at once, unless the copies would need too much."""
    batch, copies = list[tuple[Part, Tensor]](), 0
    for part in parts:
        is_direct = part.is_direct
        if not is_direct:
            if batch and copies + part.num_bytes > _COPIES_BYTES:
                yield batch
                batch, copies = [], 0
            copies += part.num_bytes
        batch.append((part, part.target if is_direct else torch.empty(part.shape, dtype=part.target.dtype)))
    if batch:
        yield batch


def metadata_of(saved: Iterable[TensorEntry]) -> Metadata:
    """DCP's description of the saved tensors, made from the manifest: the pickled .metadata is for other tools."""
    tensors: dict[str, STORAGE_TYPES] = {}
    for entry in saved:
        chunk = ChunkStorageMetadata(offsets=torch.Size(entry.starts), sizes=torch.Size(entry.shape))
        properties = TensorProperties(dtype=getattr(torch, entry.dtype))
        described = tensors.setdefault(entry.name, TensorStorageMetadata(properties, torch.Size(entry.global_shape), []))
        assert isinstance(described, TensorStorageMetadata)
        described.chunks.append(chunk)
    return Metadata(tensors)
