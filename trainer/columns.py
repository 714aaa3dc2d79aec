"""The course of a training as columns: what `course.py` reads, `diagnosis.py` judges and `keepstep trace` draws. Pure.

A number that was not recorded, or that was not finite, is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import TrainerConfig

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_DTYPES: Mapping[str, Any] = {
    "provisional": np.bool_,
    **dict.fromkeys(("step", "attempt", "first_position", "last_position", "batch"), np.int64),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Steps:
    """One entry per step in every column, in the order in which they were computed."""

    step: Ints
    attempt: Ints
    provisional: Bools  # computed by the newest attempt, not committed yet
    loss: Floats  # mean over the global batch, nats per token
    grad_norm: Floats  # before clipping
    param_norm: Floats  # of the parameters that the forward pass used
    update_ratio: Floats  # ||update|| / ||parameters|| of this step's update
    lr: Floats
    tokens: Floats
    seconds: Floats
    first_position: Ints  # of the canonical order, -1: unknown
    last_position: Ints
    batch: Ints  # digest of what was consumed, rank by rank; 0: unknown

    def __len__(self) -> int:
        return len(self.step)

    @property
    def tokens_per_s(self) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.seconds > 0, self.tokens / self.seconds, np.nan)

    def where(self, chosen: Bools) -> Steps:
        return Steps(**{column.name: getattr(self, column.name)[chosen] for column in fields(Steps)})

    def within(self, first: int, last: int) -> Steps:
        """Steps from `first` to `last`, both included."""
        return self.where((self.step >= first) & (self.step <= last))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerSamples:
    """Statistics of modules and parameters in the steps that were sampled.

    `values[statistic]` is (len(step), len(names)), NaN where a name has no such statistic. Statistics: see trainer/README.md.
    """

    step: Ints
    names: tuple[str, ...]  # in the order in which the forward pass called them, as far as it is known
    values: Mapping[str, Floats]

    def __len__(self) -> int:
        return len(self.step)

    def of(self, statistic: str) -> Floats:
        return self.values.get(statistic, np.full((len(self.step), len(self.names)), np.nan))

    def named(self, statistic: str) -> tuple[tuple[str, ...], Floats]:
        """The names that have this statistic, and their columns."""
        values = self.of(statistic)
        there = np.flatnonzero((~np.isnan(values)).any(axis=0))
        return tuple(self.names[i] for i in there), values[:, there]

    def within(self, first: int, last: int) -> LayerSamples:
        chosen = (self.step >= first) & (self.step <= last)
        return LayerSamples(step=self.step[chosen], names=self.names, values={name: v[chosen] for name, v in self.values.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptCourse:
    """One launch of all ranks, and what of it counts."""

    attempt: int
    world_size: int
    nodes: tuple[str, ...]
    resume_step: int  # -1: from scratch
    at: str
    first_step: int = 0  # that it computed; 0: none
    last_step: int = 0
    kept_steps: int = 0  # that stand in the lineage
    lost_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """On held-out text, after update number `step`."""

    step: int
    attempt: int
    nats: float  # per token
    perplexity: float
    others: Mapping[str, float] = field(default_factory=dict)  # its other figures by name, see figures.py


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """Something that ended an attempt or sent the run back, as the run told it."""

    kind: str  # "failure", "rewind" or "rejected"
    step: int  # -1: unknown
    attempt: int
    why: str
    module: str = ""  # that made it, where somebody found out
    cause: str = ""  # of a failure: its kind; of a rejected step: "spike" or "non-finite"; of a rewind: "bad-step" or "people"
    skips: tuple[str, ...] = ()  # of a rewind: in force since, those before it included
    overrides: tuple[str, ...] = ()  # of a rewind: likewise

    def rewound(self) -> str:
        """What a rewind did, in words."""
        where = f"step {self.step}" if self.step else "the beginning"
        who = f"a person asked to go back to {where}" if self.cause == "people" else f"{self.why}: the run went back to {where}"
        skips = f", without samples {', '.join(self.skips)}" if self.skips else ""
        return f"{who}{skips}{', with ' if self.overrides else ''}{', '.join(self.overrides)}"


def no_steps() -> Steps:
    columns: dict[str, Any] = {column.name: np.zeros(0, dtype=_DTYPES.get(column.name, np.float64)) for column in fields(Steps)}
    return Steps(**columns)


def no_layers() -> LayerSamples:
    return LayerSamples(step=np.zeros(0, dtype=np.int64), names=(), values={})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Course:
    """A training as it went. `steps` is the lineage: one curve, each step once. `lost` is what was computed and left it."""

    run: str = ""
    root: str = ""
    config: TrainerConfig = field(default_factory=TrainerConfig)
    steps: Steps = field(default_factory=no_steps)
    lost: Steps = field(default_factory=no_steps)
    layers: LayerSamples = field(default_factory=no_layers)
    attempts: tuple[AttemptCourse, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()  # of the lineage, ascending
    incidents: tuple[Incident, ...] = ()
    commits: tuple[int, ...] = ()  # steps whose checkpoints can be resumed from, ascending
    epoch_samples: int = 0  # 0: unknown
    unigram_nats: float = np.nan  # of the held-out text: what knows the frequencies of tokens and no context
    vocabulary: int = 0
    outcome: str = ""  # "succeeded", "stopped", "failed"; "": it goes on

    def within(self, first: int, last: int) -> Course:
        """The part from step `first` to `last`, both included."""
        return replace(
            self,
            steps=self.steps.within(first, last),
            lost=self.lost.within(first, last),
            layers=self.layers.within(first, last),
            evaluations=tuple(e for e in self.evaluations if first <= e.step <= last),
            incidents=tuple(i for i in self.incidents if first <= i.step <= last),
        )

    @property
    def epochs(self) -> float:
        """Passes over the training text at the last step, 0.0 where unknown."""
        samples = int(self.steps.step.max(initial=0)) * self.samples_per_step
        return samples / self.epoch_samples if self.epoch_samples else 0.0

    @property
    def samples_per_step(self) -> int:
        """That were consumed: what was skipped widens the span of some steps, never of all. 0: unknown."""
        known = self.steps.first_position >= 0
        return int((self.steps.last_position - self.steps.first_position)[known].min()) if known.any() else 0

    def endings(self, attempt: int) -> list[str]:
        """Why an attempt ended, and what a rewind then brought; empty for one that goes on, or ended well."""
        mine = [incident for incident in self.incidents if incident.attempt == attempt]
        failures = [incident.why for incident in mine if incident.kind == "failure"]
        return [*failures[-1:], *(incident.rewound() for incident in mine if incident.kind == "rewind")]

    def commit_before(self, step: int) -> int:
        """The newest usable checkpoint before update `step`, 0 for the beginning."""
        return max((commit for commit in self.commits if commit < step), default=0)
