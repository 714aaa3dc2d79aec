"""When a checkpoint is due. Pure: rank 0 asks with its own monotonic clock, all ranks follow its answer.

With "auto" the coordinator decides from what rank 0 measures (costs.py), and tells how many steps lie between two saves. Persisting
never overlaps: a save that falls due while the last one is still being written waits for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final, assert_never

from .contract import Pacing

_SECONDS: Final = re.compile(r"(\d+(?:\.\d+)?)s")


@dataclass(frozen=True, slots=True)
class EverySteps:
    steps: int


@dataclass(frozen=True, slots=True)
class EverySeconds:
    seconds: float


@dataclass(frozen=True, slots=True)
class Auto:
    """As the coordinator says at the time."""


Interval = EverySteps | EverySeconds | Auto


@dataclass(frozen=True, slots=True, kw_only=True)
class Cadence:
    """The interval, where this attempt began, and its last save (or its beginning)."""

    interval: Interval
    began_step: int = 0
    saved_step: int
    saved_at: float

    def is_due(self, step: int, now: float, told: Pacing) -> bool:
        """Whether a checkpoint after `step` is due; stays true until `saved`. `told`: the newest word on "auto"."""
        match self.interval:
            case EverySteps(steps):
                return step // steps > self.saved_step // steps
            case EverySeconds(seconds):
                return now - self.saved_at >= seconds
            case Auto():
                return step - self.saved_step >= self.gap(told)
            case _:
                assert_never(self.interval)

    def gap(self, told: Pacing) -> int:
        """Of "auto": steps from one save to the next. Undecided or "soon": after 1, 2, 4, 8, ... steps of the attempt, until that is rarer
        than the interval."""
        doubled = max(1, self.saved_step - self.began_step)
        if told.every == 0:
            return doubled
        return min(doubled, told.every) if told.soon else told.every

    def began(self, step: int, now: float) -> Cadence:
        """The attempt goes on from there."""
        return replace(self, began_step=step, saved_step=step, saved_at=now)

    def saved(self, step: int, now: float) -> Cadence:
        return replace(self, saved_step=step, saved_at=now)


def parse_interval(value: int | str) -> Interval:
    """From checkpoint.interval. Raises ValueError."""
    if value == "auto":
        return Auto()
    if isinstance(value, int) and value >= 1:
        return EverySteps(value)
    if isinstance(value, str) and (match := _SECONDS.fullmatch(value)) and float(match[1]) > 0:
        return EverySeconds(float(match[1]))
    raise ValueError(f'checkpoint.interval = {value!r} must be a number of steps from 1, seconds as text such as "30s", or "auto"')
