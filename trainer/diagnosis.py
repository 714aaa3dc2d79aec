"""What is wrong with a training, read from its course: every rule is a function of the course alone. Pure.

A rule speaks only when its numbers leave no other reading that a healthy training would give; each has a test in which its illness is
really trained, and all of them keep silent about a healthy training. Thresholds stand, with their reasons, beside their rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from . import diagnosis_fit as fit
from . import diagnosis_layers as layers
from . import diagnosis_loss as loss
from .columns import Course
from .findings import Finding

Rule = Callable[[Course], Iterator[Finding]]

RULES: Final[tuple[Rule, ...]] = (
    layers.non_finite,
    loss.lr_too_high,
    loss.lr_too_low,
    loss.loss_spike,
    layers.gradients_by_depth,
    loss.exploding_over_time,
    layers.dead_units,
    fit.over_fitting,
    fit.under_fitting,
    fit.repeated_data,
    loss.plateau,
)

# A cause makes its consequence no news: where the first is found, the second is left out.
EXPLAINS: Final = (
    ("learning-rate-too-high", "plateau"),
    ("learning-rate-too-high", "loss-spike"),
    ("learning-rate-too-high", "under-fitting"),
    ("learning-rate-too-low", "plateau"),
    ("learning-rate-too-low", "under-fitting"),
    ("under-fitting", "plateau"),
)


def unjudged(course: Course) -> tuple[str, ...]:
    """What no rule could look at, and why: sentences without a full stop."""
    out = []
    if not course.epoch_samples:
        out.append("under-fitting and repeated text: the tokens in the root are gone, or cannot be read")
    if not course.evaluations:
        out.append("over-fitting: there is no evaluation on held-out text yet (evaluate.interval)")
    if not len(course.layers):
        out.append("layers: no statistics of them were recorded (trace.interval)")
    if len(course.steps) < loss.MIN_STEPS:
        out.append(f"trends: fewer than {loss.MIN_STEPS} steps are recorded")
    return tuple(out)


def diagnose(course: Course) -> tuple[Finding, ...]:
    """All that is found, the most severe first."""
    found = [finding for rule in RULES for finding in rule(course)]
    names = {finding.name for finding in found}
    explained = {consequence for cause, consequence in EXPLAINS if cause in names}
    return tuple(sorted((f for f in found if f.name not in explained), key=lambda f: (-f.severity, f.since)))
