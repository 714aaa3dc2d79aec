"""What must not become part of a training: losses and gradients that are not finite. Found before anything is updated."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .agreement import Agreed


class NonFinite(ArithmeticError):
    """A loss or gradient became infinite or not a number."""

    def __init__(self, step: int, what: str, ranks: Sequence[int], value: float) -> None:
        self.step, self.ranks = step, tuple(ranks)
        super().__init__(f"step {step}: the {what} of rank {', '.join(map(str, ranks))} is {value}")


def check(step: int, agreed: Agreed) -> None:
    """Collective: all ranks find the same. Raises NonFinite; the state is still that of the step before."""
    for what, values in (("loss", agreed.losses), ("gradient", agreed.gradient_squares)):
        if wrong := [rank for rank, value in enumerate(values) if not math.isfinite(value)]:
            raise NonFinite(step, what, wrong, values[wrong[0]])
