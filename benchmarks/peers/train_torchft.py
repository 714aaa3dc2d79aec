"""For torchft: the toy under fault-tolerant DDP, four replica groups of one rank. One that comes back takes its state from a living one."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist
import toy
from steplog import StepLog
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

REPLICA, REPLICAS = int(os.environ["REPLICA"]), 4

model = toy.plain_model()
optimizer = toy.optimizer_of(model)


def state() -> dict[str, object]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def load(saved: dict[str, dict[str, object]]) -> None:
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])


store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
manager = Manager(
    pg=ProcessGroupGloo(timeout=timedelta(seconds=2)),  # survivors that wait for each other leave at it
    min_replica_size=REPLICAS,  # never with fewer: the losses stay those of an undisturbed run
    load_state_dict=load,
    state_dict=state,
    replica_id=f"replica{REPLICA}",
    timeout=timedelta(seconds=5),
    rank=0,
    world_size=1,
    store_addr="127.0.0.1",
    store_port=store.port,
    init_sync=False,
    heartbeat_interval=timedelta(milliseconds=100),
)
wrapped, managed, log = DistributedDataParallel(manager, model), Optimizer(manager, optimizer), StepLog(REPLICA)
while True:
    managed.zero_grad()
    step = manager.current_step()
    loss = toy.loss_of(wrapped, step, REPLICA)
    loss.backward()
    managed.step()
    if manager.current_step() == step + 1:  # all agreed to commit it
        log.stepped(step + 1, loss.item())
