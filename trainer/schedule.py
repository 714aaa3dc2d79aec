"""The learning rate as a function of the step: a restart has nothing to restore. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from .config import OptimizerSection

_BEGIN_RATIO: Final = 25.0  # of the peak to where one-cycle begins (Smith and Topin 2018)
_RISE_SHARE: Final = 0.3  # of the steps, in one-cycle


def learning_rate(config: OptimizerSection, step: int, steps: int) -> float:
    """Of update number `step` (from 1) of `steps`: linear warm-up, then from the peak to `min_lr_ratio` of it at the last step.

    "one-cycle" rises by itself, without `warmup_steps`.
    """
    if config.schedule == "one-cycle":
        return _one_cycle(config, step / steps)
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return _between(config.lr, config.lr * config.min_lr_ratio, _LEFT[config.schedule](config, min(1.0, done)))


# Of the way from the peak to the end: 1 at the end of the warm-up, 0 at the last step.
_LEFT: Final[Mapping[str, Callable[[OptimizerSection, float], float]]] = {
    "constant": lambda config, done: 1.0,
    "linear": lambda config, done: 1.0 - done,
    "cosine": lambda config, done: _half_wave(done),
    "wsd": lambda config, done: min(1.0, (1.0 - done) / config.decay_share),  # warm up, stay, decay (Hu et al. 2024)
}


def _one_cycle(config: OptimizerSection, done: float) -> float:
    if done <= _RISE_SHARE:
        return _between(config.lr / _BEGIN_RATIO, config.lr, _half_wave(done / _RISE_SHARE))
    return _between(config.lr, config.lr * config.min_lr_ratio, _half_wave((done - _RISE_SHARE) / (1 - _RISE_SHARE)))


def _between(begin: float, end: float, left: float) -> float:
    return end + (begin - end) * left


def _half_wave(done: float) -> float:
    """From 1 to 0 (Loshchilov and Hutter 2017)."""
    return 0.5 * (1 + math.cos(math.pi * done))


def schedule_of(config: OptimizerSection, steps: int) -> dict[str, Any]:
    """What decides the learning rate and the clipping of every step, as JSON."""
    names = ("lr", "min_lr_ratio", "warmup_steps", "schedule", "decay_share", "clip_norm", "l1")
    return {name: getattr(config, name) for name in names} | {"steps": steps}


def changes(saved: Mapping[str, Any], now: Mapping[str, Any], what: str) -> Iterator[str]:
    """A sentence per key whose value differs."""
    for key in sorted({*saved, *now}):
        before, after = (list(value) if isinstance(value, tuple) else value for value in (saved.get(key), now.get(key)))
        if before != after:
            yield f"{key} {what} was {before} and is {after} from here on"
