"""AdamW over the rank's own shards, its learning rate as a function of the step, and clipping by the global norm.

The optimizer never sees DTensors: AdamW is element-wise, so it runs on the plain local shard of each parameter, which shares its
memory with the sharded model. The bits are the same, and a step costs microseconds per tensor instead of DTensor's dispatch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import OptimizerSection

HYPER_PARAMETERS = ("lr", "betas", "eps", "weight_decay")


def learning_rate(config: OptimizerSection, step: int, steps: int) -> float:
    """Of update number `step` (from 1) of `steps`: linear warm-up, then a cosine from the peak to `min_lr_ratio` of it at the last step."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    floor = config.lr * config.min_lr_ratio
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class ShardOptimizer:
    """AdamW on the local shards of `model`, by parameter name. Matrices decay, vectors do not.

    Args:
        fused: one kernel per tensor. On a CPU with vector units it rounds the last elements of a shard, those that do not fill a vector,
            otherwise than it would elsewhere; without it an element's update does not depend on its place.
    """

    def __init__(self, model: nn.Module, config: OptimizerSection, *, fused: bool = True) -> None:
        self.parameters = dict(model.named_parameters())
        self.shards = {name: nn.Parameter(local(parameter)) for name, parameter in self.parameters.items()}
        # One group per kind, also where a model has no parameter of it: its hyper-parameters are kept by the group's name.
        self.group_names = {
            "decayed": [n for n, p in self.parameters.items() if p.ndim > 1],
            "exempt": [n for n, p in self.parameters.items() if p.ndim <= 1],
        }
        decay = {"decayed": config.weight_decay, "exempt": 0.0}
        self.adamw = torch.optim.AdamW(
            [{"params": [self.shards[n] for n in names], "weight_decay": decay[group]} for group, names in self.group_names.items()],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=fused,
            foreach=not fused,
        )
        for shard in self.shards.values():  # made here, not in the first step: a checkpoint needs something to be read into
            self.adamw.state[shard] = {
                "step": torch.zeros((), dtype=torch.float32, device=shard.device),
                "exp_avg": torch.zeros_like(shard),
                "exp_avg_sq": torch.zeros_like(shard),
            }

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Parameter name -> {"step", "exp_avg", "exp_avg_sq"}; the moments are local shards."""
        return {name: self.adamw.state[shard] for name, shard in self.shards.items()}

    def hyper_parameters(self) -> dict[str, dict[str, Any]]:
        """Group -> its hyper-parameters, as JSON."""
        return {
            name: {key: group[key] for key in HYPER_PARAMETERS}
            for name, group in zip(self.group_names, self.adamw.param_groups, strict=True)
        }

    def take_gradients(self) -> None:
        """Moves each parameter's reduced gradient to its shard; the model's own are cleared."""
        for name, parameter in self.parameters.items():
            self.shards[name].grad = None if parameter.grad is None else local(parameter.grad)
            parameter.grad = None

    def gradient_square(self) -> float:
        """Sum of squares over this rank's gradients; over all ranks it is the square of the global norm."""
        gradients = [shard.grad for shard in self.shards.values() if shard.grad is not None and shard.grad.numel()]
        norms = torch.stack(torch._foreach_norm(gradients)).double() if gradients else torch.zeros(1, dtype=torch.float64)
        return float(norms.square().sum())

    def update(self, *, lr: float, scale: float) -> None:
        """One AdamW update with gradients times `scale`; clears them."""
        gradients = [shard.grad for shard in self.shards.values() if shard.grad is not None]
        if scale != 1.0 and gradients:
            torch._foreach_mul_(gradients, scale)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.discard_gradients()

    def discard_gradients(self) -> None:
        """As if there had been no step."""
        self.adamw.zero_grad(set_to_none=True)


def clip_scale(norm: float, clip_norm: float) -> float:
    """Factor that brings a gradient of this norm down to `clip_norm`; 0 never clips."""
    return clip_norm / norm if clip_norm and norm > clip_norm else 1.0


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, or the tensor itself; shares memory."""
    if not hasattr(tensor, "to_local"):
        return tensor.detach()
    with torch.no_grad():
        shard: Tensor = tensor.to_local()
        return shard


def changed_hyper_parameters(saved: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Sentences about what differs, except the learning rate, which is a function of the step."""
    for group in sorted({*saved, *now}):
        before, after = ({key: value for key, value in there.get(group, {}).items() if key != "lr"} for there in (saved, now))
        yield from changes(before, after, f"of the {group} parameters")


def schedule_of(config: OptimizerSection, steps: int) -> dict[str, Any]:
    """What decides the learning rate and the clipping of every step, as JSON."""
    names = ("lr", "min_lr_ratio", "warmup_steps", "clip_norm")
    return {name: getattr(config, name) for name in names} | {"steps": steps}


def changes(saved: Mapping[str, Any], now: Mapping[str, Any], what: str) -> Iterator[str]:
    """A sentence per key whose value differs."""
    for key in sorted({*saved, *now}):
        before, after = (list(value) if isinstance(value, tuple) else value for value in (saved.get(key), now.get(key)))
        if before != after:
            yield f"{key} {what} was {before} and is {after} from here on"
