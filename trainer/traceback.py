"""What the inside of a model is like: statistics of activations, parameters, gradients and updates, and the hooks that take them.

Nothing here changes a bit of a training: hooks look at detached tensors, return nothing, draw no random number, and are gone when their
`with` is left. All figures are sums, minima and maxima, so those of micro-batches and of ranks can be brought together afterwards.

A look at a tensor reads it four times (1.6 ns per element on one core) and copies nothing to the host: a rank's figures leave the
device together, once per step that is looked into.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from .blocks import in_recomputation, opaque

LOGITS: Final = "logits"  # what the whole model gives
_ACTIVATIONS: Final = (nn.GELU, nn.ReLU, nn.SiLU)  # their outputs are units that may die
_EXACT: Final = (torch.float32, torch.float64)

# A row of figures: sums, then maxima.
_COUNT, _NONFINITE, _ZEROS, _SUM, _SQUARES, _MINUS_MIN, _MAX, _UNITS, _MINUS_DEAD = range(9)
_NUM_SUMS: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Of the elements of a tensor. `minimum` to `rms` are None where they are not finite: all of them where an element is not a number;
    that end, mean and rms where one is infinite."""

    count: int
    nonfinite: int
    zeros: int
    minimum: float | None
    maximum: float | None
    mean: float | None
    rms: float | None  # root of the mean square
    units: int = 0  # size of the last dimension, where units were looked at
    dead: int = 0  # of those units: 0 in every sample, at every position

    @staticmethod
    def of(row: Sequence[float]) -> Statistics:
        count, squares = int(row[_COUNT]), row[_SQUARES]
        units, minus_dead = row[_UNITS], row[_MINUS_DEAD]
        looked = count > 0 and units > 0
        return Statistics(
            count=count,
            nonfinite=int(row[_NONFINITE]),
            zeros=int(row[_ZEROS]),
            minimum=known(-row[_MINUS_MIN]),
            maximum=known(row[_MAX]),
            mean=known(row[_SUM] / count) if count else None,
            rms=known(math.sqrt(squares / count)) if count and math.isfinite(squares) else None,
            units=int(units) if looked else 0,
            dead=int(-minus_dead) if looked else 0,
        )

    def to_json(self) -> dict[str, float | None]:
        """For a step's record: fractions instead of counts."""
        count = max(1, self.count)
        figures = {"min": self.minimum, "max": self.maximum, "mean": self.mean, "rms": self.rms}
        fractions = {"zeros": self.zeros / count, "nonfinite": self.nonfinite / count}
        return figures | fractions | ({"dead": self.dead / self.units} if self.units else {})


def known(value: float) -> float | None:
    """For JSON, which holds neither NaN nor infinities."""
    return value if math.isfinite(value) else None


def tensor_statistics(tensor: Tensor, *, units: bool = False) -> Statistics:
    """Of one tensor of any dtype; waits for its device.

    Args:
        units: also, how many units (last dimension) are 0 throughout.
    """
    return Statistics.of(_row(tensor, units=units).tolist())


def combined(rows: Tensor) -> Tensor:
    """(n, ..., 9) rows of n parts -> (..., 9). As for dead units an upper bound: each part has its own."""
    return torch.cat([rows[..., :_NUM_SUMS].sum(0), rows[..., _NUM_SUMS:].amax(0)], dim=-1)


def _row(tensor: Tensor, *, units: bool) -> Tensor:
    """(9,) float64 on the tensor's device."""
    x = tensor.detach()
    if x.dtype not in _EXACT:
        x = x.float()  # sums in bfloat16 would say little
    if not x.numel():
        return empty_row(x.device)
    low, high = torch.aminmax(x)
    figures = [
        torch.full((), x.numel(), dtype=torch.float64, device=x.device),
        _num_nonfinite(x, low, high),
        x.numel() - torch.count_nonzero(x),
        x.sum(),
        torch.linalg.vector_norm(x).double().square(),
        -low,
        high,
        *(_dead_units(x) if units and x.ndim else (torch.full((), -math.inf, device=x.device),) * 2),
    ]
    return torch.stack([figure.double() for figure in figures])


def empty_row(device: torch.device | None = None) -> Tensor:
    """Of no element."""
    row = torch.zeros(9, dtype=torch.float64, device=device)
    row[_NUM_SUMS:] = -math.inf
    return row


def _num_nonfinite(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    if x.device.type == "cpu" and math.isfinite(low) and math.isfinite(high):  # a GPU would have to be waited for
        return torch.zeros((), dtype=torch.float64)
    return torch.count_nonzero(x * 0)  # NaN for whatever is not finite; isfinite() takes thrice the time


def _dead_units(x: Tensor) -> tuple[Tensor, Tensor]:
    """(number of units, minus those that are 0 throughout)."""
    units = x.reshape(-1, x.shape[-1])
    is_dead = (units.amax(0) == 0) & (units.amin(0) == 0)
    return torch.full((), x.shape[-1], device=x.device), -is_dead.sum()


class Activations:
    """What the hooks of `activation_statistics` found, by name, in the order in which the forward pass came to an end of each."""

    def __init__(self) -> None:
        self.calls = 0  # forward passes of the whole model
        self._rows: dict[str, list[tuple[int, Tensor]]] = {}  # (the how-manieth call, row)

    def __call__(self) -> dict[str, Statistics]:
        """Of all calls so far; waits for the device."""
        return {name: Statistics.of(row.tolist()) for name, row in self.rows().items()}

    def rows(self, counts: Sequence[bool] = ()) -> dict[str, Tensor]:
        """A row of figures for each name.

        Args:
            counts: of the batch's parts in turn, whether their samples count. An engine may pass over those that do not.
        """
        is_counted = counts if len(counts) == self.calls else (True,) * self.calls
        assert self.calls in {len(counts), sum(counts)} or not counts, "the model is called once for each part, in their order"
        chosen = {name: [row for call, row in rows if is_counted[call]] for name, rows in self._rows.items()}
        return {name: combined(torch.stack(rows)) if rows else empty_row() for name, rows in chosen.items()}

    def look(self, name: str, tensor: Tensor, *, units: bool = False) -> None:
        """Of the call that is under way: the whole model's forward hook comes last."""
        self._rows.setdefault(name, []).append((self.calls, _row(tensor, units=units)))

    def look_back(self, name: str, call: int, gradient: Tensor) -> None:
        """Of an earlier call: backward passes come later."""
        self._rows.setdefault(name, []).append((call, _row(gradient, units=False)))

    def end_call(self, *_: object) -> None:
        self.calls += 1


@contextlib.contextmanager
def activation_statistics(model: nn.Module, *, every: bool = False, gradients: bool = False) -> Iterator[Activations]:
    """Looks at what modules of `model` give, in every forward pass inside the `with`.

    Args:
        every: all modules; else those that `watched` names. What is compiled with its block cannot be looked at.
        gradients: also the loss's gradient with respect to each of these outputs, as "NAME:grad". As costly again.
    """
    found = Activations()
    modules = {name or LOGITS: module for name, module in model.named_modules()} if every else watched(model)
    compiled = opaque(model)
    seen = {name: module for name, module in modules.items() if not name.startswith(compiled)}
    handles = [module.register_forward_hook(partial(_look_at_output, found, name, gradients)) for name, module in seen.items()]
    handles.append(model.register_forward_hook(found.end_call))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def watched(model: nn.Module) -> Mapping[str, nn.Module]:
    """By name: the model's own parts, its blocks, their parts but for norms, and activation functions."""
    chosen: dict[str, nn.Module] = {LOGITS: model}
    for name, module in model.named_modules():
        parts = [part for part in name.split(".") if not part.isdigit()]
        is_part = bool(name) and len(parts) < 3 and not isinstance(module, nn.ModuleList)
        if (is_part and not (len(parts) == 2 and isinstance(module, nn.LayerNorm))) or isinstance(module, _ACTIVATIONS):
            chosen[name] = module
    return chosen


def _look_at_output(found: Activations, name: str, gradients: bool, module: nn.Module, inputs: Any, output: Any) -> None:
    """A forward hook that returns nothing: the output stays what it is."""
    if not isinstance(output, Tensor) or in_recomputation():
        return
    found.look(name, output, units=isinstance(module, _ACTIVATIONS))
    if gradients and output.requires_grad:
        output.register_hook(partial(found.look_back, f"{name}:grad", found.calls))  # type: ignore[no-untyped-call]
