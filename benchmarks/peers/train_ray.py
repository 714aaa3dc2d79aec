"""For Ray Train: the driver, and what its four workers run. Argument: the address of the cluster."""

from __future__ import annotations

import sys

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def work(_: dict[str, object]) -> None:
    import sharded

    sharded.train()


ray.init(address=sys.argv[1], log_to_driver=False)
TorchTrainer(
    work,
    train_loop_config={},
    torch_config=TorchConfig(backend="gloo"),
    scaling_config=ScalingConfig(num_workers=4, resources_per_worker={"CPU": 1}),
    run_config=RunConfig(name="bench", storage_path=sys.argv[2], failure_config=FailureConfig(max_failures=100)),
).fit()
