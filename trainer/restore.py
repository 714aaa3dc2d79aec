"""Restoring: every byte is verified against the committed manifest before it reaches a tensor, and nothing is unpickled.

A rank whose tensors are cut as they were saved (the same world size) reads its chunks straight into them. Otherwise DCP's load planner says
which parts of which saved chunks make up each local one.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from keepstep.storage.errors import DamagedCheckpoint
from keepstep.storage.manifest import Manifest, TensorEntry
from keepstep.storage.store import Store
from keepstep.storage.verify import CheckpointReader, read_manifest

from .attach import Attached
from .checkpoint import dtype_name
from .contract import DAMAGED_KIND
from .optim import local
from .parallel import chunks_of
from .state import NestedTensors, byte_view, flatten

log = logging.getLogger("keepstep.trainer")


class CheckpointMismatch(ValueError):
    """The checkpoint is sound, but it is not of this model: a tensor is missing, extra, or of another shape or dtype."""


class ResumeDamaged(RuntimeError):
    """The agent passes `directory` on, the coordinator quarantines it and picks an older checkpoint for all ranks."""

    kind = DAMAGED_KIND

    def __init__(self, error: DamagedCheckpoint) -> None:
        super().__init__(str(error))
        self.directory = error.directory


class VerifiedReader(Protocol):
    """What restoring needs of `storage.verify.CheckpointReader`."""

    def read_into(self, file: str, offset: int, destination: memoryview, /) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    num_bytes: int
    resharded: bool  # cut otherwise than it was saved


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """The checkpoint that was loaded, beside its tensors."""

    step: int
    world_size: int  # that saved it
    state: Mapping[str, Any]  # what this rank had saved; at another world size, what rank 0 had
    first_state: Mapping[str, Any]  # what rank 0 had saved


def resume(me: Attached, tensors: NestedTensors) -> Resumed:
    """Loads the one checkpoint that this attempt was told, from this node's memory where it still is, else from the root.

    Raises:
        ResumeDamaged: it does not verify.
        CheckpointMismatch: it is of another model.
        StoreError: the root cannot be read.
    """
    assert me.spec is not None
    assert me.resume is not None
    store, directory = Store.open(me.spec.root), me.resume.directory
    try:
        manifest = read_manifest(store, directory, me.resume.manifest_sha256)
        reader = CheckpointReader(store, directory, manifest, resident=me.staging.resident if me.staging else None)
        restored = restore(manifest, reader, tensors)
    except DamagedCheckpoint as error:
        raise ResumeDamaged(error) from error
    for alarm in reader.alarms:
        log.warning("%s", alarm)
    log.info(
        "resumed step %d from %s: %d bytes, %d of them from memory", manifest.step, directory, restored.num_bytes, reader.bytes_from_memory
    )
    own = manifest.ranks[me.rank if manifest.world_size == me.world_size else 0]
    return Resumed(step=manifest.step, world_size=manifest.world_size, state=own.state, first_state=manifest.ranks[0].state)


def restore(manifest: Manifest, reader: VerifiedReader, tensors: NestedTensors) -> Restored:
    """Fills every tensor of this rank. Raises CheckpointMismatch, before it reads a byte, or DamagedCheckpoint.

    Only the parts that `tensors` has keys for are read, each of them whole: {"model": ...} leaves the optimizer alone.
    """
    flat = flatten(tensors)
    saved = [entry for rank in manifest.ranks for entry in rank.tensors if entry.name.partition(".")[0] in tensors]
    check_same_model(saved, flat)
    chunks = {(entry.name, entry.starts, entry.shape): entry for entry in saved}
    wanted = {name: chunk for name, tensor in flat.items() for chunk in chunks_of(tensor) if local(tensor).numel()}
    with torch.no_grad():
        if all((name, *chunk) in chunks for name, chunk in wanted.items()):
            num_bytes = sum(read_chunk(reader, chunks[name, *chunk], local(flat[name])) for name, chunk in wanted.items())
            return Restored(num_bytes=num_bytes, resharded=False)
        return Restored(num_bytes=_reshard(saved, reader, tensors), resharded=True)


def check_same_model(saved: Iterable[TensorEntry], flat: Mapping[str, Tensor]) -> None:
    """Exactly the same names, global shapes and dtypes."""
    there = {entry.name: (entry.dtype, tuple(entry.global_shape)) for entry in saved}
    here = {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in flat.items()}
    wrong = [f"{name} is missing in it" for name in sorted(here.keys() - there.keys())]
    wrong += [f"{name} is not in this model" for name in sorted(there.keys() - here.keys())]
    wrong += [
        f"{name} is {_shown(there[name])} in it and {_shown(here[name])} here"
        for name in sorted(here)
        if there.get(name, here[name]) != here[name]
    ]
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise CheckpointMismatch(f"the checkpoint is of another model or optimizer: {'; '.join(wrong[:5])}{more}")


def _shown(what: tuple[str, tuple[int, ...]]) -> str:
    return f"{what[0]} {list(what[1])}"


def read_chunk(reader: VerifiedReader, entry: TensorEntry, destination: Tensor) -> int:
    """Reads one saved chunk into a tensor of its shape and dtype, through a copy only where the tensor is no plain memory."""
    target = (
        destination
        if destination.device.type == "cpu" and destination.is_contiguous()
        else torch.empty(entry.shape, dtype=destination.dtype)
    )
    reader.read_into(entry.file, entry.offset, byte_view(target))
    if target is not destination:
        destination.copy_(target)
    return entry.num_bytes


def _reshard(saved: list[TensorEntry], reader: VerifiedReader, tensors: NestedTensors) -> int:
    planner = DefaultLoadPlanner()
    planner.set_up_planner(dict(tensors), metadata_of(saved), is_coordinator=False)
    entries = {MetadataIndex(entry.name, entry.starts): entry for entry in saved}
    by_chunk: dict[MetadataIndex, list[ReadItem]] = defaultdict(list)
    for item in planner.create_local_plan().items:
        by_chunk[item.storage_index].append(item)
    for index, items in by_chunk.items():
        chunk = torch.empty(entries[index].shape, dtype=getattr(torch, entries[index].dtype))
        read_chunk(reader, entries[index], chunk)
        for item in items:
            planner.resolve_tensor(item).detach().copy_(_narrow(chunk, item))
    return sum(entries[index].num_bytes for index in by_chunk)


def _narrow(chunk: Tensor, item: ReadItem) -> Tensor:
    return chunk[tuple(slice(start, start + size) for start, size in zip(item.storage_offsets, item.lengths, strict=True))]


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
