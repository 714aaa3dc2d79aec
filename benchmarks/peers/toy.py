"""The training that every system of benchmarks/peers.py runs: one model, one stream of data, one optimizer, checkpoints equally often.

A stack of four residual MLP blocks (2.1 million parameters) under FSDP2 and AdamW. A batch is a function of step and rank. After each step
each rank appends a record to a file of its process (steplog.py): that is how all of them are timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from steplog import ENV_FOLDER, StepLog
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

WIDTH, BLOCKS, SAMPLES = 256, 4, 32
INTERVAL = 10  # steps between checkpoints
CHECKPOINTS = Path(os.environ[ENV_FOLDER]) / "checkpoints"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BC: Tensor) -> Tensor:
        return x_BC + self.down(torch.relu(self.up(self.norm(x_BC))))


def plain_model() -> nn.Sequential:
    """The same weights in every process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(BLOCKS)))


def sharded_model() -> nn.Sequential:
    """Collective."""
    model, mesh = plain_model(), init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    x_BC = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(1000 * step + rank))
    return (model(x_BC) - x_BC.flip(-1)).square().mean()


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int) -> Tensor:
    """One step, the one after `step` finished ones; its loss."""
    loss = loss_of(model, step, rank)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def train(*, life: int = 0, each_step: Callable[[], None] = lambda: None) -> None:
    """For ever, in a process group that exists, from the newest complete checkpoint, with torch's own checkpoints."""
    rank = dist.get_rank()
    model = sharded_model()
    optimizer = optimizer_of(model)
    log, step = StepLog(rank, life), max((int(path.parent.name) for path in CHECKPOINTS.glob("*/.metadata")), default=0)
    if step:
        weights, moments = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=CHECKPOINTS / str(step))
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    while True:
        loss = advance(model, optimizer, step, rank)
        step += 1
        log.stepped(step, loss.item())
        each_step()
        if step % INTERVAL == 0:
            weights, moments = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=CHECKPOINTS / str(step))


def join(timeout_s: float = 1800.0) -> None:
    """Collective. By the environment that torchrun and its relatives give."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
