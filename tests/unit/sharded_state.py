"""A training state with shapes that no world size divides, saved by real ranks: for tests of restoring and exporting it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trainer_ranks import FolderStaging, commit, run_ranks, write_log

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
    from torch.distributed.tensor import Shard, distribute_tensor

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


def save_with_ranks(root: Path, world_size: int) -> Resume:
    """Real ranks save and a commit is logged: a root that everything outside a run can open."""
    run_ranks(world_size, _join_and_save, str(root))
    made = commit_saved(root)
    write_log(root, world_size, [made])
    return made


def commit_saved(root: Path) -> Resume:
    return commit(root, str(folder_of(root).relative_to(root)))


def folder_of(root: Path) -> Path:
    return next(root.glob(f"data/a000001/s{STEP:09d}-*"))


def _join_and_save(rank: int, world_size: int, root: str) -> None:
    from torch.distributed import init_process_group

    init_process_group("gloo")
    save(rank, world_size, root)


def save(rank: int, world_size: int, root: str) -> None:
    """Collective. This rank's part, below `root`."""
    from torch.distributed.device_mesh import init_device_mesh

    from keepstep.trainer.checkpoint import Checkpointer

    staging = FolderStaging(Path(root), attempt=1, rank=rank, world_size=world_size)
    tensors = sharded(whole_state(), init_device_mesh("cpu", (world_size,)))
    assert Checkpointer(staging, rank=rank, attempt=1, nonce="nonce1").save(STEP, tensors, {"rank": rank})
