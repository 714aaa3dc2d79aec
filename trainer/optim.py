"""The optimizer over the rank's own shards, and clipping by the global norm.

The optimizer never sees DTensors: all of these are element-wise, so they run on the plain local shard of each parameter, which shares its
memory with the sharded model. The bits are the same, and a step costs microseconds per tensor instead of DTensor's dispatch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from .config import OptimizerSection
from .schedule import changes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """One of torch.optim's."""

    make: Callable[..., torch.optim.Optimizer]
    settings: Callable[[OptimizerSection], dict[str, Any]]  # beside learning rate and weight decay
    moments: Callable[[OptimizerSection], tuple[str, ...]]  # its state: tensors like the parameter, zero at first
    counts: bool = True  # and the number of updates
    is_fused: bool = True  # it has a kernel that takes one tensor at a time


_KINDS: Final[Mapping[str, _Kind]] = {
    "sgd": _Kind(
        make=torch.optim.SGD,
        settings=lambda config: {"momentum": config.momentum, "nesterov": config.nesterov},
        moments=lambda config: ("momentum_buffer",) if config.momentum else (),
        counts=False,
    ),
    "adam": _Kind(
        make=torch.optim.Adam,
        settings=lambda config: {"betas": (config.beta1, config.beta2), "eps": config.eps},
        moments=lambda config: ("exp_avg", "exp_avg_sq"),
    ),
    "adamw": _Kind(
        make=torch.optim.AdamW,
        settings=lambda config: {"betas": (config.beta1, config.beta2), "eps": config.eps},
        moments=lambda config: ("exp_avg", "exp_avg_sq"),
    ),
    "rmsprop": _Kind(
        make=torch.optim.RMSprop,
        settings=lambda config: {"alpha": config.beta2, "eps": config.eps, "momentum": config.momentum},
        moments=lambda config: ("square_avg", "momentum_buffer") if config.momentum else ("square_avg",),
        is_fused=False,
    ),
    "adagrad": _Kind(
        make=torch.optim.Adagrad,
        settings=lambda config: {"eps": config.eps},
        moments=lambda config: ("sum",),
    ),
}


class ShardOptimizer:
    """The optimizer on the local shards of `model`, by parameter name. Matrices decay, vectors do not.

    Args:
        fused: one kernel per tensor. On a CPU with vector units it rounds the last elements of a shard, those that do not fill a vector,
            otherwise than it would elsewhere; without it an element's update does not depend on its place.
        counted: names of the parameters whose shard this rank counts in sums over all ranks; None: all of them.
    """

    def __init__(self, model: nn.Module, config: OptimizerSection, *, fused: bool = True, counted: Collection[str] | None = None) -> None:
        kind = _KINDS[config.kind]
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.shards = {name: nn.Parameter(local(parameter)) for name, parameter in self.parameters.items()}
        self.counted = frozenset(self.parameters if counted is None else counted) & self.parameters.keys()
        # One group per kind, also where a model has no parameter of it: its hyper-parameters are kept by the group's name.
        self.group_names = {
            "decayed": [n for n, p in self.parameters.items() if p.ndim > 1],
            "exempt": [n for n, p in self.parameters.items() if p.ndim <= 1],
        }
        self._l1 = config.l1
        settings, decay = kind.settings(config), {"decayed": config.weight_decay, "exempt": 0.0}
        self._hyper_parameters = ("lr", "weight_decay", *settings)
        is_fused = fused and kind.is_fused
        self.inner = kind.make(
            [{"params": [self.shards[n] for n in names], "weight_decay": decay[group]} for group, names in self.group_names.items()],
            lr=config.lr,
            **settings,
            **({"fused": is_fused} if kind.is_fused else {}),
            foreach=not is_fused,
        )
        for shard in self.shards.values():  # made here, not in the first step: a checkpoint needs something to be read into
            counted = {"step": torch.zeros((), dtype=torch.float32, device=shard.device)} if kind.counts else {}
            self.inner.state[shard] = counted | {name: torch.zeros_like(shard) for name in kind.moments(config)}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Parameter name -> its state, e.g. {"step", "exp_avg", "exp_avg_sq"}; the moments are local shards."""
        return {name: self.inner.state[shard] for name, shard in self.shards.items()}

    def hyper_parameters(self) -> dict[str, dict[str, Any]]:
        """Group -> its hyper-parameters, as JSON."""
        return {
            name: {key: group[key] for key in self._hyper_parameters}
            for name, group in zip(self.group_names, self.inner.param_groups, strict=True)
        }

    def take_gradients(self) -> None:
        """Moves each parameter's reduced gradient to its shard; the model's own are cleared."""
        for name, parameter in self.parameters.items():
            self.shards[name].grad = None if parameter.grad is None else local(parameter.grad)
            parameter.grad = None

    def gradient_square(self) -> float:
        """Sum of squares over the gradients that this rank counts; over all ranks it is the square of the global norm."""
        held = (shard.grad for name, shard in self.shards.items() if name in self.counted)
        gradients = [gradient for gradient in held if gradient is not None and gradient.numel()]
        norms = torch.stack(torch._foreach_norm(gradients)).double() if gradients else torch.zeros(1, dtype=torch.float64)
        return float(norms.square().sum())

    def update(self, *, lr: float, scale: float) -> None:
        """One update with gradients times `scale`; clears them."""
        gradients = [shard.grad for shard in self.shards.values() if shard.grad is not None]
        if scale != 1.0 and gradients:
            torch._foreach_mul_(gradients, scale)
        if self._l1:
            for shard in (self.shards[name] for name in self.group_names["decayed"]):
                if shard.grad is not None:
                    shard.grad.add_(shard.detach().sign(), alpha=self._l1)
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()
        self.discard_gradients()

    def discard_gradients(self) -> None:
        """As if there had been no step."""
        self.inner.zero_grad(set_to_none=True)


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
