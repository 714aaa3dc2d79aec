"""What must not become part of a training: losses and gradients that are not finite, or far beyond those of the recent steps.

Found at the exchange of the step, before anything is updated, by all ranks alike. The step is then examined (autopsy.py), and the attempt
ends with a BadStep on every rank. Under keepstep the run goes back to the newest checkpoint and leaves those samples out; under plain
torchrun the exception says how a person does the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np

from keepstep.storage.faults import fault_point

from .agreement import Agreed
from .autopsy import Autopsy, Sample, examine
from .config import SpikeSection
from .contract import BAD_STEP_KIND
from .loader import MicroBatch
from .run import Run
from .spikes import Finding, NonFinite, Spike, Window

_EXCERPT_CHARS: Final = 80
_SHOWN: Final = 3  # ranges of positions, or ranks, in a sentence


class BadStep(ArithmeticError):
    """A step whose loss or gradient is not finite, or a spike; the state is still that of the step before. The same on every rank."""

    kind = BAD_STEP_KIND

    def __init__(self, sentence: str, *, step: int, skips: tuple[str, ...], ranks: tuple[int, ...]) -> None:
        self.step, self.skips, self.ranks = step, skips, ranks
        super().__init__(sentence)


def check(run: Run, step: int, agreed: Agreed, parts: Sequence[MicroBatch]) -> None:
    """Collective: all ranks find the same. Raises BadStep."""
    finding = find(run.window, agreed, run.config.train.spike)
    if finding is None:
        return
    fault_point("rank.autopsy", rank=run.world.rank, step=step)
    autopsy = examine(run, step, parts, finding)
    how = run.config.train.spike.skip
    skips = autopsy.skips(how)
    ranks = tuple(sorted({sample.rank for sample in autopsy.samples})) or (finding.ranks if isinstance(finding, NonFinite) else ())
    sentence = describe(step, finding, autopsy, ranks, autopsy.here(how), excerpt(run, autopsy.samples))
    if run.world.rank == 0:
        run.me.record_step({"rejected": rejected(step, finding, autopsy, ranks, skips, sentence)})
    raise BadStep(sentence if run.me.spec else sentence + advice(skips), step=step, skips=skips, ranks=ranks)


def find(window: Window, agreed: Agreed, limits: SpikeSection) -> Finding | None:
    """What is wrong with a step, judged by what all ranks know."""
    sums = agreed.losses, agreed.gradient_squares
    for what, value, by_rank in zip(("loss", "gradient"), (agreed.loss, agreed.grad_norm), sums, strict=True):
        if not math.isfinite(value):
            wrong = [rank for rank, each in enumerate(by_rank) if not math.isfinite(each)]
            ranks = tuple(wrong) if what == "loss" else ()  # a gradient is everybody's by then: it was reduced over all ranks
            return NonFinite(what, by_rank[wrong[0]] if wrong else value, ranks)  # type: ignore[arg-type]
    return window.spike(agreed.loss, agreed.grad_norm, limits)


def describe(step: int, finding: Finding, autopsy: Autopsy, ranks: Sequence[int], here: Sequence[str], text: str) -> str:
    """One sentence on one line: what happened, on which rank, in which module, by which samples."""
    of_ranks = f"of rank{'s' * (len(ranks) > 1)} {_some(map(str, ranks))}" if ranks else ""
    is_spike = isinstance(finding, Spike)  # the loss is then that of all ranks together, and the samples are theirs
    parts = [f"step {step}: the {finding.what}{f' {of_ranks}' if ranks and not is_spike else ''} is {_beyond(finding)}"]
    if autopsy.module:
        parts.append(f"first in {autopsy.module}" if finding.what == "loss" else f"first in the backward pass of {autopsy.module}")
    if autopsy.bad_parameter:
        parts.append(f"{autopsy.bad_parameter} was not finite before this step, so no sample is to blame")
    elif autopsy.samples:
        again = f", which come again {len(autopsy.later)} times" if autopsy.later else ""
        parts.append(f"samples {_some(here)}{f' {of_ranks}' if is_spike else ''} ({text}){again}")
    else:
        parts.append(f"no sample alone is to blame, so all of them are: {_some(here)}")
    return "; ".join(parts)


def _beyond(finding: Finding) -> str:
    if isinstance(finding, NonFinite):
        return f"{finding.value}"
    return f"{finding.value:.4g}, beyond {finding.bound:.4g} (median of the recent steps {finding.median:.4g})"


def _some(words: Iterable[str]) -> str:
    words = list(words)
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more


def advice(skips: Sequence[str]) -> str:
    """What a person does where nobody rewinds."""
    listed = ", ".join(f'"{skip}"' for skip in skips)
    return f"; to train without them, add [data] skip = [{listed}] to run.toml" if skips else ""


def excerpt(run: Run, samples: Sequence[Sample]) -> str:
    """How the worst sample begins, escaped, at most 80 characters."""
    if not samples:
        return ""
    number = run.feed.order.samples(np.array([samples[0].position], dtype=np.uint64))
    text = run.tokens.tokenizer.decode([token for token in run.samples.ids(number)[0].tolist() if token >= 0])
    return repr(text)[:_EXCERPT_CHARS]


def rejected(step: int, finding: Finding, autopsy: Autopsy, ranks: Sequence[int], skips: Sequence[str], sentence: str) -> dict[str, Any]:
    """The line of the steps file that tells of a step that did not become one."""
    return {
        "step": step,
        "what": finding.what,
        "value": _number(finding.value),
        "median": finding.median if isinstance(finding, Spike) else None,
        "bound": finding.bound if isinstance(finding, Spike) else None,
        "ranks": list(ranks),
        "module": autopsy.module,
        "samples": [{"position": s.position, "rank": s.rank, "loss": _number(s.loss)} for s in autopsy.samples],
        "skips": list(skips),
        "why": sentence,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
