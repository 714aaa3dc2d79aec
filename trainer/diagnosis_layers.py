"""Illnesses that the statistics of modules and parameters show, and numbers that are not finite. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import numpy as np

from .columns import Bools, Course, Incident
from .findings import Finding, Severity, median, number, peak_lr, rewind

# Between the ends of a healthy network gradients differ by one order of magnitude, with residual connections by less. Three make the first
# layers learn a thousand times slower than the last (Glorot and Bengio 2010, figure 7, show five layers of sigmoids doing that).
DEPTH_RATIO: Final = 1e-3
MIN_DEPTH: Final = 3  # layers of one kind
PERSISTENT: Final = 2  # samples in a row, to the end
DEAD_SHARE: Final = 0.25  # of a layer's units, that are 0 for every token of a batch; a fresh ReLU layer has next to none
SHOWN: Final = 6  # layers by name
DEPTH_REMEDIES: Final = {
    "vanishing-gradients": "residual connections, normalisation, initial weights that keep the variance (1 / sqrt(inputs)), ReLU or GELU "
    "instead of sigmoid or tanh",
    "exploding-gradients": "smaller initial weights (1 / sqrt(inputs)), normalisation, optimizer.clip_norm = 1",
}
_NUMBER: Final = re.compile(r"(?<![^.])\d+(?![^.])")


def kinds_by_depth(names: tuple[str, ...]) -> Iterator[tuple[str, list[int]]]:
    """Indices of the names that differ in one number only, by that number: ("blocks.*.mlp.up.weight", [0, 1, ...])."""
    kinds: dict[str, list[tuple[int, int]]] = {}
    for index, name in enumerate(names):
        if found := _NUMBER.search(name):
            kinds.setdefault(f"{name[: found.start()]}*{name[found.end() :]}", []).append((int(found[0]), index))
    yield from ((kind, [index for _, index in sorted(members)]) for kind, members in sorted(kinds.items()) if len(members) >= MIN_DEPTH)


def gradients_by_depth(course: Course) -> Iterator[Finding]:
    """Vanishing: the layers near the input get next to nothing. Exploding: they get by far the most."""
    names, norms = course.layers.named("grad_norm")
    vanishing: list[tuple[int, str, float]] = []
    exploding: list[tuple[int, str, float]] = []
    for _, members in kinds_by_depth(names):
        part = norms[:, members]
        last = np.fmax.reduce(part[:, -max(1, len(members) // 3) :], axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = part / last[:, None]
        for place, member in enumerate(members[:-1]):
            for found, is_ill in ((vanishing, ratio[:, place] < DEPTH_RATIO), (exploding, ratio[:, place] > 1 / DEPTH_RATIO)):
                if (since := _since(is_ill)) is not None:
                    found.append((since, names[member], median(ratio[since:, place])))
    yield from _by_depth(course, vanishing, "vanishing-gradients")
    yield from _by_depth(course, exploding, "exploding-gradients")


def _by_depth(course: Course, found: list[tuple[int, str, float]], name: str) -> Iterator[Finding]:
    if not found:
        return
    since = min(entry for entry, _, _ in found)
    ratios = [ratio for _, _, ratio in found]
    most, which = (min(ratios), "smallest") if name == "vanishing-gradients" else (max(ratios), "largest")
    yield Finding(
        name=name,
        severity=Severity.CRITICAL,
        since=int(course.layers.step[since]),
        layers=tuple(layer for _, layer, _ in found),
        evidence=f"the gradients of {listed([layer for _, layer, _ in found])} are, at the {which}, {number(most)} times those of the last "
        f"layers of their kind, in all {len(course.layers) - since} samples since step {course.layers.step[since]}",
        remedy=DEPTH_REMEDIES[name],
    )


def dead_units(course: Course) -> Iterator[Finding]:
    names, dead = course.layers.named("dead")
    found = [(since, i) for i in range(len(names)) if (since := _since(dead[:, i] >= DEAD_SHARE)) is not None]
    if not found:
        return
    since = min(entry for entry, _ in found)
    layers = [names[i] for _, i in found]
    worst = max((i for _, i in found), key=lambda i: float(dead[-1, i]))
    yield Finding(
        name="dead-units",
        severity=Severity.WARNING,
        since=int(course.layers.step[since]),
        layers=tuple(layers),
        evidence=f"of {names[worst]} {100 * dead[-1, worst]:.0f} % of the units are 0 for every token of a batch "
        f"(limit {100 * DEAD_SHARE:.0f} %), in {listed(layers)} since step {course.layers.step[since]}",
        remedy="a unit that never fires gets no gradient and stays dead: "
        + rewind(course, int(course.layers.step[since]), f"optimizer.lr={number(peak_lr(course) / 3)}")
        + ", or GELU or a leaky ReLU, or smaller biases",
    )


def non_finite(course: Course) -> Iterator[Finding]:
    """The first number that was none, as it was refused or recorded."""
    refused = [i for i in course.incidents if _is_non_finite(i)]
    yield from (_refused(course, incident) for incident in refused)
    if refused:
        return
    where = _first_non_finite_layer(course)
    steps = course.steps
    bad = np.flatnonzero(np.isnan(steps.loss) | np.isinf(steps.loss))
    if where is None and not len(bad):
        return
    since = min([int(steps.step[bad[0]])] if len(bad) else [where[0]] if where else [])
    layer = where[1] if where and where[0] <= since else ""
    yield Finding(
        name="non-finite",
        severity=Severity.CRITICAL,
        since=since,
        layers=(layer,) if layer else (),
        evidence=(f"the loss of step {since} is not finite" if len(bad) else f"step {since} has numbers that are not finite")
        + (f"; the first module in the forward pass with such outputs is {layer}" if layer else ""),
        remedy=rewind(course, since, f"optimizer.lr={number(peak_lr(course) / 3)}") + '; train.precision = "fp32" if it is not',
    )


def _is_non_finite(incident: Incident) -> bool:
    return incident.kind == "rejected" and incident.cause == "non-finite"


def _refused(course: Course, incident: Incident) -> Finding:
    went_back = [i for i in course.incidents if i.kind == "rewind" and i.attempt == incident.attempt]
    by_itself = " by itself" if went_back and went_back[-1].cause == "bad-step" else ""
    skips = ", ".join(incident.skips or (went_back[-1].skips if went_back else ()))  # its own; a rewind knows those of earlier ones, too
    return Finding(
        name="non-finite",
        severity=Severity.WARNING if went_back else Severity.CRITICAL,
        since=incident.step,
        layers=(incident.module,) if incident.module else (),
        evidence=incident.why,
        remedy=f"the run went back to step {went_back[-1].step}{by_itself} and leaves out {skips or 'nothing'}: look at those samples"
        if went_back
        else rewind(course, incident.step, skip=incident.skips[0] if incident.skips else "")
        + f"; if it comes back with other samples: -o optimizer.lr={number(peak_lr(course) / 10)}",
    )


def _first_non_finite_layer(course: Course) -> tuple[int, str] | None:
    """(step, first name in the order of the forward pass).

    With precision "fp16" a gradient that overflows under the loss's scale is nothing: nobody applies it, its norm is not recorded.
    """
    steps = course.steps
    overflowed = steps.step[np.isnan(steps.grad_norm)] if course.config.train.precision == "fp16" else steps.step[:0]
    for statistic in ("nonfinite", "grad_nonfinite"):
        names, values = course.layers.named(statistic)
        is_wrong = np.nan_to_num(values) > 0
        if statistic == "grad_nonfinite":
            is_wrong[np.isin(course.layers.step, overflowed)] = False
        rows, columns = np.nonzero(is_wrong)
        if len(rows):
            return int(course.layers.step[rows[0]]), names[int(columns[rows == rows[0]].min())]
    return None


def _since(is_ill: Bools) -> int | None:
    """The entry from which on it holds to the end, if it does for `PERSISTENT` samples at least."""
    well = np.flatnonzero(~is_ill)
    since = int(well[-1]) + 1 if len(well) else 0
    return since if len(is_ill) - since >= PERSISTENT else None


def listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
