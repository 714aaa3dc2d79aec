"""The best evaluation so far, and when a training that gets no better is over (early stopping, Prechelt 1998). Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """What the evaluations of a run have come to. All ranks have the same: an evaluation has the same bits everywhere."""

    step: int = 0  # of the best evaluation; 0: none yet
    nats: float = math.inf  # its loss
    worse: int = 0  # evaluations in a row since then that were not better
    seen: int = 0  # step of the newest evaluation

    def after(self, step: int, nats: float, min_delta: float) -> Best:
        """With the evaluation of one more step. It is better when its loss is lower by more than `min_delta`; NaN is never better."""
        if nats < self.nats - min_delta:
            return Best(step=step, nats=nats, seen=step)
        return replace(self, worse=self.worse + 1, seen=step)

    def is_over(self, patience: int) -> bool:
        """Whether so many evaluations were not better; 0: never."""
        return 0 < patience <= self.worse

    def is_due(self, step: int, interval: int) -> bool:
        """Whether this step is to be evaluated. Also of one from which a run goes on: whoever had to leave there had no time for it."""
        return interval > 0 and step > self.seen and step % interval == 0

    def explain(self, patience: int) -> str:
        """Why the training is over, as a sentence."""
        return f"none of the last {patience} evaluations was better than that of step {self.step} ({self.nats:.4f} nats)"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"nats": self.nats.hex()}

    @staticmethod
    def from_json(saved: Mapping[str, Any]) -> Best:
        """Raises ValueError, TypeError or KeyError for what `to_json` never gave."""
        counts = {name: saved[name] for name in ("step", "worse", "seen")}
        if any(type(count) is not int or count < 0 for count in counts.values()) or counts["step"] > counts["seen"]:
            raise ValueError(f"{counts} are no evaluations")
        return Best(nats=float.fromhex(saved["nats"]), **counts)
