"""From what was counted over held-out rows to the figures that people read. Pure.

Every count is of integers, and the loss is a sum that was rounded once, so the figures have the same bits at every world size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassCounts:
    """Of one class: rows that were taken for it, rows that are of it, and rows that are both."""

    label: str
    predicted: int
    actual: int
    right: int

    @property
    def precision(self) -> float:
        """0 where nothing was taken for it."""
        return _share(self.right, self.predicted)

    @property
    def recall(self) -> float:
        """0 where nothing is of it."""
        return _share(self.right, self.actual)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall, 0 where the class never occurs."""
        return _share(2 * self.right, self.predicted + self.actual)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a model makes of held-out rows. Figures of no target at all are NaN."""

    nats: float  # sum of -ln p(target)
    tokens: int  # targets
    first: int = 0  # targets that were the likeliest
    top_k: int = 0  # targets among the likeliest `k`
    k: int = 0
    text_bytes: int | None = None  # UTF-8 bytes that the targets stand for; None: they are no text
    classes: tuple[ClassCounts, ...] = ()

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """Infinite where a diverged model leaves the range of floats."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float | None:
        if self.text_bytes is None:
            return None
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else math.nan

    @property
    def accuracy(self) -> float:
        return self.first / self.tokens if self.tokens else math.nan

    @property
    def top_k_accuracy(self) -> float:
        return self.top_k / self.tokens if self.tokens else math.nan

    def macro(self) -> Mapping[str, float]:
        """Precision, recall and F1: means over the classes that occur, in the rows or among the answers, as torchmetrics has them."""
        there = [one for one in self.classes if one.predicted or one.actual]
        return {
            "precision": _mean([one.precision for one in there]),
            "recall": _mean([one.recall for one in there]),
            "f1": _mean([one.f1 for one in there]),
        }

    def figures(self) -> dict[str, Any]:
        """By their names in step records and result.json; None for what is not finite: JSON has no such numbers."""
        found: dict[str, float | None] = {"held_out_nats": self.nats_per_token, "perplexity": self.perplexity}
        if self.text_bytes is not None:
            found["bits_per_byte"] = self.bits_per_byte
        found |= {"accuracy": self.accuracy, "top_k_accuracy": self.top_k_accuracy}
        if self.classes:
            found |= self.macro()
        return {"held_out_tokens": self.tokens} | {name: _finite(value) for name, value in found.items()}

    def by_class(self) -> dict[str, dict[str, Any]]:
        """The figures of each class, by label."""
        return {
            one.label: {"precision": one.precision, "recall": one.recall, "f1": one.f1, "predicted": one.predicted, "rows": one.actual}
            for one in self.classes
        }


def _share(part: int, of: int) -> float:
    return part / of if of else 0.0


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
