"""Ranks, their process group, and the model spread over them."""

from __future__ import annotations

import os
from collections.abc import Container, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .attach import Attached
from .config import TrainSection
from .grid import Grid, Seat, grid_of
from .models import LanguageModel, initial_value
from .portions import Portion, box, chunks_of, parts_of, whole
from .tensor_parallel import cuts_of

__all__ = ["COMPUTES_IN", "DataRanks", "World", "chunks_of", "counted_in", "initialise", "join", "placed", "shard", "whole"]

# Longer than any wait that is not a failure. Under keepstep the agent notices a hang in seconds and kills; gloo itself cannot abort.
COMPUTES_IN: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # train.precision -> forward and backward pass
COLLECTIVE_TIMEOUT: Final = timedelta(minutes=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Where this rank stands among the others."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh  # of FSDP2: those that share this rank's parameters (and before that dimension their replicas)
    tensor: DeviceMesh | None = None  # the tensor-parallel group: those that compute the same samples with this rank; None: it alone does

    def gather(self, row: Sequence[float]) -> Tensor:
        """Collective. Every rank's row, (size, len(row)) float64 on the CPU, the same bits everywhere."""
        mine = torch.tensor(row, dtype=torch.float64, device=self.device)
        rows = mine.new_empty((self.size * len(row),))
        dist.all_gather_single(rows, mine)
        return rows.view(self.size, len(row)).cpu()

    @property
    def tensor_size(self) -> int:
        """Ranks that compute the same samples together; they are neighbours."""
        return self.tensor.size() if self.tensor is not None else 1

    @property
    def tensor_rank(self) -> int:
        """This rank's number among those."""
        return self.rank % self.tensor_size

    @property
    def data_rank(self) -> int:
        """Which share of a batch this rank computes; its random streams follow from this, too."""
        return self.rank // self.tensor_size

    @property
    def data_size(self) -> int:
        """Into how many shares a batch is cut."""
        return self.size // self.tensor_size

    @property
    def data(self) -> DataRanks:
        """The ranks as those see them who divide data among them."""
        return DataRanks(self)

    def of_data_ranks(self, rows: Tensor) -> Tensor:
        """Of every rank's rows those that count where samples do: one of each tensor-parallel group, whose samples are the same."""
        return rows[:: self.tensor_size]


@dataclass(frozen=True, slots=True)
class DataRanks:
    """A world in which a tensor-parallel group is one rank (`evaluate.Company`)."""

    world: World

    @property
    def rank(self) -> int:
        return self.world.data_rank

    @property
    def size(self) -> int:
        return self.world.data_size

    @property
    def device(self) -> torch.device:
        return self.world.device

    def gather(self, row: Sequence[float]) -> Tensor:
        """Collective, of all ranks. (data_size, len(row)) float64."""
        return self.world.of_data_ranks(self.world.gather(row))


def join(me: Attached, meeting: Store | None = None, *, train: TrainSection | None = None) -> World:
    """Collective. Forms the process group that torchrun's environment describes: nccl with a GPU per rank, else gloo.

    Args:
        meeting: where the ranks meet, instead of the address in their environment.
        train: how they share the model; None: sharded over all of them.

    Raises ValueError where so many ranks cannot share it so; all of them raise it.
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
    grid = grid_of(train or TrainSection(), _seats(me, train, device))
    mesh, tensor = meshes_of(grid, device)
    world = World(rank=me.rank, size=me.world_size, device=device, mesh=mesh, tensor=tensor)
    me.mark("joined")
    return world


def _seats(me: Attached, train: TrainSection | None, device: torch.device) -> list[Seat]:
    """Collective where it matters who shares a node. Every rank's, in rank order."""
    mine = Seat(me.local_rank % me.local_world_size, me.local_world_size)  # in a replay one machine has the ranks of all nodes
    if train is None or (train.sharding != "node" and train.tensor_parallel == 1):
        return [mine] * me.world_size
    rows = torch.empty(me.world_size * len(mine), dtype=torch.int64, device=device)
    dist.all_gather_single(rows, torch.tensor(mine, device=device))
    return [Seat(*row) for row in rows.view(me.world_size, len(mine)).tolist()]


def meshes_of(grid: Grid, device: torch.device) -> tuple[DeviceMesh, DeviceMesh | None]:
    """Collective. (that of FSDP2, that of the tensor-parallel group) of this rank."""
    if grid.is_plain:
        return init_device_mesh(device.type, (grid.shards,)), None
    sizes = {"replicas": grid.replicas, "shards": grid.shards, "tensor": grid.tensor}
    names = tuple(name for name, size in sizes.items() if size > 1 or name == "shards")
    mesh = init_device_mesh(device.type, tuple(sizes[name] for name in names), mesh_dim_names=names)
    tensor = mesh["tensor"] if "tensor" in names else None
    return mesh[tuple(name for name in names if name != "tensor")], tensor


def shard(model: LanguageModel, world: World, *, precision: str, reshard: bool) -> None:
    """FSDP2: each block and the root gather their parameters when they are needed; gradients are summed, not averaged.

    Where the mesh has replicas, each sums over its shards first, and the replicas add up these sums. A rank that has no others, and
    computes in the precision of its parameters, would only copy them: it gets nothing of FSDP2.

    Sums, because every rank already divides by the tokens of the whole batch: the gradient is the same mean at any world size, even
    where ranks have unequal shares.
    """
    dtype, is_alone = COMPUTES_IN[precision], world.mesh.size() == 1
    if is_alone and dtype is torch.float32:
        return
    policy = MixedPrecisionPolicy() if dtype is torch.float32 else MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=world.mesh, mp_policy=policy, reshard_after_forward=reshard)
    for module in model.modules():
        if isinstance(module, FSDPModule) and not is_alone:  # alone there is one summand; a factor would be divided by nevertheless
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def placed(model: nn.Module) -> dict[str, Tensor | Portion]:
    """The parameters by name, with the shapes that they have as a whole; they share memory with the model's."""
    cuts = cuts_of(model)
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {name: Portion(tensor, cuts[name]) if name in cuts else tensor for name, tensor in named.items()}


def initialise(model: LanguageModel, *, seed: int, only: Container[str] | None = None) -> None:
    """Fills every parameter's local parts with those of the initial value, the same whole at any world size.

    Args:
        only: names of the parameters; None: all of them.
    """
    for name, parameter in placed(model).items():
        if only is None or name in only:
            put(parameter, initial_value(model, name, torch.Size(parameter.shape), seed))


def put(tensor: Tensor | Portion, value: Tensor) -> None:
    """Fills this rank's parts of a tensor with those of a whole value."""
    with torch.no_grad():
        for chunk, part in zip(chunks_of(tensor), parts_of(tensor), strict=True):
            part.copy_(value[box(chunk)])


def counted_in(model: nn.Module, world: World) -> frozenset[str]:
    """The parameters whose part this rank counts in sums over all ranks: of what several ranks have alike, the first of them does."""
    cuts = cuts_of(model)
    named = model.named_parameters()
    return frozenset(name for name, parameter in named if (name in cuts or not world.tensor_rank) and _is_first(parameter, world))


def _is_first(parameter: Tensor, world: World) -> bool:
    """Of the ranks that share data among them and have this part."""
    if not isinstance(parameter, DTensor):
        return not world.data_rank
    coordinates = parameter.device_mesh.get_coordinate()
    assert coordinates is not None
    return all(placement.is_shard() or at == 0 for placement, at in zip(parameter.placements, coordinates, strict=True))
