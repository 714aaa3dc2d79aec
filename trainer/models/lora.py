"""Low-rank adaptation (Hu et al. 2021): a linear layer gives W x + b + (alpha / rank) B A dropout(x), and only A and B are trained.

The layer stays the module that it was, with its names; it gets two parameters more, `lora_a` (rank x inputs) and `lora_b` (outputs x rank),
and a forward hook that adds their part. So a checkpoint of the model without them loads by name, and B = 0 at the start changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from keepstep.trainer.config import LoraSection

from .parts import LORA_NAMES, LanguageModel
from .patterns import hits, listed
from .recurrent import Recurrent

_A, _B = LORA_NAMES
_DEFAULT: Final = LoraSection().layers


@dataclass(frozen=True, slots=True)
class Adapter:
    """Of one layer."""

    layer: nn.Module
    scale: float
    handle: RemovableHandle


def linear_layers(model: LanguageModel) -> dict[str, nn.Module]:
    """By name: what can be adapted, the linear layers of the blocks. Recurrent layers only keep weights in some, and never call them."""
    if isinstance(model, Recurrent):
        return {}
    inside = {id(module) for module in model.blocks.modules()}
    return {name: module for name, module in model.named_modules() if id(module) in inside and _sizes(module) is not None}


def adapt(model: LanguageModel, config: LoraSection) -> None:
    """Adds A and B, without values, to the layers that `config.layers` names. Afterwards `model.adapters` has them.

    Raises:
        ValueError: a pattern matches no layer; of the default ones, none of them does.
    """
    layers = linear_layers(model)
    if not layers:
        raise ValueError(f'train.lora.rank = {config.rank}: model.kind = "{model.config.kind}" has no linear layers that can be adapted')
    found = hits(layers, config.layers)
    idle = [pattern for pattern in config.layers if not found[pattern]]
    if idle and (config.layers != _DEFAULT or len(idle) == len(_DEFAULT)):
        raise ValueError(f'train.lora.layers: "{idle[0]}" matches no linear layer; they are {listed(layers)}')
    chosen = {name for names in found.values() for name in names}
    model.adapters = {name: _adapted(layer, config) for name, layer in layers.items() if name in chosen}


def merge(model: LanguageModel) -> None:
    """Puts what A and B add into the weights, and takes them out: the same function, within rounding, without LoRA."""
    with torch.no_grad():
        for adapter in model.adapters.values():
            layer, weight = adapter.layer, adapter.layer.get_parameter("weight")
            added = layer.get_parameter(_B) @ layer.get_parameter(_A) * adapter.scale
            weight.add_(added.T if _is_transposed(layer) else added)
            adapter.handle.remove()
            for name in LORA_NAMES:
                delattr(layer, name)
    model.adapters = {}


def is_lora(name: str) -> bool:
    """Whether a parameter of this name is an A or a B."""
    return name.rpartition(".")[2] in LORA_NAMES


def _adapted(layer: nn.Module, config: LoraSection) -> Adapter:
    inputs, outputs = _sizes(layer) or (0, 0)
    weight, scale = layer.get_parameter("weight"), config.alpha / config.rank
    layer.register_parameter(_A, nn.Parameter(weight.new_empty(config.rank, inputs)))
    layer.register_parameter(_B, nn.Parameter(weight.new_empty(outputs, config.rank)))
    return Adapter(layer, scale, layer.register_forward_hook(partial(_add, config.dropout, scale)))


def _add(dropout: float, scale: float, layer: nn.Module, given: tuple[Any, ...], y: Tensor) -> Tensor:
    a, b = (cast(Tensor, getattr(layer, name)) for name in LORA_NAMES)
    x = F.dropout(given[0], dropout, layer.training)
    return y + F.linear(F.linear(x, a), b) * scale


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (int(cast(Any, module).nx), int(cast(Any, module).nf)) if _is_transposed(module) else None


def _is_transposed(module: nn.Module) -> bool:
    """transformers' own linear layer of GPT-2 keeps its weight as (inputs, outputs)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nx")
