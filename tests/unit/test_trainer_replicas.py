"""What several ranks have alike is written once, by one of them, and must be alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from trainer_ranks import FolderStaging, commit, manifest_of, run_ranks

from keepstep.storage.store import Store
from keepstep.storage.verify import CheckpointReader
from keepstep.trainer.contract import Resume

pytestmark = pytest.mark.slow
RANKS, STEP = 4, 3


def _commit(root: Path) -> Resume:
    (folder,) = root.glob("data/a000001/*")
    return commit(root, str(folder.relative_to(root)))


def save_few(rank: int, world_size: int, root: str) -> None:
    """Replicas of fewer tensors than there are ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from keepstep.trainer.checkpoint import Checkpointer
    from keepstep.trainer.restore import restore

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("replicas", "shards"))
    value = torch.arange(6.0).view(3, 2)
    state: dict[str, dict[str, Any]] = {"model": {"only": distribute_tensor(value, mesh, [Replicate(), Shard(0)])}}
    staging = FolderStaging(Path(root), attempt=1, rank=rank, world_size=world_size)
    assert Checkpointer(staging, rank=rank, attempt=1, nonce="nonce1").save(STEP, state, {})
    dist.barrier()
    resume = _commit(Path(root)) if rank == 0 else None
    dist.barrier()
    state["model"]["only"].to_local().zero_()
    (folder,) = Path(root).glob("data/a000001/*")
    manifest = manifest_of(Path(root), resume or Resume(step=STEP, directory=str(folder.relative_to(root)), manifest_sha256=""))
    assert [len(index.tensors) for index in manifest.ranks] == [1, 0, 0]
    restore(manifest, CheckpointReader(Store.open(root), manifest.directory, manifest), state)
    assert torch.equal(state["model"]["only"].to_local(), value)


def save_replicas(rank: int, world_size: int, root: str, expected: str) -> None:
    """The last rank's replica has another value."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    from keepstep.trainer.checkpoint import Checkpointer

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    value = torch.arange(4.0).view(2, 2) + (rank == world_size - 1)
    state: dict[str, dict[str, Any]] = {"model": {"some": DTensor.from_local(value, mesh, [Replicate(), Shard(0)], run_check=False)}}
    staging = FolderStaging(Path(root), attempt=1, rank=rank, world_size=world_size)
    with pytest.raises(ValueError, match=expected):
        Checkpointer(staging, rank=rank, attempt=1, nonce="nonce1").save(STEP, state, {})


def test_replicas_that_are_not_alike_are_not_saved(tmp_path: Path) -> None:
    expected = r"ranks 1 and 3 have different values of model.some\[2, 0\], .*: replicas are only alike on nodes that compute alike; with"
    run_ranks(RANKS, save_replicas, str(tmp_path), expected)


def test_a_rank_that_has_nothing_to_write_takes_part_in_the_checkpoint(tmp_path: Path) -> None:
    run_ranks(3, save_few, str(tmp_path))
