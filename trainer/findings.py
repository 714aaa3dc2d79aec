"""What a diagnosis says, and the robust statistics that its rules share. Pure.

Medians and median absolute deviations instead of means: one wild step must neither hide an illness nor be one.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from .columns import Course, Floats

MAD_TO_SIGMA: Final = 1.4826  # of a normal distribution


class Severity(enum.IntEnum):
    NOTE = 1  # worth knowing
    WARNING = 2  # the training is worse than it could be
    CRITICAL = 3  # the training is broken


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One illness: since when, where, how we know, and what helps."""

    name: str
    severity: Severity
    since: int  # step
    layers: tuple[str, ...] = ()
    evidence: str  # sentences with the numbers
    remedy: str  # what to change, or a command


def median(values: Floats) -> float:
    """Of those that are known; NaN for none."""
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else np.nan


def sigma(values: Floats) -> float:
    """Standard deviation as the median absolute deviation tells it."""
    return MAD_TO_SIGMA * median(np.abs(values - median(values)))


def noise(values: Floats) -> float:
    """Standard deviation around whatever trend there is: of the differences of neighbours, which double the variance."""
    return sigma(np.diff(values)) / np.sqrt(2) if len(values) > 2 else np.nan


def running_median(values: Floats, width: int) -> Floats:
    """Of each value and the up to `width` - 1 before it. Unknown values count as those before them."""
    filled = fill(values)
    if len(filled) < 2:
        return filled
    width = min(width, len(filled))
    padded = np.concatenate([np.full(width - 1, np.nan), filled])
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    out: Floats = np.empty(len(filled))
    out[: width - 1] = [np.median(filled[: i + 1]) for i in range(width - 1)]
    out[width - 1 :] = np.median(windows[width - 1 :], axis=1)
    return out


def running_noise(values: Floats, width: int) -> Floats:
    """`noise` of each value and the up to `width` - 1 before it; `width` is 3 or more."""
    filled = fill(values)
    out: Floats = np.array([noise(filled[: i + 1]) for i in range(min(width - 1, len(filled)))])
    if len(filled) < width:
        return out
    windows = np.lib.stride_tricks.sliding_window_view(np.diff(filled), width - 1)
    deviations = np.abs(windows - np.median(windows, axis=1, keepdims=True))
    return np.concatenate([out, MAD_TO_SIGMA * np.median(deviations, axis=1) / np.sqrt(2)])


def fill(values: Floats) -> Floats:
    """Unknown values become the last known one; the first ones the first known one."""
    known = ~np.isnan(values)
    if not known.any():
        return values
    at = np.maximum.accumulate(np.where(known, np.arange(len(values)), 0))
    at[: int(np.argmax(known))] = int(np.argmax(known))
    filled: Floats = values[at]
    return filled


def rewind(course: Course, before: int, *settings: str, skip: str = "") -> str:
    """The command that goes back to the checkpoint before a step; with nothing committed, to the beginning."""
    options = "".join([f" --skip {skip}" if skip else "", *(f" -o {setting}" for setting in settings)])
    return f"keepstep rewind {course.root or 'ROOT'} --to {course.commit_before(before)}{options}"


def nothing_found(unlooked: Sequence[str]) -> str:
    return "no findings; not every rule could look" if unlooked else "no findings: every rule was looked at, none applies"


def number(value: float) -> str:
    """Three digits that people can read."""
    if not np.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}"


def peak_lr(course: Course) -> float:
    known = course.steps.lr[~np.isnan(course.steps.lr)]
    return float(known.max()) if len(known) else course.config.optimizer.lr


def warm(course: Course) -> int:
    """Entries of the course before its learning rate came near its peak: what happens there is no verdict on it."""
    lr = course.steps.lr
    if not len(lr) or np.isnan(lr).all():
        return min(len(lr), 10)
    return int(np.argmax(np.nan_to_num(lr) >= 0.9 * np.nanmax(lr)))
