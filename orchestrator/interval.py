"""How often to save, where `[checkpoint] interval = "auto"`. Pure.

Two things are weighed: what a save costs (`contract.SaveCosts`, measured by rank 0, whose steps wait for all others) and what a failure
costs, half an interval of work on average. The interval that loses least is Daly's ("A higher order estimate of the optimum checkpoint
interval for restart dumps", 2006), Young's sqrt(2 cost M) in the first order, M being the mean time between failures of this job.

M is estimated as the failures come. Failures of processes come in proportion to ranks, failures of nodes in proportion to nodes; each kind
is a Poisson process whose rate has a gamma prior, so a resized run carries over what it has learnt. The prior stands for half a failure,
of either kind, within `PRIOR_S`: a job that has not run yet is most likely to fail at once, by its own mistakes or on its first contact
with the machines, and to expect that costs little, since the share of saves is bounded. Every quiet hour says otherwise: M grows with
the run's age, and after minutes the prior has no weight. Only the newest failures of a kind count, so that a run can change its
habits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal, TypeAlias

from keepstep.trainer.contract import SaveCosts

Kind: TypeAlias = Literal["process", "node"]

PRIOR_FAILURES: Final = 0.25  # of each kind: half a failure in all, as Jeffreys' prior has it for one Poisson process
PRIOR_S: Final = 120.0
MIN_S: Final = 1.0  # every save becomes a record in the log and a manifest, however cheap it is for the ranks
MAX_S: Final = 1800.0  # what a mistake of the estimate may cost; a save that needs longer to be written, or worth it, has longer
_COUNTED: Final = 16  # failures of a kind; the estimate of M is then within a quarter, and the loss is flat around its minimum
_CHANGE: Final = 1.25  # a smaller factor loses less than 3 % of what saves and failures cost: not worth a word, nor an order to all nodes


@dataclass(frozen=True, slots=True)
class Exposure:
    """Time at risk of one kind of failure, in rank-seconds or node-seconds: before each of the newest failures, and since the last."""

    gaps: tuple[float, ...] = ()
    since: float = 0.0

    def lived(self, units: float) -> Exposure:
        return Exposure(self.gaps, self.since + max(0.0, units))

    def failed(self) -> Exposure:
        return Exposure((*self.gaps, self.since)[-_COUNTED:])

    def rate(self, size: int) -> float:
        """Failures per second of a job with so many ranks, or nodes: the mean of the gamma posterior."""
        return (PRIOR_FAILURES + len(self.gaps)) / (PRIOR_S + (sum(self.gaps) + self.since) / size)


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The failures of a run and the time in which they came, all attempts together."""

    process: Exposure = Exposure()
    node: Exposure = Exposure()

    def lived(self, seconds: float, *, ranks: int, nodes: int) -> History:
        return History(process=self.process.lived(seconds * ranks), node=self.node.lived(seconds * nodes))

    def failed(self, kind: Kind) -> History:
        return replace(self, process=self.process.failed()) if kind == "process" else replace(self, node=self.node.failed())

    @property
    def num_failures(self) -> int:
        return len(self.process.gaps) + len(self.node.gaps)

    def mtbf_s(self, *, ranks: int, nodes: int) -> float:
        """Of a job of this size."""
        return 1 / (self.process.rate(ranks) + self.node.rate(nodes))

    def seconds(self, *, ranks: int, nodes: int) -> float:
        """The time that is looked back on, as if the job had always had this size."""
        process, node = self.process, self.node
        return max((sum(process.gaps) + process.since) / ranks, (sum(node.gaps) + node.since) / nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """How many steps lie between two saves, and why."""

    steps: int
    seconds: float
    cost_s: float
    num_failures: int
    hours: float

    @property
    def why(self) -> str:
        steps = "step" if self.steps == 1 else f"{self.steps} steps"
        failures = f"{self.num_failures or 'no'} failure{'' if self.num_failures == 1 else 's'}"
        return f"checkpoint every {steps} ({self.seconds:.1f} s): a save costs {self.cost_s:.2g} s, {failures} in {self.hours:.2g} h"

    def is_news(self, steps: int) -> bool:
        """Whether it is worth saying to those who know of an interval of so many steps."""
        return max(self.steps, steps) > _CHANGE * min(self.steps, steps)


def decide(costs: SaveCosts, history: History, *, ranks: int, nodes: int, max_share: float) -> Interval:
    """The interval that loses least, within bounds.

    Never shorter than a save takes to be written (saves do not overlap), nor than saves may cost.

    Args:
        max_share: of the time, that saves may cost.
    """
    cost_s = max(0.0, costs.cost_s)
    floor_s = max(MIN_S, costs.persist_s, cost_s * (1 - max_share) / max_share)
    best_s = min(best_seconds(cost_s, history.mtbf_s(ranks=ranks, nodes=nodes)), MAX_S)
    steps = max(1, round(best_s / costs.step_s), math.ceil(floor_s / costs.step_s))
    hours = history.seconds(ranks=ranks, nodes=nodes) / 3600
    return Interval(steps=steps, seconds=steps * costs.step_s, cost_s=cost_s, num_failures=history.num_failures, hours=hours)


def best_seconds(cost_s: float, mtbf_s: float) -> float:
    """Daly's formula, for the time between the end of one save and the beginning of the next; it holds where the cost is below twice M."""
    x = min(1.0, math.sqrt(cost_s / (2 * mtbf_s)))
    return 2 * mtbf_s * (x - 2 * x**2 / 3 + x**3 / 9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What is known of a run's saves and failures, and the interval in force. It outlives attempts, and coordinators."""

    history: History = field(default_factory=History)  # the running attempt left out
    costs: SaveCosts | None = None  # as last measured
    age_s: float = 0.0  # of the attempt that runs, by the clock of rank 0's node
    steps: int = 0  # in force; 0: nothing was measured yet
    soon: bool = True
    """The attempt before ended too early for a save at its interval, or there was none: this one saves at its first step, and then whenever
    it has gone twice as far, until that is its interval. So an attempt that lives long enough for one save leaves one behind."""

    def so_far(self, *, ranks: int, nodes: int) -> History:
        """With the attempt that runs."""
        return self.history.lived(self.age_s, ranks=ranks, nodes=nodes)

    def ended(self, kind: Kind | None, *, ranks: int, nodes: int, gained: int) -> Pace:
        """After an attempt that has committed `gained` steps. `kind` None: it was no failure."""
        history, soon = self.so_far(ranks=ranks, nodes=nodes), self.soon
        if kind is not None:
            history, soon = history.failed(kind), gained < max(self.steps, 1)
        return replace(self, history=history, soon=soon, age_s=0.0)

    def kept(self) -> dict[str, Any]:
        """What a successor must know, as JSON takes it; nothing where nothing is known."""
        known = replace(self, age_s=0.0, steps=0)
        if known == Pace():
            return {}
        process, node = self.history.process, self.history.node
        costs = asdict(self.costs) if self.costs else {}
        return {"process": _rounded(process), "node": _rounded(node), "costs": costs, "soon": self.soon}

    @staticmethod
    def restored(kept: Mapping[str, Any]) -> Pace:
        """Inverse of `kept`."""
        if not kept:
            return Pace()
        history = History(process=_exposure(kept["process"]), node=_exposure(kept["node"]))
        return Pace(history=history, costs=SaveCosts(**kept["costs"]) if kept["costs"] else None, soon=kept["soon"])


def _rounded(exposure: Exposure) -> list[float]:
    return [round(units, 1) for units in (*exposure.gaps, exposure.since)]


def _exposure(kept: Sequence[float]) -> Exposure:
    return Exposure(tuple(kept[:-1]), kept[-1])
