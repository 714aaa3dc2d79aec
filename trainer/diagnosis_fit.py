"""Illnesses that held-out text and the data's own bookkeeping show. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import numpy as np

from .columns import Course
from .findings import Finding, Severity, median, number, rewind

# The held-out text is the same every time, so a rise is no noise of sampling; 2 % is above what a single update moves it by.
RISE: Final = 0.02
GAP: Final = 0.25  # held-out above training loss, as a share of it: beyond what another choice of documents explains
GAP_EPOCHS: Final = 2.0  # nothing is learnt by heart that was seen once
TRAIN_STEPS: Final = 11  # of the training loss around an evaluation

KNOWS_NO_CONTEXT: Final = 0.97  # of what the frequencies of tokens alone reach
STILL_FALLS: Final = 0.005  # of the loss, from one median of TRAIN_STEPS steps to the next: then it is too early, not too small
DONE_SHARE: Final = 0.5  # of run.steps: before that nothing is said about the end

# Muennighoff et al. 2023 (Scaling Data-Constrained Language Models): up to 4 epochs repeated text is nearly as good as new, beyond 16 it
# adds next to nothing.
EPOCHS: Final = 4.0
WORTHLESS_EPOCHS: Final = 16.0
MIN_REPEATED: Final = 3  # and more than chance gives


def train_loss_at(course: Course, step: int) -> float:
    """Median of the training loss over the steps up to `step`."""
    steps = course.steps
    return median(steps.loss[(steps.step <= step) & (steps.step > step - TRAIN_STEPS)])


def over_fitting(course: Course) -> Iterator[Finding]:
    known = [e for e in course.evaluations if math.isfinite(e.nats)]
    if not known:
        return
    best, last = min(known, key=lambda e: e.nats), known[-1]
    then, now = train_loss_at(course, best.step), train_loss_at(course, last.step)
    if last.nats > best.nats * (1 + RISE) and now < then:
        yield Finding(
            name="over-fitting",
            severity=Severity.WARNING,
            since=best.step,
            evidence=(
                f"held-out loss was {best.nats:.3f} at step {best.step} and is {last.nats:.3f} at step {last.step}, "
                f"while the training loss fell from {then:.3f} to {now:.3f}{_epochs(course)}"
            ),
            remedy=f"keep the model of step {best.step}, or go on from before it: "
            f"{rewind(course, best.step + 1, f'optimizer.weight_decay={_more_decay(course)}')}; in a new run more text (data.source) helps "
            f"most, then model.dropout = {_more_dropout(course)}",
        )
    elif course.epochs > GAP_EPOCHS and last.nats - now > GAP * now:
        yield Finding(
            name="over-fitting",
            severity=Severity.WARNING,
            since=last.step,
            evidence=f"held-out loss {last.nats:.3f} against a training loss of {now:.3f} at step {last.step}{_epochs(course)}",
            remedy=f"more text (data.source), model.dropout = {_more_dropout(course)}, a smaller model, or fewer run.steps; "
            "evaluate.interval shows from when on",
        )


def _epochs(course: Course) -> str:
    return f"; the text was seen {course.epochs:.1f} times" if course.epochs else ""


def _more_decay(course: Course) -> str:
    return number(max(0.1, 3 * course.config.optimizer.weight_decay))


def _more_dropout(course: Course) -> str:
    return number(min(0.5, course.config.model.dropout + 0.1))


def under_fitting(course: Course) -> Iterator[Finding]:
    """After half of the training the model is no better than a table of how often each token occurs."""
    steps = course.steps
    if not len(steps) or not steps.step[-1] >= DONE_SHARE * course.config.run.steps:
        return
    last = int(steps.step[-1])
    now = train_loss_at(course, last)
    held_out = course.evaluations[-1].nats if course.evaluations else np.nan
    if not min(now, held_out if held_out == held_out else now) > KNOWS_NO_CONTEXT * course.unigram_nats:
        return
    seen = f", held-out loss {held_out:.3f}" if held_out == held_out else ""
    falls = train_loss_at(course, last - TRAIN_STEPS) - now > STILL_FALLS * now
    more = "more run.steps: the loss still falls; then " if falls else ""
    yield Finding(
        name="under-fitting",
        severity=Severity.NOTE if falls else Severity.WARNING,
        since=last,
        evidence=f"training loss {now:.3f}{seen} at step {last}; the frequencies of tokens alone, without any context, give "
        f"{course.unigram_nats:.3f}",
        remedy=f"{more}a larger model (model.width, model.layers), less model.dropout or optimizer.weight_decay",
    )


def repeated_data(course: Course) -> Iterator[Finding]:
    steps = course.steps
    if course.epochs > EPOCHS:
        since = int(steps.step[np.argmax(steps.step * course.samples_per_step > EPOCHS * course.epoch_samples)])
        yield Finding(
            name="data-repetition",
            severity=Severity.WARNING if course.epochs > WORTHLESS_EPOCHS else Severity.NOTE,
            since=since,
            evidence=f"the {course.epoch_samples} samples of the text were seen {course.epochs:.1f} times; "
            f"up to {number(EPOCHS)} times repeated text is nearly as good as new, beyond {number(WORTHLESS_EPOCHS)} worth next to nothing",
            remedy="more text in a new run (data.source, data.max_bytes = 0)" + _end_here(course),
        )
    yield from _repeated_batches(course)


def _end_here(course: Course) -> str:
    now = int(course.steps.step[-1])
    return f", or an end here: run.steps = {now}" if now < course.config.run.steps and not course.outcome else ""


def _repeated_batches(course: Course) -> Iterator[Finding]:
    """The same rows on the same ranks once more: a shuffled text does not do that."""
    steps = course.steps
    known = np.flatnonzero(steps.batch != 0)
    digests, first, counts = np.unique(steps.batch[known], return_index=True, return_counts=True)
    repeated = len(known) - len(digests)
    by_chance = len(known) ** 2 / 2 / 2**32  # one rank's ledger is a CRC of 32 bits
    if repeated < MIN_REPEATED + 2 * by_chance:
        return
    again = known[np.setdiff1d(np.arange(len(known)), first)]
    worst = int(np.argmax(counts))
    example = steps.step[known[steps.batch[known] == digests[worst]]]
    yield Finding(
        name="data-repetition",
        severity=Severity.WARNING,
        since=int(steps.step[again[0]]),
        evidence=f"{repeated} of {len(known)} steps consumed a batch that an earlier step had consumed, for example steps "
        f"{', '.join(map(str, example[:4].tolist()))}",
        remedy="look at the data source: it repeats itself, or is shorter than a batch",
    )
