"""Which losses and gradient norms are no part of a training any more: a function of the recent steps. Pure.

The measure of the usual is robust, the median and the median absolute deviation (Hampel 1974; times 1.4826 it estimates the standard
deviation of a normal distribution), so neither one outlier nor the fall of an early loss moves it much. Nothing that the window has already
held is a spike: a training whose batches differ widely shows that itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, Literal

from .config import SpikeSection

_SIGMAS_PER_MAD: Final = 1.4826


@dataclass(frozen=True, slots=True)
class NonFinite:
    what: Literal["loss", "gradient"]
    value: float  # infinite or NaN
    ranks: tuple[int, ...]  # whose sums it was found in


@dataclass(frozen=True, slots=True)
class Spike:
    what: Literal["loss", "gradient"]
    value: float
    median: float  # of the window
    bound: float  # the value lies beyond it


Finding = NonFinite | Spike


class Window:
    """Loss and gradient norm of the last steps, the same on every rank; part of the exact state."""

    def __init__(self, size: int, steps: Iterable[tuple[float, float]] = ()) -> None:
        self._losses: deque[float] = deque(maxlen=size)
        self._norms: deque[float] = deque(maxlen=size)
        for loss, norm in steps:
            self.add(loss, norm)

    def add(self, loss: float, norm: float) -> None:
        """Of a step that has become part of the training."""
        self._losses.append(loss)
        self._norms.append(norm)

    def spike(self, loss: float, norm: float, limits: SpikeSection) -> Spike | None:
        """What is beyond the limits in a step that would follow. Microseconds while all is well: one look for the minimum."""
        if len(self._losses) < limits.window // 2:
            return None
        return find_loss_spike(self._losses, loss, limits) or find_gradient_spike(self._norms, norm, limits)

    def to_json(self) -> list[list[str]]:
        """[[loss, norm], ...] as float.hex(), oldest first."""
        return [[loss.hex(), norm.hex()] for loss, norm in zip(self._losses, self._norms, strict=True)]

    @staticmethod
    def from_json(size: int, steps: Sequence[Sequence[str]]) -> Window:
        """Inverse of `to_json`; of a longer one the newest `size` steps."""
        return Window(size, ((float.fromhex(loss), float.fromhex(norm)) for loss, norm in steps))


def find_loss_spike(losses: Sequence[float] | deque[float], loss: float, limits: SpikeSection) -> Spike | None:
    """Beyond `sigmas` robust standard deviations and `nats` above the median, and beyond all of `losses`."""
    if not limits.sigmas or loss <= min(losses) + limits.nats:  # the median is no less than that: the cheap answer, nearly always
        return None
    middle = median(losses)
    sigma = _SIGMAS_PER_MAD * median(abs(value - middle) for value in losses)
    bound = max(middle + max(limits.nats, limits.sigmas * sigma), *losses)
    return Spike("loss", loss, middle, bound) if loss > bound else None


def find_gradient_spike(norms: Sequence[float] | deque[float], norm: float, limits: SpikeSection) -> Spike | None:
    """Beyond `gradient_factor` times the median."""
    if not limits.gradient_factor:
        return None
    middle = median(norms)
    bound = limits.gradient_factor * middle
    return Spike("gradient", norm, middle, bound) if norm > bound > 0 else None
