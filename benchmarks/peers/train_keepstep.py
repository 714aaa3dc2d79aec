"""The toy as a script of keepstep, by its public door. Under plain torchrun it runs as well, and saves nothing."""

from __future__ import annotations

import sharded
import torch
import torch.distributed as dist
import toy
from steplog import StepLog
from torch import nn

from keepstep.trainer import rng
from keepstep.trainer.attach import attach
from keepstep.trainer.checkpoint import Checkpointer
from keepstep.trainer.contract import Phase
from keepstep.trainer.registry import Registry
from keepstep.trainer.restore import resume
from keepstep.trainer.stateful import param_groups


def optimizer_with_state(model: nn.Module) -> torch.optim.AdamW:
    """A checkpoint needs something to be read into."""
    optimizer = toy.optimizer_of(model)
    for parameter in model.parameters():
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
    return optimizer


me = attach()
sharded.join()
model = sharded.sharded_model()
optimizer = optimizer_with_state(model)
names = dict(model.named_parameters())
tensors = {"model": names, "optimizer": {name: optimizer.state[parameter] for name, parameter in names.items()}}
registry = Registry(rank=me.rank, world_size=me.world_size)
registry.add(*rng.parts(), param_groups(optimizer))
saver = Checkpointer.of(me)
step = resume(me, tensors, registry).step if me.resume else 0
log = StepLog(me.rank)
busy = torch.zeros(())
while True:
    loss = toy.advance(model, optimizer, step, me.rank)
    step += 1
    me.report(Phase.STEP, step)
    if me.rank == 0:
        me.record_step({"step": step, "loss": loss.item()})
    log.stepped(step, loss.item())
    if step % toy.INTERVAL == 0 and saver.can_save:
        busy.fill_(saver.busy)
        dist.all_reduce(busy)  # all ranks must decide alike
        if not busy:
            saver.save(step, tensors, registry.state())
