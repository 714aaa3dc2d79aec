"""When a checkpoint is due. Pure: rank 0 asks with its own monotonic clock, all ranks follow its answer.

"auto" saves every sqrt(2 s m) seconds (Young 1974), s = what the last save cost training, m = mean time between failures: one hour taken
for granted, divided by the attempts that the run has needed so far. Persisting never overlaps: a save that falls due while the last one
is still being written waits for it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Final, assert_never

PRIOR_MTBF_S: Final = 3600.0
_MIN_AUTO_S: Final = 1.0
_MAX_AUTO_S: Final = 600.0
_FIRST_STALL_S: Final = 0.02  # until one was measured
_SECONDS: Final = re.compile(r"(\d+(?:\.\d+)?)s")


@dataclass(frozen=True, slots=True)
class EverySteps:
    steps: int


@dataclass(frozen=True, slots=True)
class EverySeconds:
    seconds: float


@dataclass(frozen=True, slots=True)
class Auto:
    attempt: int  # of the run, from 1: every one but the first was a failure

    def seconds(self, stall_s: float) -> float:
        mtbf_s = PRIOR_MTBF_S / max(1, self.attempt)
        return min(_MAX_AUTO_S, max(_MIN_AUTO_S, math.sqrt(2 * stall_s * mtbf_s)))


Interval = EverySteps | EverySeconds | Auto


@dataclass(frozen=True, slots=True, kw_only=True)
class Cadence:
    """The interval and the last save (or the start)."""

    interval: Interval
    saved_step: int
    saved_at: float
    stall_s: float = _FIRST_STALL_S

    def is_due(self, step: int, now: float) -> bool:
        """Whether a checkpoint after `step` is due; stays true until `saved`."""
        match self.interval:
            case EverySteps(steps):
                return step // steps > self.saved_step // steps
            case EverySeconds(seconds):
                return now - self.saved_at >= seconds
            case Auto() as auto:
                return now - self.saved_at >= auto.seconds(self.stall_s)
            case _:
                assert_never(self.interval)

    def saved(self, step: int, now: float, stall_s: float) -> Cadence:
        return replace(self, saved_step=step, saved_at=now, stall_s=stall_s)


def parse_interval(value: int | str, attempt: int) -> Interval:
    """From checkpoint.interval. Raises ValueError."""
    if value == "auto":
        return Auto(attempt)
    if isinstance(value, int) and value >= 1:
        return EverySteps(value)
    if isinstance(value, str) and (match := _SECONDS.fullmatch(value)) and float(match[1]) > 0:
        return EverySeconds(float(match[1]))
    raise ValueError(f'checkpoint.interval = {value!r} must be a number of steps from 1, seconds as text such as "30s", or "auto"')
