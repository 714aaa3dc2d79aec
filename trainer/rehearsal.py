"""A first step that counts for nothing, made ahead of need: what torch does only once in a process is done when ranks are needed.

A small model is built, spread over two ranks of which the other does not exist, and makes one update. It costs 0.2 s in a process that has
imported everything, and its children have it done, too; the second time in a process (for the memory that a fork shares until it is
written to) 0.05 s. Nothing of it stays: no group, no thread, no change of any random stream.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from .config import ModelSection, OptimizerSection
from .models import build_model
from .optim import ShardOptimizer
from .parallel import World, shard
from .state import tensors_of

_GPUS: Final = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")
_VOCABULARY: Final = 16
_NAMES: Final = ("rehearsal",)  # of the mesh: torch remembers what it found out about a mesh, and must not take a real one for this


def rehearse() -> None:
    """Before a process group exists. Does nothing where there may be a GPU: a process that has touched one cannot be forked."""
    if any(map(Path.exists, map(Path, _GPUS))):
        return
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  (it registers the backend "fake")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would be threads, which a fork loses
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)  # type: ignore[attr-defined]
    try:
        with torch.random.fork_rng(devices=[]):
            _step()
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)


def _step() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=_NAMES)
    world = World(rank=0, size=2, device=torch.device("cpu"), mesh=mesh)
    model = build_model(ModelSection(layers=2, width=16, heads=2, context=8), _VOCABULARY)
    shard(model, world, precision="fp32", reshard=False)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.zero_()
    optimizer = ShardOptimizer(model, OptimizerSection())
    tensors_of(model, optimizer)
    ids_BT = torch.zeros((2, 8), dtype=torch.long)
    logits_BTV = model(ids_BT)
    torch.autograd.backward(F.cross_entropy(logits_BTV.view(-1, _VOCABULARY), ids_BT.view(-1)))
    optimizer.take_gradients()
    optimizer.gradient_square()
    optimizer.update(lr=0.0, scale=1.0)
