"""What a rank looks at in every step, and what in a sampled one: norms of parameters and updates; figures of every layer.

Its part of every step rides on the exchange that a step has anyway (agreement.py); the update is measured when that is over, so it rides on
the next one. The figures of the layers are brought together in one gather of their own, in sampled steps only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from .config import TraceSection
from .loader import MicroBatch
from .optim import ShardOptimizer
from .parallel import World
from .registry import Part
from .traceback import Statistics, activation_statistics, combined, empty_row, known, watched

Layers = dict[str, dict[str, float | None]]  # name of a module or parameter -> its figures

# A parameter's row: all are sums, over this rank's shard.
_ELEMENTS, _ZEROS, _NONFINITE, _GRADIENT_SQUARE, _SQUARE, _UPDATE_SQUARE, _ROWS, _ZERO_ROWS = range(8)
_DIGITS: Final = 6  # significant, of a layer's figure: a record is read by people and programs, not resumed from


class StepTrace:
    """Of one rank. Reads the optimizer's shards and gradients, changes none.

    With `trace.updates` it keeps room for one copy of this rank's shards of the parameters, beside the optimizer's two.
    """

    def __init__(self, config: TraceSection, optimizer: ShardOptimizer, world: World) -> None:
        self._interval, self._updates, self._world = config.interval, config.updates, world
        self._names = tuple(optimizer.parameters)
        self._shards = {name: shard for name, shard in optimizer.shards.items() if name in optimizer.counted and shard.numel()}
        self._values = [shard.detach() for shard in self._shards.values()]
        self._before = [torch.empty_like(value) for value in self._values] if config.updates else []
        self._squares = torch.zeros(0, dtype=torch.float64)  # of the shards, before this step's update
        self._update_squares = torch.full((1,), math.nan, dtype=torch.float64)
        self._norm = math.nan  # of all parameters, before the last update
        self._activations: Mapping[str, Tensor] = {}
        self._module_names: tuple[str, ...] = ()
        self._gradient_rows: dict[str, Tensor] = {}

    def is_sampled(self, step: int) -> bool:
        """Whether the layers of this step are looked at: a function of the step alone, so that a restart samples the same steps."""
        return self._interval > 0 and (step == 1 or step % self._interval == 0)

    def parameter_square(self) -> float:
        """Sum of squares over the parameters that this rank counts; over all ranks it is the square of their norm."""
        self._squares = _squares(self._values)
        return float(self._squares.sum())

    def ratio_square(self) -> float:
        """This rank's part of the square of (norm of the last update / norm of the parameters before it); NaN where that is unknown."""
        return float(self._update_squares.sum()) / self._norm**2 if self._norm > 0 else math.nan

    def part(self) -> Part:
        """The last update's size, which the first record after a restart tells."""
        return Part(
            name="traceback",
            capture=lambda: known(self.ratio_square()),
            restore=self._restore,
            check=_check,
            per_rank=True,
            elsewhere=self._take_over,
            check_elsewhere=_check,
        )

    def _restore(self, ratio_square: float | None) -> None:
        self._norm = 1.0
        self._update_squares = torch.tensor([math.nan if ratio_square is None else ratio_square], dtype=torch.float64)

    def _take_over(self, saved: Sequence[float | None]) -> str:
        """Of ranks of another world: their sum is what counts."""
        self._restore(math.fsum(math.nan if part is None else part for part in saved) if self._world.rank == 0 else 0.0)
        return ""

    @contextlib.contextmanager
    def activations(self, step: int, model: nn.Module, parts: Sequence[MicroBatch]) -> Iterator[None]:
        """Around forward and backward pass."""
        if not self.is_sampled(step):
            yield
            return
        with activation_statistics(model) as found:
            yield
        self._module_names = tuple(watched(model))
        self._activations = found.rows([part.counts for part in parts])

    @contextlib.contextmanager
    def update(self, step: int, norm: float) -> Iterator[None]:
        """Around the update; `norm` is that of all parameters before it."""
        if self.is_sampled(step):
            self._gradient_rows = {name: _gradient_row(shard.grad) for name, shard in self._shards.items()}
        if not self._updates:
            yield
            self._update_squares = torch.full((1,), math.nan, dtype=torch.float64)  # what a checkpoint had of an earlier one is told
            return
        if self._before:  # else this rank counts nothing, and that is 0
            torch._foreach_copy_(self._before, self._values)
        yield
        if self._before:
            torch._foreach_sub_(self._before, self._values)
        self._update_squares, self._norm = _squares(self._before), norm

    def layers(self, step: int, gradient_scale: float) -> Layers | None:
        """Collective in sampled steps, after the update: the figures of all ranks together. None in other steps.

        Args:
            gradient_scale: from the gradient that the engine held to that of the step's loss.
        """
        if not self.is_sampled(step):
            return None
        modules = torch.stack([self._activations.get(name, empty_row()).cpu() for name in self._module_names])
        parameters = self._parameter_rows()
        order = {name: number for number, name in enumerate(self._activations)}
        orders = [float(order.get(name, -1)) for name in self._module_names]  # none on a rank that has nothing to compute
        rows = self._world.gather([*modules.flatten().tolist(), *orders, *parameters.flatten().tolist()])
        first, last = modules.numel(), modules.numel() + len(orders)
        of_modules, of_orders, of_parameters = rows[:, :first], rows[:, first:last], rows[:, last:]
        by_module = combined(of_modules.reshape(-1, *modules.shape)).tolist()
        by_parameter = of_parameters.reshape(-1, *parameters.shape).sum(0).tolist()
        known_orders = next((row for row in of_orders.tolist() if max(row, default=-1) >= 0), orders)
        told = zip(self._module_names, by_module, known_orders, strict=True)
        found = {name: _module(Statistics.of(figures), int(number)) for name, figures, number in told}
        found |= {name: _parameter(figures, gradient_scale) for name, figures in zip(self._names, by_parameter, strict=True)}
        return {name: {key: _rounded(value) for key, value in figures.items()} for name, figures in found.items()}

    def _parameter_rows(self) -> Tensor:
        """(parameters, 8), zeros for what this rank does not count."""
        rows = torch.zeros(len(self._names), 8, dtype=torch.float64, device=self._world.device)
        mine = [i for i, name in enumerate(self._names) if name in self._shards]
        if mine:
            rows[mine] = torch.stack([self._gradient_rows[name] for name in self._shards])
            rows[mine, _SQUARE] = self._squares
            rows[mine, _UPDATE_SQUARE] = self._update_squares
        return rows.cpu()


def _squares(tensors: list[Tensor]) -> Tensor:
    """The sum of squares of each, float64."""
    return torch.stack(torch._foreach_norm(tensors)).double().square() if tensors else torch.zeros(0, dtype=torch.float64)


def _gradient_row(gradient: Tensor | None) -> Tensor:
    """A parameter's row so far: its gradient before clipping. Zeros where it has none."""
    row = torch.zeros(8, dtype=torch.float64, device=gradient.device if gradient is not None else None)
    if gradient is None:
        return row
    row[_ELEMENTS] = gradient.numel()
    row[_ZEROS] = gradient.numel() - torch.count_nonzero(gradient)
    row[_NONFINITE] = torch.count_nonzero(gradient * 0)
    row[_GRADIENT_SQUARE] = torch.linalg.vector_norm(gradient).double().square()
    if gradient.ndim > 1:
        row[_ROWS] = gradient.shape[0]
        rows = gradient.flatten(1)
        row[_ZERO_ROWS] = ((rows.amax(1) == 0) & (rows.amin(1) == 0)).sum()
    return row


def _check(saved: float | None) -> Iterator[str]:
    if saved is not None and (isinstance(saved, bool) or not 0 <= saved < math.inf):
        yield f"the square of an update's size is {saved!r}"


def _module(statistics: Statistics, order: int) -> dict[str, float | None]:
    return statistics.to_json() | ({"order": order} if order >= 0 else {})


def _parameter(row: Sequence[float], gradient_scale: float) -> dict[str, float | None]:
    figures: dict[str, float | None] = {"param_norm": known(math.sqrt(row[_SQUARE]))}
    if row[_ELEMENTS]:
        figures["grad_norm"] = known(math.sqrt(row[_GRADIENT_SQUARE]) * gradient_scale)
        figures["grad_zeros"] = row[_ZEROS] / row[_ELEMENTS]
        figures["grad_nonfinite"] = row[_NONFINITE] / row[_ELEMENTS]
    if row[_ROWS]:
        figures["grad_zero_rows"] = row[_ZERO_ROWS] / row[_ROWS]
    if row[_SQUARE] and not math.isnan(row[_UPDATE_SQUARE]):
        figures["update_ratio"] = known(math.sqrt(row[_UPDATE_SQUARE] / row[_SQUARE]))
    return figures


def _rounded(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.{_DIGITS}g}")
