"""Which part of a whole tensor a rank holds, whoever cut it: what is initialised, saved, restored and hashed goes by this.

FSDP2 cuts rows, and its `DTensor`s say where they lie. Tensor parallelism cuts before that, and not always into one piece: of a layer that
makes queries, keys and values at once a rank has three. No placement of a DTensor says so, and where FSDP2 cuts such a part once more
at an uneven row, none could. So a parameter of which a tensor-parallel rank holds a part is a `Portion` to the outside: shape and name are
those of the whole tensor, and its chunks are as many boxes as it takes. A checkpoint is the same, however its tensors were cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

Chunk: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]  # (starts, sizes)
# How tensors of one layout are cut. DTensor takes a tenth of a millisecond for each, and a model with its moments has few different ones.
_CHUNKS: Final[dict[tuple[DeviceMesh, tuple[int, ...], tuple[Placement, ...], torch.Size], list[Chunk]]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A dimension consists of `parts` equal parts, and each of the `count` ranks of a group has the `index`-th share of every part."""

    dim: int
    parts: int = 1
    index: int
    count: int
    mesh: DeviceMesh  # of the group

    def whole(self, held: torch.Size) -> torch.Size:
        """The shape of the tensor of which a rank holds `held`."""
        return torch.Size(size * self.count if dim == self.dim else size for dim, size in enumerate(held))

    def spans(self, extent: int, start: int, size: int) -> Iterator[tuple[int, int, int]]:
        """Where the elements [start, start + size) of the `extent` that a rank holds lie in the whole: (first held, first whole, size)."""
        share = extent // self.parts
        for part in range(self.parts):
            first, last = max(start, part * share), min(start + size, (part + 1) * share)
            if first < last:
                yield first, (part * (self.count - 1) + self.index) * share + first, last - first


class Portion:
    """A rank's part of a tensor that its tensor-parallel group cuts. Shares memory; looks like a DTensor where it must.

    Args:
        held: what this rank of the group has, plain or cut again by FSDP2 (then a DTensor of that shape).
    """

    def __init__(self, held: Tensor, cut: Cut) -> None:
        self.held, self.cut = held, cut
        self.shape, self.dtype, self.device = cut.whole(held.shape), held.dtype, held.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def size(self) -> torch.Size:
        return self.shape

    def to_local(self) -> Tensor:
        """All that this rank holds, in one tensor."""
        return self.held.to_local() if isinstance(self.held, DTensor) else self.held

    def chunks(self) -> list[Chunk]:
        """Boxes of the whole tensor, none of them empty."""
        return [chunk for chunk, _ in self._cuts()]

    def parts(self) -> list[Tensor]:
        """Of `to_local()`, as `chunks`; they share its memory."""
        return [part for _, part in self._cuts()]

    def _cuts(self) -> Iterator[tuple[Chunk, Tensor]]:
        ((starts, sizes),), local, dim = chunks_of(self.held), self.to_local(), self.cut.dim
        if not local.numel():
            return
        for first, place, size in self.cut.spans(self.held.shape[dim], starts[dim], sizes[dim]):
            chunk = (*starts[:dim], place, *starts[dim + 1 :]), (*sizes[:dim], size, *sizes[dim + 1 :])
            yield chunk, local.narrow(dim, first - starts[dim], size)

    def like(self, held: Tensor) -> Portion:
        """Another tensor of this shape, cut alike."""
        return Portion(held, self.cut)

    def full_tensor(self) -> Tensor:
        """Collective. The whole tensor."""
        held = (self.held.full_tensor() if isinstance(self.held, DTensor) else self.held).detach().contiguous()
        gathered = held.new_empty(self.cut.count * held.numel())
        dist.all_gather_single(gathered, held.view(-1), group=self.cut.mesh.get_group())
        shares = [part.chunk(self.cut.parts, self.cut.dim) for part in gathered.view(self.cut.count, *held.shape)]
        return torch.cat([share[part] for part in range(self.cut.parts) for share in shares], self.cut.dim)

    def __create_write_items__(self, name: str, portion: Any) -> list[WriteItem]:
        """For torch.distributed.checkpoint's planner: an item for each chunk."""
        return [
            WriteItem(
                index=MetadataIndex(name, torch.Size(starts)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=torch.Size(starts), sizes=torch.Size(sizes)),
                    properties=TensorProperties.create_from_tensor(part),
                    size=self.shape,
                ),
            )
            for (starts, sizes), part in self._cuts()
        ]


def chunks_of(tensor: Tensor | Portion) -> list[Chunk]:
    """(starts, sizes) of this rank's parts of a tensor: one of a DTensor, of a plain tensor all of it."""
    if isinstance(tensor, Portion):
        return tensor.chunks()
    if not isinstance(tensor, DTensor):
        return [((0,) * tensor.ndim, tuple(tensor.shape))]
    mesh = tensor.device_mesh
    layout = mesh, tuple(mesh.get_coordinate() or ()), tensor.placements, tensor.shape
    if layout not in _CHUNKS:
        chunks = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
        _CHUNKS[layout] = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]
    return _CHUNKS[layout]


def parts_of(tensor: Tensor | Portion) -> list[Tensor]:
    """This rank's parts, as `chunks_of` says where they lie; they share its memory."""
    if isinstance(tensor, Portion):
        return tensor.parts()
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor]


def has_replicas(tensor: DTensor | Portion, world_size: int) -> bool:
    """Whether other ranks have the same parts."""
    if isinstance(tensor, Portion):
        return isinstance(tensor.held, DTensor) and _is_replicated(tensor.held)
    return tensor.device_mesh.size() < world_size or _is_replicated(tensor)


def _is_replicated(tensor: DTensor) -> bool:
    sizes = tensor.device_mesh.shape
    return any(placement.is_replicate() and size > 1 for placement, size in zip(tensor.placements, sizes, strict=True))


def whole(tensor: Tensor | Portion) -> Tensor:
    """Collective for a DTensor or a Portion. The unsharded tensor, on the CPU."""
    full: Tensor = tensor.full_tensor() if isinstance(tensor, (DTensor, Portion)) else tensor
    return full.detach().cpu()


def box(chunk: Chunk) -> tuple[slice, ...]:
    """What indexes the whole tensor with it."""
    return tuple(slice(start, start + size) for start, size in zip(*chunk, strict=True))
