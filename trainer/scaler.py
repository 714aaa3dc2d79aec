"""Dynamic loss scaling for float16: its gradients would vanish below 6e-8, so the loss is multiplied before the backward pass, and the
update divides again (Micikevicius et al. 2018, Mixed Precision Training).

A step whose gradients overflow is applied by nobody: its samples count as consumed, the schedule goes on, and the scale halves. Whether
one did is read from the sums that all ranks exchange, so every rank has the same scale, and so has every repetition. Scales are powers
of two: multiplying and dividing by them rounds nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from .registry import Json, Part

log = logging.getLogger("keepstep.trainer")

FLOOR: Final = 1.0  # gradients that overflow without any scale are no matter of scale
INITIAL: Final = 2.0**16
CEILING: Final = 2.0**24


@dataclass(slots=True, kw_only=True)
class LossScaler:
    """`scale` is what the loss is multiplied with; where it is not dynamic, 1 for ever."""

    dynamic: bool
    growth_steps: int = 2000  # applied steps in a row after which the scale doubles
    scale: float = FLOOR
    applied: int = 0  # steps in a row

    @staticmethod
    def of(precision: str) -> LossScaler:
        """Only float16 needs one: the range of bfloat16 is that of float32."""
        return LossScaler(dynamic=True, scale=INITIAL) if precision == "fp16" else LossScaler(dynamic=False)

    def overflows(self, loss: float, grad_norm: float) -> bool:
        """Whether this step's gradients overflowed because of the scale: then a smaller one helps. A bad loss is no matter of scale."""
        return self.scale > FLOOR and math.isfinite(loss) and not math.isfinite(grad_norm)

    def stepped(self, *, overflowed: bool) -> None:
        """After every step."""
        if not self.dynamic:
            return
        if overflowed:
            self.scale, self.applied = max(FLOOR, self.scale / 2), 0
        elif self.applied + 1 == self.growth_steps:
            self.scale, self.applied = min(CEILING, self.scale * 2), 0
        else:
            self.applied += 1

    def part(self) -> Part:
        """null where there is none. Precision follows run.toml, as hyper-parameters do."""
        return Part(name="scaler", capture=self._capture, restore=self._restore, check=self._check)

    def _capture(self) -> Json:
        return {"scale": self.scale, "applied": self.applied} if self.dynamic else None

    def _check(self, saved: Json) -> Iterable[str]:
        if saved is None:
            return
        scale, applied = saved["scale"], saved["applied"]
        if isinstance(scale, bool) or not 0 < scale < math.inf or math.frexp(scale)[0] != 0.5:
            yield f"a scale of {scale!r} is no power of two"
        if type(applied) is not int or applied < 0:
            yield f"the scale cannot have held for {applied!r} steps"

    def _restore(self, saved: Json) -> None:
        if self.dynamic and saved is not None:
            self.scale, self.applied = saved["scale"], saved["applied"]
        elif self.dynamic:
            log.warning("the loss was not scaled before, it is multiplied with %g from here on", self.scale)
        elif saved is not None:
            log.warning("the loss was multiplied with %g before, it is not scaled from here on", saved["scale"])
