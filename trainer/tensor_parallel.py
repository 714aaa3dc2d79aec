"""Tensor parallelism (Shoeybi et al. 2019): the ranks of a group compute every block together, some heads and some of the inner width each.

A group's ranks have the same samples and the same random streams. What goes into attention or MLP is the same on all of them; each
computes its columns (`Columns`: its heads, its part of the inner width) and what its rows make of these (`Rows`), and that is summed. So
a block sums activations twice on its way forward, and their gradients twice on its way back; embeddings, norms and the output layer are
computed by each rank alike, and so are their gradients: they need no sum.

Rejected: torch's `parallelize_module`, whose layers compute on DTensors. Each of their operations goes through DTensor's dispatch (tens of
microseconds), the weights of queries, keys and values would have to be three layers, and what FSDP2 cuts of a part at an uneven row has no
placement. Here parameters are plain tensors to autograd and to FSDP2, and `Portion` says what they are parts of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Final, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.utils.init import skip_init

from .config import ModelSection
from .models import LanguageModel
from .portions import Cut


@dataclass(frozen=True, slots=True)
class Entry:
    """A module whose input all ranks of a group have, and of which each computes a part: gradients of that input are summed."""


@dataclass(frozen=True, slots=True)
class Columns:
    """A linear layer of which each rank computes some outputs. `parts`: so many layers are one, and each rank has a part of every one."""

    parts: int = 1


@dataclass(frozen=True, slots=True)
class Rows:
    """A linear layer that is given some inputs on each rank; what it makes of them is summed."""


Way: TypeAlias = Entry | Columns | Rows

_GPT: Final[Mapping[str, Way]] = {
    "blocks.*.attention": Entry(),
    "blocks.*.attention.qkv": Columns(parts=3),
    "blocks.*.attention.out": Rows(),
    "blocks.*.mlp": Entry(),
    "blocks.*.mlp.up": Columns(),
    "blocks.*.mlp.out": Rows(),
}
_LLAMA: Final[Mapping[str, Way]] = {
    "blocks.*.attention": Entry(),
    "blocks.*.attention.[qkv]": Columns(),
    "blocks.*.attention.out": Rows(),
    "blocks.*.mlp": Entry(),
    "blocks.*.mlp.gate": Columns(),
    "blocks.*.mlp.up": Columns(),
    "blocks.*.mlp.out": Rows(),
}
PLANS: Final[Mapping[str, Mapping[str, Way]]] = {"gpt": _GPT, "bert": _GPT, "llama": _LLAMA}  # model.kind -> pattern of module names -> way


class ColumnLinear(nn.Linear):
    """The outputs that one rank computes."""

    cut: Cut


class RowLinear(nn.Linear):
    """All outputs, from the inputs that one rank has and those of the others. Collective. The bias is whole on every rank."""

    cut: Cut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _SumForward.apply(F.linear(x, self.weight), self.cut.mesh.get_group())  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group), None


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Collective. The same bits on all ranks of the group: what is computed alike from it stays alike."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def split(model: LanguageModel, config: ModelSection, mesh: DeviceMesh) -> None:
    """Leaves of each layer what this rank computes; the values are not initialised. Before FSDP2.

    Raises:
        ValueError: this model cannot be computed by so many ranks together; names the keys of run.toml.
    """
    count = mesh.size()
    key = f"run.toml: train.tensor_parallel = {count}"
    if config.kind not in PLANS:
        raise ValueError(f'{key} is for model.kind = {_listed(PLANS)}, not for "{config.kind}": set it to 1')
    for name, heads in (("heads", config.heads), ("kv_heads", config.kv_heads)):
        if heads % count:
            raise ValueError(f"{key} must divide model.{name} = {heads}: every rank computes as many heads")
    for name, module, way in _planned(model, PLANS[config.kind]):
        if isinstance(way, Entry):
            module.register_forward_pre_hook(partial(_enter, mesh.get_group()))
            continue
        assert isinstance(module, nn.Linear)
        if isinstance(way, Columns) and module.out_features % (way.parts * count):
            raise ValueError(f"{key} must divide the inner width of {name}, which is {module.out_features}: set model.inside")
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, _part(module, way, mesh))


def _planned(model: nn.Module, plan: Mapping[str, Way]) -> list[tuple[str, nn.Module, Way]]:
    found = [(name, module, way) for pattern, way in plan.items() for name, module in model.named_modules() if fnmatchcase(name, pattern)]
    assert {way for _, _, way in found} == set(plan.values()), "the model has no such modules"
    return found


def _part(linear: nn.Linear, way: Columns | Rows, mesh: DeviceMesh) -> nn.Linear:
    count = mesh.size()
    columns = isinstance(way, Columns)
    inputs, outputs = (linear.in_features, linear.out_features // count) if columns else (linear.in_features // count, linear.out_features)
    made: nn.Linear = skip_init(  # type: ignore[no-untyped-call]  # draws no random number
        ColumnLinear if columns else RowLinear, inputs, outputs, bias=linear.bias is not None, device=linear.weight.device
    )
    made.cut = Cut(  # type: ignore[assignment]
        dim=0 if columns else 1,
        parts=way.parts if isinstance(way, Columns) else 1,
        index=mesh.get_local_rank(),
        count=count,
        mesh=mesh,
    )
    return made


def cuts_of(model: nn.Module) -> dict[str, Cut]:
    """Of the parameters of which this rank has a part, by name; none where tensors are not split."""
    return dict(_cuts(model))


def _cuts(model: nn.Module) -> Iterator[tuple[str, Cut]]:
    for name, module in model.named_modules():
        if isinstance(module, (ColumnLinear, RowLinear)):
            yield f"{name}.weight", module.cut
            if module.bias is not None and isinstance(module, ColumnLinear):
                yield f"{name}.bias", module.cut


def _enter(group: dist.ProcessGroup, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return _SumBackward.apply(args[0], group), *args[1:]  # type: ignore[no-untyped-call]


def _listed(kinds: Mapping[str, object]) -> str:
    return ", ".join(f'"{kind}"' for kind in kinds)
