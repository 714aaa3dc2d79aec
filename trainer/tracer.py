"""Which module first makes something that is not finite, forward or backward: hooks on every module, for as long as one looks.

A module is named as in `model.named_modules()`, "model" for the root. What goes wrong between modules, in a functional call, is told of the
module whose `forward` makes that call: attention scores of "blocks.0.attention".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .blocks import in_recomputation

ROOT = "model"


@dataclass
class Traced:
    """What one pass showed. `order` counts the tensors that it met until then: it compares passes of the same model."""

    module: str = ""  # "": everything was finite
    order: int = 0
    magnitudes_B: Tensor | None = None  # norm of each sample's gradient at the tensor that backward reached last
    bad_B: Tensor | None = None  # backward: samples with a gradient that is not finite somewhere
    is_bad_weight: bool = False  # backward: the gradient of a parameter, over all samples of the pass, is not finite
    _seen: int = 0
    _samples: int = 0  # of the pass
    _callers: list[str] = field(default_factory=list)
    _users: dict[int, str] = field(default_factory=dict)  # id of a tensor -> the module that backward enters behind it
    _kept: list[Tensor] = field(default_factory=list)  # so that ids stay theirs
    _handles: list[RemovableHandle] = field(default_factory=list)

    def blame(self, module: str) -> None:
        if not self.module:
            self.module, self.order = module, self._seen


@contextmanager
def traced(model: nn.Module) -> Iterator[Traced]:
    """One pass, forward, or forward and backward, within the context: the first module with a value that is not finite."""
    found = Traced()
    handles = found._handles
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(_enter, found, name or ROOT)))
        handles.append(module.register_forward_hook(partial(_leave, found, name or ROOT)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        found._kept.clear()


def _enter(found: Traced, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    if in_recomputation():
        return
    caller = found._callers[-1] if found._callers else ROOT
    if not found._callers and args:
        found._samples = len(args[0])
    for tensor in _floating(args):
        _look(found, tensor, caller)
        _watch(found, tensor, name)
    for parameter in module.parameters(recurse=False):  # within FSDP2's forward pass: the gathered one
        _watch(found, parameter, name, is_weight=True)
    found._callers.append(name)


def _leave(found: Traced, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if in_recomputation():
        return
    found._callers.pop()
    caller = found._callers[-1] if found._callers else ROOT
    for tensor in _floating(output):
        _look(found, tensor, name)
        _watch(found, tensor, caller)


def _look(found: Traced, tensor: Tensor, module: str) -> None:
    found._seen += 1
    if not found.module and not bool(torch.isfinite(tensor.detach()).all()):
        found.blame(module)


def _watch(found: Traced, tensor: Tensor, user: str, *, is_weight: bool = False) -> None:
    """Whoever uses the tensor last, and innermost, is whose backward pass makes its gradient; each tensor has one hook.

    Tensors without a dimension for samples, such as embeddings of positions, (T, C) or (1, T, C), are left out.
    """
    if not (tensor.requires_grad and torch.is_grad_enabled() and (is_weight or (tensor.ndim > 2 and len(tensor) == found._samples))):
        return
    if id(tensor) not in found._users:
        look = _look_back_at_weight if is_weight else _look_back
        found._handles.append(tensor.register_hook(partial(look, found, id(tensor))))  # type: ignore[no-untyped-call]
        found._kept.append(tensor)
    found._users[id(tensor)] = user


def _look_back(found: Traced, key: int, gradient: Tensor) -> None:
    found._seen += 1
    rows = gradient.detach().flatten(1).float()
    bad_B = ~torch.isfinite(rows).all(1)
    found.bad_B = bad_B if found.bad_B is None else found.bad_B | bad_B
    found.magnitudes_B = rows.double().norm(dim=1)
    if bool(bad_B.any()):
        found.blame(found._users[key])


def _look_back_at_weight(found: Traced, key: int, gradient: Tensor) -> None:
    found._seen += 1
    if not bool(torch.isfinite(gradient.detach()).all()):
        found.is_bad_weight = True
        found.blame(found._users[key])


def _floating(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _floating(item)
