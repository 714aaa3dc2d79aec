"""The tensors of a state as a list, made anew at every save: for thousands of tensors, naming them would take longer than copying them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .portions import Portion
from .state import NestedTensors


@dataclass(frozen=True, slots=True)
class Outline:
    """What a layout depends on: equal outlines have equal layouts.

    names: the keys of the nested state in order, with None where a level ends.
    kinds: shape and dtype of each tensor as a whole, and of this rank's part where that is another one.
    """

    names: list[str | None]
    kinds: list[tuple[torch.Size, torch.dtype] | tuple[torch.Size, torch.dtype, torch.Size]]


def outline_of(tensors: NestedTensors) -> tuple[Outline, list[Tensor]]:
    """The outline, and this rank's part of each tensor in the same order, or parts, as `parts_of` gives them; shares memory."""
    outline = Outline([], [])
    shards: list[Tensor] = []
    with torch.no_grad():
        _walk(tensors, outline, shards)
    return outline, shards


def _walk(tree: dict[str, Any], outline: Outline, shards: list[Tensor]) -> None:
    for name, value in tree.items():
        outline.names.append(name)
        if isinstance(value, dict):
            _walk(value, outline, shards)
            outline.names.append(None)
        elif isinstance(value, Portion):
            shards += value.parts()
            outline.kinds.append((value.shape, value.dtype, value.to_local().shape))
        elif isinstance(value, DTensor):
            shard = value.to_local()
            shards.append(shard)
            outline.kinds.append((value.shape, value.dtype, shard.shape))
        else:
            shards.append(value)
            outline.kinds.append((value.shape, value.dtype))
