"""Saving: tensors are copied into shared memory of this node's persister, which makes them durable while training goes on.

What is staged is byte for byte what torch.distributed.checkpoint's own writer would have stored, see template.py: nothing is serialised
at a save, and no collective runs after the plan was made once. Restoring is in restore.py.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor
from xxhash import xxh3_64_intdigest

from keepstep.storage.arena import Buffer, StagedFile
from keepstep.storage.canonical import canonical_json, sha256_hex
from keepstep.storage.faults import fault_point
from keepstep.storage.layout import METADATA_NAME, checkpoint_directory, shard_name
from keepstep.storage.manifest import TensorEntry

from .attach import Attached
from .copying import Copier, Copy, Wait
from .listed import Outline, outline_of
from .portions import Portion, chunks_of, has_replicas, parts_of
from .state import NestedTensors, byte_view, flatten
from .template import Template, lay_out

_PERSIST_DEADLINE_S: Final = 600.0
_FINAL_PATIENCE_S: Final = 600.0
_BUFFERS: Final = 2  # of a rank, which take turns
_COMPARED: Final = 1 << 18  # elements of a tensor, at most, that tell whether ranks have the same
_COMPARED_OF_PART: Final = 1 << 12  # where there are many of them


class StagingArea(Protocol):
    """What saving needs of `storage.arena.Staging`."""

    last_error: str

    @property
    def busy(self) -> bool: ...
    def reserve(self, num_bytes: int) -> None: ...
    def buffer(self, num_bytes: int, template: str = "") -> Buffer | None: ...
    def submit(
        self,
        *,
        directory: str,
        step: int,
        files: Sequence[StagedFile],
        tensors: Sequence[TensorEntry],
        state: Mapping[str, Any],
        patience_s: float,
    ) -> None: ...
    def wait_idle(self, deadline_s: float) -> bool: ...


class NotPersisted(RuntimeError):
    """The final checkpoint could not be made durable: the run must not claim its result."""

    kind = "persister"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """This rank's part of every checkpoint of an attempt."""

    outline: Outline  # of the state that it was made for
    template: Template
    sources: tuple[int, ...]  # of each tensor of the template: which one of `outline_of`'s list
    metadata: bytes  # rank 0: the file .metadata; others: nothing
    files: tuple[StagedFile, ...]
    tensors: tuple[TensorEntry, ...]  # one object for all saves: Staging sends it once
    name: str  # hash of all bytes that do not come from tensors

    @property
    def num_bytes(self) -> int:
        return self.template.num_bytes + len(self.metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Copying:
    """A save whose tensors are on their way into the buffer."""

    step: int
    wait: Wait | None  # None: they are there
    submit: Callable[[], None]


class Checkpointer:
    """Stages this rank's part of checkpoints.

    Args:
        staging: the node's persister; None when detached: nothing is saved.
        attempt, nonce: from the rank's spec; they name the directories.
        tell: hears how long training was held up, each time.
        copy: how tensors get into the buffer; None: by a `Copier`.
    """

    def __init__(
        self,
        staging: StagingArea | None,
        *,
        rank: int,
        attempt: int,
        nonce: str,
        tell: Callable[[float], None] = lambda stall_s: None,
        copy: Copy | None = None,
    ) -> None:
        self._staging = staging
        self._tell = tell
        self._copy = copy or Copier()
        self._rank, self._attempt, self._nonce = rank, attempt, nonce
        self._layout: _Layout | None = None
        self._views: list[tuple[Any, list[Tensor]]] = []  # of each buffer that was filled with this layout: its memory, tensors over it
        self._copying: _Copying | None = None
        self.stall_s = 0.0  # how long the last save held up training

    @staticmethod
    def of(me: Attached) -> Checkpointer:
        """For this rank; detached, it saves nothing."""
        attempt, nonce = (me.spec.attempt, me.spec.nonce) if me.spec else (0, "")
        return Checkpointer(me.staging, rank=me.rank, attempt=attempt, nonce=nonce, tell=me.stalled)

    @property
    def can_save(self) -> bool:
        return self._staging is not None

    @property
    def last_error(self) -> str:
        """Why the newest checkpoint did not become durable; "" when all is well."""
        return self._staging.last_error if self._staging is not None else ""

    @property
    def busy(self) -> bool:
        """Whether the last checkpoint is still being written. Ranks must agree before they save: one busy rank postpones all."""
        return self._staging is not None and (self._copying is not None or self._staging.busy)

    def wait(self, seconds: float) -> None:
        """Until the last checkpoint is durable or given up, but no longer than this."""
        self.end_save()
        if self._staging is not None:
            self._staging.wait_idle(seconds)

    def get_ready(self, tensors: NestedTensors) -> None:
        """Collective at the first call; later ones return at once. Plans and takes the memory, so that the first save need not."""
        if self._staging is None or self._layout is not None:
            return
        started = time.monotonic()
        self._staging.reserve(self._laid_out(tensors)[0].num_bytes)
        self._tell(time.monotonic() - started)

    def save(self, step: int, tensors: NestedTensors, state: Mapping[str, Any], *, patience_s: float = 0.0) -> bool:
        """Copies everything into shared memory. Collective when nothing is planned yet or shapes have changed.

        Args:
            patience_s: how long the persister tries again where storage is in the way.

        Returns whether this rank's part was staged; if not, there is no memory for it or no persister (detached: never one), and no
        checkpoint comes about.
        """
        is_staged = self.begin_save(step, tensors, state, patience_s=patience_s)
        self.end_save()
        return is_staged

    def begin_save(self, step: int, tensors: NestedTensors, state: Mapping[str, Any], *, patience_s: float = 0.0) -> bool:
        """As `save`, but on a GPU the copy goes on: no tensor may be changed before `end_save`."""
        if self._staging is None:
            return False
        self.end_save()
        started = time.monotonic()
        layout, shards = self._laid_out(tensors)
        fault_point("rank.stage.before", rank=self._rank, step=step)
        buffer = self._staging.buffer(layout.num_bytes, template=layout.name)
        if buffer is not None:
            wait = self._fill(buffer, layout, shards)
            directory = checkpoint_directory(self._attempt, step, self._nonce)
            submit = partial(
                self._staging.submit, directory=directory, step=step, files=layout.files, tensors=layout.tensors, patience_s=patience_s
            )
            self._copying = _Copying(step=step, wait=wait, submit=partial(submit, state=state))
        self._stalled(started, more=False)
        if self._copying is not None and self._copying.wait is None:
            self.end_save()
        return buffer is not None

    def end_save(self) -> None:
        """Waits until the copy of the last `begin_save` is whole and hands it over; afterwards tensors may be changed. Else nothing."""
        if self._copying is None:
            return
        copying, self._copying = self._copying, None
        started = time.monotonic()
        if copying.wait is not None:
            copying.wait()
        copying.submit()
        fault_point("rank.stage.after", rank=self._rank, step=copying.step)
        self._stalled(started, more=True)

    def _stalled(self, since: float, *, more: bool) -> None:
        seconds = time.monotonic() - since
        self.stall_s = self.stall_s + seconds if more else seconds
        self._tell(seconds)

    def save_and_wait(self, step: int, tensors: NestedTensors, state: Mapping[str, Any], alive: Callable[[], None]) -> None:
        """The final save: waits for the one before it, stages, and returns when this rank's part is durable.

        A store that is in the way gets `_FINAL_PATIENCE_S` to come back. Raises NotPersisted.

        Args:
            alive: called while waiting, at least once a second.
        """
        assert self._staging is not None
        self._wait_idle(alive)
        if not self.save(step, tensors, state, patience_s=_FINAL_PATIENCE_S):
            raise NotPersisted(f"step {step} could not be staged: {self._staging.last_error or 'no buffer'}")
        self._wait_idle(alive)
        if self._staging.last_error:
            raise NotPersisted(f"step {step} did not become durable: {self._staging.last_error}")

    def _wait_idle(self, alive: Callable[[], None]) -> None:
        assert self._staging is not None
        until = time.monotonic() + _FINAL_PATIENCE_S + _PERSIST_DEADLINE_S
        while self._staging.busy and time.monotonic() < until:
            self._staging.wait_idle(1.0)
            alive()

    def _laid_out(self, tensors: NestedTensors) -> tuple[_Layout, list[Tensor]]:
        """And this rank's part of each tensor, in the order of the layout's outline."""
        outline, shards = outline_of(tensors)
        if self._layout is None or self._layout.outline != outline:
            self._layout = _agree_on_layout(self._rank, outline, tensors)
            self._views.clear()
        return self._layout, shards

    def _fill(self, buffer: Buffer, layout: _Layout, shards: Sequence[Tensor]) -> Wait | None:
        """Begins to copy; what it returns waits for the end of it, unless it is over."""
        if buffer.fresh:
            layout.template.prefill(buffer.view)
            buffer.view[layout.template.num_bytes :] = layout.metadata
        views = next((views for memory, views in self._views if memory is buffer.view.obj), None)
        if views is None:
            views = layout.template.views(buffer.view)
            self._views = [*self._views[1 - _BUFFERS :], (buffer.view.obj, views)]
        return self._copy(views, [shards[index] for index in layout.sources])


def _agree_on_layout(rank: int, outline: Outline, tensors: NestedTensors) -> _Layout:
    """Collective. DCP's own planner decides who writes what; the rest follows from its plan.

    What several ranks have, whole or in replicas, is written once, by the one of them that has least to write so far.
    """
    planner = DefaultSavePlanner()
    planner.set_up_planner(dict(tensors), is_coordinator=rank == 0)
    plan = planner.create_local_plan()
    plan = replace(plan, items=[item for item in plan.items if _has_elements(item)])
    told: list[tuple[SavePlan, Mapping[str, int]]] = [(plan, _fingerprints(tensors))] * dist.get_world_size()
    dist.all_gather_object(told, told[rank])
    _refuse_shared_names([fingerprints for _, fingerprints in told])
    global_plan, metadata = planner.create_global_plan([plan for plan, _ in told])
    template = lay_out(global_plan[rank].items)
    pickled = _metadata(metadata, global_plan) if rank == 0 else b""
    return _layout(rank, outline, _places(tensors), template, pickled)


def _fingerprints(tensors: NestedTensors) -> dict[str, int]:
    """Of all that other ranks have as well: plain tensors, and parts of a tensor that are not this rank's alone."""
    found = {}
    for name, tensor in flatten(tensors).items():
        if not isinstance(tensor, (DTensor, Portion)):
            found[name] = _fingerprint(tensor, _COMPARED)
        elif has_replicas(tensor, dist.get_world_size()):
            parts = zip(chunks_of(tensor), parts_of(tensor), strict=True)
            found |= {f"{name}{list(starts)}": _fingerprint(part, _COMPARED_OF_PART) for (starts, _), part in parts}
    return found


def _fingerprint(tensor: Tensor, count: int) -> int:
    return xxh3_64_intdigest(byte_view(tensor.detach().flatten()[:count].cpu()))


def _refuse_shared_names(by_rank: Sequence[Mapping[str, int]]) -> None:
    """A tensor that several ranks name alike is kept once. Raises ValueError where they have different ones."""
    first: dict[str, tuple[int, int]] = {}  # name -> (rank, fingerprint)
    for rank, fingerprints in enumerate(by_rank):
        for name, fingerprint in fingerprints.items():
            other, expected = first.setdefault(name, (rank, fingerprint))
            if fingerprint == expected:
                continue
            remedy = "make them equal, or keep each under state.of_rank(rank, ...)"
            if name.endswith("]"):
                remedy = 'replicas are only alike on nodes that compute alike; with train.sharding = "full" there are none'
            raise ValueError(f"ranks {other} and {rank} have different values of {name}, and a checkpoint keeps one of a name: {remedy}")


def _places(tensors: NestedTensors) -> dict[tuple[str, tuple[int, ...]], int]:
    """Where each part of this rank stands in the list of `outline_of`, by name and place in the whole tensor."""
    chunks = ((name, starts) for name, tensor in flatten(tensors).items() for starts, _ in chunks_of(tensor))
    return {chunk: number for number, chunk in enumerate(chunks)}


def _layout(rank: int, outline: Outline, places: Mapping[tuple[str, tuple[int, ...]], int], template: Template, metadata: bytes) -> _Layout:
    files = [StagedFile(name=shard_name(rank), offset=0, num_bytes=template.num_bytes)]
    if metadata:
        files.append(StagedFile(name=METADATA_NAME, offset=template.num_bytes, num_bytes=len(metadata)))
    entries = tuple(
        TensorEntry(
            name=placed.index.fqn,
            file=shard_name(rank),
            offset=placed.data_offset,
            num_bytes=placed.pattern.data_bytes,
            dtype=dtype_name(placed.dtype),
            shape=placed.shape,
            starts=placed.starts,
            global_shape=placed.global_shape,
        )
        for placed in template.placed
    )
    layout = [[entry.name, entry.dtype, list(entry.shape), entry.offset] for entry in entries]
    name = sha256_hex(canonical_json(layout) + metadata)
    return _Layout(
        outline=outline,
        template=template,
        sources=tuple(places[placed.index.fqn, placed.starts] for placed in template.placed),
        metadata=metadata,
        files=tuple(files),
        tensors=entries,
        name=name,
    )


def _metadata(metadata: Metadata, plans: Sequence[SavePlan]) -> bytes:
    """The file .metadata: what DCP's FileSystemWriter would have pickled after writing the same plan."""
    stored = {
        placed.index: _StorageInfo(shard_name(rank), placed.offset, placed.pattern.num_bytes)
        for rank, plan in enumerate(plans)
        for placed in lay_out(plan.items).placed
    }
    return pickle.dumps(replace(metadata, storage_data=stored, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION))


def _has_elements(item: WriteItem) -> bool:
    """A rank without a part of a small tensor has an empty chunk, which nobody would ever read."""
    assert not isinstance(item.tensor_data, BytesStorageMetadata)
    assert item.tensor_data is not None, f"{item.index.fqn} is no tensor: keep it in the rank's state"
    assert item.tensor_data.chunk is not None
    return item.tensor_data.chunk.sizes.numel() > 0


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")
