"""The toy under FSDP2, with torch's own checkpoints: what a careful user of torchrun and its relatives writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from steplog import ENV_FOLDER, StepLog
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from toy import INTERVAL, advance, optimizer_of, plain_model

CHECKPOINTS = Path(os.environ[ENV_FOLDER]) / "checkpoints"


def sharded_model() -> nn.Sequential:
    """Collective."""
    model, mesh = plain_model(), init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


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
