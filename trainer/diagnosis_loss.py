"""Illnesses that the curves of loss, gradient norm and update ratio show. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from .columns import Course, Floats, Incident
from .findings import Finding, Severity, median, noise, number, peak_lr, rewind, running_median, running_noise, sigma, warm

# A normal deviate leaves 8 sigma once in 1e15 steps; batches of text have heavier tails, hence the floor of a tenth of the level beside it.
SPIKE_SIGMAS: Final = 8.0
SPIKE_SHARE: Final = 0.1
SPIKE_WINDOW: Final = 32  # steps before, that say what is usual
SPIKE_MIN_WINDOW: Final = 12

SMOOTH: Final = 11  # steps of the running median: five wild ones in a row do not move it
# The running median of a healthy loss falls, but for noise of sigma / sqrt(SMOOTH). A tenth of the loss is beyond that at any batch size.
DIVERGED_SHARE: Final = 0.1
DIVERGED_SIGMAS: Final = 4.0

MIN_STEPS: Final = 50  # fewer say nothing about a trend
PLATEAU_SHARE: Final = 1 / 3  # of the steps that count: long enough that a scaling law (loss ~ steps^-0.05 and steeper) gains over 1 %
PLATEAU_GAIN: Final = 0.005  # half of that, as a share of the loss
PLATEAU_NATS: Final = 0.01  # at least: near zero every share is small
PLATEAU_LR: Final = 0.3  # of the peak: a loss that rests because the schedule has cooled down is an end, not a plateau

# A ratio of about 1e-3 between update and parameters is the rule of thumb (A. Karpathy's lecture notes for CS231n, 2015). Adam on small
# models trains well at ten times that, so either bound counts only together with a bad outcome.
RATIO_HIGH: Final = 3e-3
RATIO_LOW: Final = 1e-4
SLOW_FALL: Final = 0.1  # of the first loss: less than this after MIN_STEPS is hardly learning

GROWN: Final = 10.0  # gradient norms of a healthy training wander by a factor of three or so once it is warm
GROWN_STEPS: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Spike:
    """Entries of the course: where it begins, where it is highest, where it is over (None: it is not)."""

    first: int
    peak: int
    end: int | None
    usual: float  # level before
    spread: float  # sigma before, around the trend


def spikes(loss: Floats) -> Iterator[Spike]:
    """Losses far above what was usual in the `SPIKE_WINDOW` steps before."""
    usual, spread = running_median(loss, SPIKE_WINDOW)[:-1], running_noise(loss, SPIKE_WINDOW)[:-1]
    with np.errstate(invalid="ignore"):
        is_far = loss[1:] > usual + np.fmax(SPIKE_SIGMAS * spread, SPIKE_SHARE * usual)
    over = 0
    for i in (np.flatnonzero(is_far) + 1).tolist():
        if i < max(over, SPIKE_MIN_WINDOW):
            continue
        level, sigma_before = float(usual[i - 1]), float(spread[i - 1])
        back = np.flatnonzero(loss[i:] <= level + max(2 * sigma_before, SPIKE_SHARE * level / 2))
        end = i + int(back[0]) if len(back) else None
        yield Spike(first=i, peak=i + int(np.nanargmax(loss[i:end])), end=end, usual=level, spread=sigma_before)
        if end is None:
            return
        over = end + 1


def loss_spike(course: Course) -> Iterator[Finding]:
    steps = course.steps
    found = list(spikes(steps.loss))
    rejected = [incident for incident in course.incidents if incident.kind == "rejected" and incident.cause == "spike"]
    yield from (_rejected_spike(course, incident) for incident in rejected)
    if not found:
        return
    worst = max(found, key=lambda spike: float(steps.loss[spike.peak] - spike.usual))
    first, at = int(steps.step[found[0].first]), int(steps.step[worst.peak])
    what = f"{len(found)} spikes, the highest" if len(found) > 1 else "a spike"
    over = f"over at step {steps.step[worst.end]}" if worst.end is not None else "not over yet"
    norm, usual_norm = steps.grad_norm[worst.first], median(steps.grad_norm[max(0, worst.first - SPIKE_WINDOW) : worst.first])
    yield Finding(
        name="loss-spike",
        severity=Severity.WARNING if worst.end is not None else Severity.CRITICAL,
        since=first,
        evidence=(
            f"{what} at step {at}: loss {steps.loss[worst.peak]:.3f} where {worst.usual:.3f} was usual (sigma {worst.spread:.3f}); "
            f"gradient norm at its begin {number(norm)}, before it {number(usual_norm)}; {over}"
        ),
        remedy=_without(course, worst.first) + "; if spikes come back with other samples, lower optimizer.lr or optimizer.clip_norm",
    )


def _rejected_spike(course: Course, incident: Incident) -> Finding:
    return Finding(
        name="loss-spike",
        severity=Severity.NOTE if incident.skips else Severity.WARNING,
        since=incident.step,
        layers=(incident.module,) if incident.module else (),
        evidence=incident.why,
        remedy=f"the step was refused; {', '.join(incident.skips) or 'no sample'} is left out since; "
        f"if it comes back elsewhere: {rewind(course, incident.step, f'optimizer.lr={number(peak_lr(course) / 2)}')}",
    )


def _without(course: Course, entry: int) -> str:
    """The command that trains on without the samples of an entry, if they are known."""
    first, last, step = (int(column[entry]) for column in (course.steps.first_position, course.steps.last_position, course.steps.step))
    if first < 0:
        return rewind(course, step, f"optimizer.lr={number(peak_lr(course) / 3)}")
    return f"{rewind(course, step, skip=f'{first}:{last}')} leaves its samples out"


def exploding_over_time(course: Course) -> Iterator[Finding]:
    """The gradient norm grows by an order of magnitude and stays there (Pascanu et al. 2013 on what follows)."""
    norm, start = course.steps.grad_norm, max(warm(course), SMOOTH)
    if len(norm) < start + SMOOTH + GROWN_STEPS or np.isnan(norm).all():
        return
    smooth = running_median(norm, SMOOTH)[start:]
    lowest = np.minimum.accumulate(smooth)
    is_grown = smooth > GROWN * lowest
    if not is_grown[-GROWN_STEPS:].all():
        return
    since = start + len(is_grown) - int(np.argmin(is_grown[::-1])) if not is_grown.all() else start
    clip = course.config.optimizer.clip_norm
    yield Finding(
        name="exploding-gradients",
        severity=Severity.WARNING,
        since=int(course.steps.step[since]),
        evidence=f"the gradient norm is {number(smooth[-1])} (median of {SMOOTH} steps) and was {number(lowest[-1])} before",
        remedy=rewind(course, int(course.steps.step[since]), f"optimizer.lr={number(peak_lr(course) / 3)}")
        + ("" if clip else "; optimizer.clip_norm = 0 switches clipping off: set it to 1"),
    )


def usual_ratio(course: Course) -> float:
    """Median update-to-parameter ratio of the steps with at least half of the peak learning rate; NaN where none is known."""
    steps = course.steps
    return median(steps.update_ratio[np.nan_to_num(steps.lr) >= 0.5 * peak_lr(course)])


def diverged_since(course: Course) -> int | None:
    """The entry from which on the loss is above its best, or above its first value, by far and to the end. None: it is not."""
    loss = course.steps.loss
    if len(loss) < 2 * SMOOTH:
        return None
    smooth = running_median(loss, SMOOTH)
    spread = noise(loss[: max(SMOOTH, len(loss) // 2)])
    best = np.minimum.accumulate(smooth)
    above = smooth > best * (1 + DIVERGED_SHARE) + DIVERGED_SIGMAS * spread / np.sqrt(SMOOTH)
    if not above[-SMOOTH:].all():
        return None
    below = np.flatnonzero(~above)
    return int(below[-1]) + 1 if len(below) else 0


def hump(course: Course) -> int | None:
    """The entry at which the loss had risen well above that of the untrained model; None: it never did."""
    steps = course.steps
    if len(steps) < 2 * SMOOTH or steps.step[0] != 1:
        return None
    above = running_median(steps.loss, 5) > steps.loss[0] * (1 + DIVERGED_SHARE)
    return int(np.argmax(above)) if above.any() else None


def lr_too_high(course: Course) -> Iterator[Finding]:
    ratio, lr = usual_ratio(course), peak_lr(course)
    if ratio < RATIO_HIGH:
        return  # whatever happened, the updates were small
    steps = course.steps
    since, what, severity = diverged_since(course), "rose and stayed there", Severity.CRITICAL
    if since is None:
        since, what, severity = hump(course), "rose above that of the untrained model, and came back", Severity.WARNING
    if since is None:
        return
    best, after = float(np.nanmin(steps.loss[: since + 1])), steps.loss[since:]
    worst = f"{np.nanmax(after):.3f}" if np.isfinite(after).any() else "what is no number"
    known = f", each update changes the parameters by {number(ratio)} of their norm" if ratio == ratio else ""
    yield Finding(
        name="learning-rate-too-high",
        severity=severity,
        since=int(steps.step[since]),
        evidence=f"the loss {what}: from {best:.3f} up to {worst}; optimizer.lr peaks at {number(lr)}{known}",
        remedy=rewind(course, int(steps.step[since]), f"optimizer.lr={number(lr / 10)}") + ", or a longer optimizer.warmup_steps",
    )


def lr_too_low(course: Course) -> Iterator[Finding]:
    steps, start = course.steps, warm(course)
    ratio = usual_ratio(course)
    if len(steps) - start < MIN_STEPS or not ratio < RATIO_LOW:
        return
    first, last = median(steps.loss[:5]), median(steps.loss[-SMOOTH:])
    if first - last > SLOW_FALL * first:
        return
    lr = peak_lr(course)
    factor = min(100.0, max(10.0, 1e-3 / ratio)) if ratio > 0 else 100.0
    yield Finding(
        name="learning-rate-too-low",
        severity=Severity.WARNING,
        since=int(steps.step[start]),
        evidence=(
            f"each update changes the parameters by {number(ratio)} of their norm (about 1e-3 is usual), "
            f"and the loss went from {first:.3f} to {last:.3f} in {len(steps)} steps"
        ),
        remedy=rewind(course, int(steps.step[start]), f"optimizer.lr={number(lr * factor)}"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """A stretch of the course in which the loss did not move."""

    first: int  # entry
    last: int
    gain: float  # nats
    level: float


def rest(course: Course) -> Rest | None:
    """The last third of the steps with a learning rate that could still move something, if nothing was gained and nothing lost."""
    steps = course.steps
    counts = np.flatnonzero((np.nan_to_num(steps.lr) >= PLATEAU_LR * peak_lr(course)) & ~np.isnan(steps.loss))
    counts = counts[counts >= warm(course)]
    if len(counts) < MIN_STEPS:
        return None
    part = counts[-int(len(counts) * PLATEAU_SHARE) :]
    half = len(part) // 2
    if half < SMOOTH:
        return None
    earlier, later = steps.loss[part[:half]], steps.loss[part[half:]]
    gain = median(earlier) - median(later)
    doubt = 1.2533 * np.sqrt(sigma(earlier) ** 2 / len(earlier) + sigma(later) ** 2 / len(later))  # standard error of medians
    nothing = max(PLATEAU_GAIN * median(later), PLATEAU_NATS)
    if gain + 2 * doubt > nothing or gain - 2 * doubt < -2 * nothing:
        return None
    return Rest(first=int(part[0]), last=int(part[-1]), gain=gain, level=median(later))


def plateau(course: Course) -> Iterator[Finding]:
    found = rest(course)
    if found is None:
        return
    steps = course.steps
    yield Finding(
        name="plateau",
        severity=Severity.NOTE,
        since=int(steps.step[found.first]),
        evidence=(
            f"loss {found.level:.3f} since step {steps.step[found.first]}: {found.gain:+.4f} nats gained in "
            f"{found.last - found.first + 1} steps at a learning rate of {number(median(steps.lr[found.first : found.last + 1]))}"
        ),
        remedy="stop here, let the learning rate fall (optimizer.min_lr_ratio below 1, run.steps at the end you mean), or give the model "
        "more to learn with: model.layers, model.width, model.context",
    )
