"""Ranks, their process group, and the model spread over them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement

from .attach import Attached
from .models import Gpt, initial_value

# Longer than any wait that is not a failure. Under keepstep the agent notices a hang in seconds and kills; gloo itself cannot abort.
COMPUTES_IN: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # train.precision -> forward and backward pass
COLLECTIVE_TIMEOUT: Final = timedelta(minutes=30)

Chunk: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]  # (starts, sizes)
# How tensors of one layout are cut. DTensor takes a tenth of a millisecond for each, and a model with its moments has few different ones.
_CHUNKS: Final[dict[tuple[DeviceMesh, tuple[int, ...], tuple[Placement, ...], torch.Size], list[Chunk]]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Where this rank stands among the others."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    def gather(self, row: Sequence[float]) -> Tensor:
        """Collective. Every rank's row, (size, len(row)) float64 on the CPU, the same bits everywhere."""
        mine = torch.tensor(row, dtype=torch.float64, device=self.device)
        rows = mine.new_empty((self.size * len(row),))
        dist.all_gather_single(rows, mine)
        return rows.view(self.size, len(row)).cpu()


def join(me: Attached, meeting: Store | None = None) -> World:
    """Collective. Forms the process group that torchrun's environment describes: nccl with a GPU per rank, else gloo.

    Args:
        meeting: where the ranks meet, instead of the address in their environment.
    """
    use_cuda = torch.cuda.is_available()
    device = torch.device("cuda", me.local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if threads := os.environ.get("OMP_NUM_THREADS"):  # a forked rank has torch imported before its environment is known
        torch.set_num_threads(int(threads))
    # Without torchrun there is nobody to meet: one rank needs no address.
    store = meeting or (None if "MASTER_ADDR" in os.environ else dist.HashStore())  # type: ignore[attr-defined]
    dist.init_process_group(
        "nccl" if use_cuda else "gloo",
        store=store,
        rank=me.rank if store else -1,
        world_size=me.world_size if store else -1,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if use_cuda else None,
    )
    world = World(rank=me.rank, size=me.world_size, device=device, mesh=init_device_mesh(device.type, (me.world_size,)))
    me.mark("joined")
    return world


def shard(model: Gpt, world: World, *, precision: str, reshard: bool) -> FSDPModule:
    """FSDP2: each block and the root gather their parameters when they are needed; gradients are summed, not averaged.

    Sums, because every rank already divides by the tokens of the whole batch: the gradient is the same mean at any world size, even
    where ranks have unequal shares.
    """
    dtype = COMPUTES_IN[precision]
    policy = MixedPrecisionPolicy() if dtype is torch.float32 else MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=policy, reshard_after_forward=reshard)
    sharded = fully_shard(model, mesh=world.mesh, mp_policy=policy, reshard_after_forward=reshard)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return sharded


def initialise(model: nn.Module, *, seed: int, layers: int) -> None:
    """Fills every parameter's local shard with its part of the initial value, the same whole at any world size."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = initial_value(name, parameter.shape, seed, layers)
            (chunk,) = chunks_of(parameter)
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local.copy_(whole[tuple(slice(start, start + size) for start, size in zip(*chunk, strict=True))])


def chunks_of(tensor: Tensor) -> list[Chunk]:
    """(starts, sizes) of this rank's part of a DTensor; of a plain tensor: all of it."""
    if not isinstance(tensor, DTensor):
        return [((0,) * tensor.ndim, tuple(tensor.shape))]
    mesh = tensor.device_mesh
    layout = mesh, tuple(mesh.get_coordinate() or ()), tensor.placements, tensor.shape
    if layout not in _CHUNKS:
        chunks = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
        _CHUNKS[layout] = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]
    return _CHUNKS[layout]


def whole(tensor: Tensor) -> Tensor:
    """Collective for a DTensor. The unsharded tensor, on the CPU."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu()
