"""A training state with shapes that no world size divides, saved by all ranks: for tests of restoring and exporting it."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from trainer_ranks import FolderStaging, commit, write_log

from keepstep.trainer.checkpoint import Checkpointer
from keepstep.trainer.contract import Resume

STEP = 20
SHAPES: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "table.weight": (torch.float32, (10, 3)),
    "odd.weight": (torch.float32, (7, 5)),
    "deep.kernel": (torch.bfloat16, (5, 2, 3)),
    "thin.bias": (torch.bfloat16, (3,)),  # fewer rows than ranks
    "one.row": (torch.float32, (1, 4)),
}


def whole_state() -> dict[str, dict[str, Any]]:
    """Unsharded; any two tensors differ."""
    model = {name: _value(name, shape, dtype) for name, (dtype, shape) in SHAPES.items()}
    moments = {
        name: {
            "step": torch.tensor(float(STEP + len(name))),
            "exp_avg": _value(f"{name}.exp_avg", value.shape, value.dtype),
            "exp_avg_sq": _value(f"{name}.exp_avg_sq", value.shape, torch.float32),
        }
        for name, value in model.items()
    }
    return {"model": model, "optimizer": moments}


def _value(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))).to(dtype)


def sharded(state: dict[str, Any], mesh: Any) -> dict[str, Any]:
    """The same by rows over the ranks of `mesh`, as FSDP2 does; scalars on every rank."""
    return {
        name: sharded(value, mesh)
        if isinstance(value, dict)
        else distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)
        if value.ndim
        else value.clone()
        for name, value in state.items()
    }


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@contextlib.contextmanager
def simulated(rank: int, world_size: int) -> Iterator[Any]:
    """The mesh of a world in which only this rank exists: enough for whatever does not communicate."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (world_size,))
    finally:
        dist.destroy_process_group()


def save_in_turn(root: Path, world_size: int, monkeypatch: pytest.MonkeyPatch) -> Resume:
    """All ranks save, one after the other in this process, and a commit is logged: a root that everything outside a run can open.

    The one collective of a save, which gathers the ranks' plans, is played in two rounds: all plans first, then the saves.
    """
    plans: list[Any] = []

    class Recorded(Exception):
        pass

    def gather(gathered: list[Any], plan: Any) -> None:
        if len(plans) < world_size:
            plans.append(plan)
            raise Recorded
        gathered[:] = plans

    monkeypatch.setattr(dist, "all_gather_object", gather)
    for rank in (*range(world_size), *range(world_size)):
        with simulated(rank, world_size), contextlib.suppress(Recorded):
            save(rank, world_size, str(root))
    monkeypatch.undo()
    made = commit_saved(root)
    write_log(root, world_size, [made])
    return made


def commit_saved(root: Path) -> Resume:
    return commit(root, str(folder_of(root).relative_to(root)))


def folder_of(root: Path) -> Path:
    return next(root.glob(f"data/a000001/s{STEP:09d}-*"))


def save(rank: int, world_size: int, root: str) -> None:
    """Collective. This rank's part, below `root`."""
    staging = FolderStaging(Path(root), attempt=1, rank=rank, world_size=world_size)
    tensors = sharded(whole_state(), init_device_mesh("cpu", (world_size,)))
    assert Checkpointer(staging, rank=rank, attempt=1, nonce="nonce1").save(STEP, tensors, {"rank": rank})
