"""The interval that chooses itself against fixed ones, under Poisson faults.

    python benchmarks/interval.py              everything, results/interval.json
    python benchmarks/interval.py --virtual    in virtual time alone, with the costs of the last results

First a real run on 4 ranks (2 x 2) says what a step, a save and a restart cost here. With these, thousands of hours are played in virtual
time, by the functions that decide in a real run: how far the interval is from the best fixed one after ten faults (the best is known
exactly: a sweep over the expected goodput), and what it gains against a quarter, once and four times that. Then real runs are killed by the
same Poisson process, with a mean of 15 s, one that chooses its interval and some whose interval is fixed: does the model tell how far they
come?
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from common import RESULTS, Verdict, machine, median, parser, percentile, progress_pages, publish, spread
from live import Live, RunBroke, make_folder
from recovery import Generation
from rich.console import Console
from rich.table import Table

from keepstep.orchestrator.conducting import Conductor
from keepstep.orchestrator.faultkinds import KINDS, AtStep, Fault
from keepstep.orchestrator.interval import Pace, decide
from keepstep.storage.runlog import RunLog
from keepstep.trainer.cadence import Auto, Cadence
from keepstep.trainer.config import CheckpointSection
from keepstep.trainer.contract import Pacing, SaveCosts

RANKS, NODES = 4, 2
MEAN_S: Final = 60.0
REAL_MEAN_S: Final = 15.0
HOURS: Final = 10.0  # of one life in virtual time
SHARE: Final = CheckpointSection().max_overhead
FACTORS: Final = (0.25, 1.0, 4.0)
PATIENCE_S: Final = 60.0
LOOK_S: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a simulated run is made of."""

    costs: SaveCosts
    restart_s: float  # from a fault to the beginning of the first step
    mean_s: float  # between faults


@dataclass(slots=True, kw_only=True)
class Life:
    """How far a run has come."""

    committed: int = 0
    faults: int = 0
    intervals: list[int] = field(default_factory=list)  # in force when each attempt began

    def goodput(self, job: Job, seconds: float) -> float:
        return self.committed * job.costs.step_s / seconds


# In virtual time.


def poisson(mean_s: float, seed: int) -> Iterator[float]:
    """The instants of faults."""
    chance = random.Random(seed)
    now = 0.0
    while True:
        now += chance.expovariate(1 / mean_s)
        yield now


def live(
    job: Job,
    faults: Iterator[float],
    *,
    until_s: float = math.inf,
    until_faults: float = math.inf,
    fixed: int = 0,
    known: Pace | None = None,
) -> Life:
    """Plays a run; `fixed`: steps between its saves, 0: it decides itself; `known`: what it knows by then."""
    life, pace, now = Life(), known or Pace(), 0.0
    while now < until_s and life.faults < until_faults:
        fault = next(faults)
        resumed = life.committed
        pace = _attempt(job, life, pace, lasts_s=min(fault, until_s) - now, fixed=fixed)
        pace = pace.ended("process", ranks=RANKS, nodes=NODES, gained=life.committed - resumed)
        life.faults, now = life.faults + 1, fault
    if pace.costs:
        life.intervals.append(_decided(pace).steps)
    return life


def _attempt(job: Job, life: Life, pace: Pace, *, lasts_s: float, fixed: int) -> Pace:
    costs, age_s, pace = job.costs, job.restart_s, replace(pace, age_s=0.0, steps=0)
    cadence = Cadence(interval=Auto(), saved_step=0, saved_at=0.0).began(life.committed, 0.0)
    while age_s < lasts_s:
        if not fixed and pace.costs:
            pace = _decided(replace(pace, age_s=age_s))
        steps = max(fixed or cadence.gap(Pacing(pace.steps, pace.soon)), math.ceil(costs.persist_s / costs.step_s))
        staged_s = age_s + steps * costs.step_s + costs.stall_s
        if staged_s + costs.persist_s > lasts_s:
            break
        cadence = cadence.saved(cadence.saved_step + steps, 0.0)
        life.committed, age_s, pace = cadence.saved_step, staged_s + costs.drag_s, replace(pace, costs=costs)
    return replace(pace, age_s=lasts_s)


def _decided(pace: Pace) -> Pace:
    assert pace.costs
    found = decide(pace.costs, pace.so_far(ranks=RANKS, nodes=NODES), ranks=RANKS, nodes=NODES, max_share=SHARE)
    return replace(pace, steps=found.steps) if not pace.steps or found.is_news(pace.steps) else pace


def expected_goodput(job: Job, steps: int) -> float:
    """Of a fixed interval, exactly: an attempt lives as long as the exponential distribution says, and loses what is not durable."""
    costs = job.costs
    each_s = steps * costs.step_s + costs.cost_s
    first_s = job.restart_s + steps * costs.step_s + costs.stall_s + costs.persist_s
    saves = math.exp(-first_s / job.mean_s) / -math.expm1(-each_s / job.mean_s)  # that an attempt lives to see durable
    return steps * costs.step_s * saves / job.mean_s


def best_fixed(job: Job) -> int:
    """Steps: the best of all that can be had."""
    fewest = max(1, math.ceil(job.costs.persist_s / job.costs.step_s))
    most = fewest + math.ceil(job.mean_s / job.costs.step_s)
    return max(range(fewest, most), key=lambda steps: expected_goodput(job, steps))


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A job in virtual time, many seeds."""

    job: Job
    best_steps: int
    after_ten: list[float]  # the interval as a multiple of the best fixed one, each seed
    goodput: dict[str, list[float]]  # "auto", and multiples of the best fixed one, each seed

    @property
    def behind(self) -> float:
        """Points of goodput, against the best of the fixed ones."""
        means = {name: sum(values) / len(values) for name, values in self.goodput.items()}
        return 100 * (max(value for name, value in means.items() if name != "auto") - means["auto"])

    @property
    def near(self) -> float:
        return sum(abs(ratio - 1) <= 0.25 for ratio in self.after_ten) / len(self.after_ten)


def play(job: Job, *, seeds: int, hours: float) -> Played:
    best = best_fixed(job)
    tenth = [live(job, poisson(job.mean_s, seed), until_faults=10).intervals[-1:] or [0] for seed in range(10 * seeds)]
    goodput: dict[str, list[float]] = {name: [] for name in ("auto", *(f"{factor:g} x" for factor in FACTORS))}
    for seed in range(seeds):
        for name, fixed in (("auto", 0), *((f"{factor:g} x", max(1, round(factor * best))) for factor in FACTORS)):
            life = live(job, poisson(job.mean_s, seed), until_s=hours * 3600, fixed=fixed)
            goodput[name].append(life.goodput(job, hours * 3600))
    return Played(job=job, best_steps=best, after_ten=[steps / best for (steps,) in tenth], goodput=goodput)


def jobs(here: Job) -> dict[str, tuple[Job, float]]:
    """By name; with the hours that one life lasts."""
    large = SaveCosts(step_s=8.0, stall_s=1.0, drag_s=3.0, persist_s=60.0)
    return {
        f"here, a fault per {here.mean_s:g} s": (here, HOURS),
        "here, a fault per 15 s": (replace(here, mean_s=15.0), HOURS),
        "here, a fault per hour": (replace(here, mean_s=3600.0), 10 * HOURS),
        "a step of 8 s, a save of 4 s (60 s to write), a fault per 3 h": (Job(costs=large, restart_s=120.0, mean_s=10800.0), 50 * HOURS),
    }


# For real.


@dataclass(frozen=True, slots=True, kw_only=True)
class Real:
    """One run that was killed now and then."""

    interval: int | str
    seconds: float  # since it trained and, where that matters, knew what its saves cost
    faults: list[float]  # instants, counted from there
    restarts: list[float]  # s, from a fault to the first step finished by all
    committed: int  # steps, in that time
    costs: SaveCosts | None
    said: list[str]  # about its interval


class Killed:
    """A run of recovery.toml under SIGKILLs of random ranks."""

    def __init__(self, interval: int | str, seconds: float, faults: Sequence[float], seed: int) -> None:
        self.run = Live(make_folder(), f"checkpoint.interval={interval}")
        self._interval, self._seconds, self._planned = interval, seconds, faults
        self._chance = random.Random(f"ranks {seed}")
        self._conductor = Conductor((), self.run.config, self.run.scene, self.run.witness)
        self._is_fixed = isinstance(interval, int)  # then nobody needs to know what a save costs; one at every step leaves no usual step
        self._costs: SaveCosts | None = None
        self._faults: list[float] = []
        self._restarts: list[float] = []
        self.real: Real | None = None

    async def play(self) -> None:
        looking = asyncio.create_task(self._look())
        try:
            witness = self.run.witness
            if not await witness.until(lambda: witness.training and (self._is_fixed or self._costs is not None), PATIENCE_S):
                raise RunBroke(f"it measured nothing, see {self.run.folder}")
            began_at, first = time.monotonic(), self._committed()
            for planned_s in self._planned:
                await asyncio.sleep(max(0.0, began_at + planned_s - time.monotonic()))
                await self._kill(began_at)
            await asyncio.sleep(max(0.0, began_at + self._seconds - time.monotonic()))
            self.real = self._read(time.monotonic() - began_at, first)
        finally:
            looking.cancel()
            await self._conductor.hang_up()

    async def _kill(self, began_at: float) -> None:
        """A fault that falls into a restart comes when that is over."""
        generation = Generation(self.run.folder / "s")
        fault = Fault(kind=KINDS["kill-rank"], moment=AtStep(1), rank=self._chance.randrange(RANKS))
        episode = await self._conductor.play(fault)
        if episode is None:
            raise RunBroke(f"{self._conductor.failed[-1]}, see {self.run.folder}")
        self._faults.append(episode.at_s - began_at)
        until = time.monotonic() + PATIENCE_S
        while generation.stepped_at is None and time.monotonic() < until:
            generation.look()
            await asyncio.sleep(0.02)
        if generation.stepped_at is None:
            raise RunBroke(f"it did not recover, see {self.run.folder}")
        self._restarts.append(generation.stepped_at - episode.at_s)

    async def _look(self) -> None:
        """At what rank 0 has measured."""
        while True:
            for path, content in progress_pages(self.run.folder / "s"):
                if path.name.endswith("-0"):
                    self._costs = SaveCosts.read(content) or self._costs
            await asyncio.sleep(LOOK_S)

    def _committed(self) -> int:
        commit = RunLog.open(self.run.store).lineage.newest_committed()
        return commit.step if commit else 0

    def _read(self, seconds: float, first: int) -> Real:
        said = [event["why"] for event in self.run.witness.events if event["kind"] == "interval"]
        return Real(
            interval=self._interval,
            seconds=round(seconds, 3),
            faults=self._faults,
            restarts=self._restarts,
            committed=self._committed() - first,
            costs=self._costs,
            said=said,
        )


def kill(interval: int | str, seconds: float, faults: Sequence[float], seed: int = 1) -> Real:
    killed = Killed(interval, seconds, faults, seed)
    killed.run.run(killed.play)
    assert killed.real
    shutil.rmtree(killed.run.folder, ignore_errors=True)
    return killed.real


def predicted(real: Real, job: Job) -> int:
    """The steps that the model says are committed in that time."""
    fixed = real.interval if isinstance(real.interval, int) else 0
    restart_s = max(0.0, (median(real.restarts) or 0.0) - job.costs.step_s)
    faults = (restart_s + at for at in (*real.faults, math.inf))  # the model's first attempt begins with a start, this one trained already
    known = Pace(costs=job.costs, soon=False)
    return live(replace(job, restart_s=restart_s), faults, until_s=restart_s + real.seconds, fixed=fixed, known=known).committed


# The results.


def verdicts_of(played: Played, reals: Sequence[tuple[Real, int]]) -> list[Verdict]:
    middle = median(played.after_ten) or 0.0
    low, high = percentile(played.after_ten, 0.1), percentile(played.after_ten, 0.9)
    each = ", ".join(f"{name} {100 * sum(values) / len(values):.1f} %" for name, values in played.goodput.items())
    cost_s = played.job.costs.cost_s
    verdicts = [
        Verdict(
            what=f"interval after ten faults, mean {played.job.mean_s:g} s (virtual time, a save costs {cost_s:.3f} s)",
            target="within 25 % of the best fixed one",
            result=f"{middle:.2f} x the best, {played.best_steps} steps (80 % of {len(played.after_ten)} seeds: {low:.2f} to {high:.2f})",
            met=abs(middle - 1) <= 0.25,
            note=f"{100 * played.near:.0f} % of seeds are within 25 %; ten faults tell their rate within a third",
        ),
        Verdict(
            what=f"goodput, mean {played.job.mean_s:g} s (virtual time)",
            target="within 2 points of the best of 1/4, 1, 4 x",
            result=f"{played.behind:.2f} points behind ({each})",
            met=played.behind <= 2,
        ),
    ]
    if reals:
        off = [100 * abs(real.committed - model) / max(1, model) for real, model in reals]
        result = "; ".join(f"{real.interval}: {real.committed} steps, model {model}" for real, model in reals)
        verdicts.append(
            Verdict(what="real runs against the model, SIGKILLs", target="-", result=result, met=None, note=f"off by {spread(off, '%', 1)}")
        )
    return verdicts


def table_of(played: dict[str, Played]) -> Table:
    table = Table("job", "best fixed", "after ten faults", "within 25 %", *next(iter(played.values())).goodput, "points behind")
    for name, each in played.items():
        goodput = [f"{100 * sum(values) / len(values):.1f} %" for values in each.goodput.values()]
        after = spread(each.after_ten, "x")
        table.add_row(name, f"{each.best_steps} steps", after, f"{100 * each.near:.0f} %", *goodput, f"{each.behind:.2f}")
    return table


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--virtual", action="store_true", help="no real run: the costs are those of the last results")
    options = arguments.parse_args()
    began_on, seconds = machine(), 12.0 if options.quick else 45.0
    reals: list[tuple[Real, int]] = []
    if options.virtual:
        here = json.loads((RESULTS / "interval.json").read_text())["measured"]["here"]
        job = Job(costs=SaveCosts(**here["costs"]), restart_s=here["restart_s"], mean_s=MEAN_S)
    else:
        faults = list(itertools.takewhile(lambda at: at < seconds - 2, poisson(REAL_MEAN_S / (2 if options.quick else 1), seed=4)))
        first = kill("auto", seconds, faults)
        assert first.costs
        job = Job(costs=first.costs, restart_s=max(0.0, (median(first.restarts) or 1.0) - first.costs.step_s), mean_s=MEAN_S)
        best = best_fixed(replace(job, mean_s=REAL_MEAN_S))
        others = [] if options.quick else [kill(max(1, round(factor * best)), seconds, faults) for factor in FACTORS]
        reals = [(real, predicted(real, job)) for real in (first, *others)]
    played = {
        name: play(each, seeds=4 if options.quick else 15, hours=hours / (4 if options.quick else 1))
        for name, (each, hours) in jobs(job).items()
    }
    Console(width=180).print(table_of(played))
    measured: dict[str, Any] = {
        "here": {"costs": asdict(job.costs), "restart_s": round(job.restart_s, 3)},
        "real": [asdict(real) | {"predicted": model} for real, model in reals],
        "virtual": {name: asdict(each) for name, each in played.items()},
    }
    publish("interval", verdicts_of(next(iter(played.values())), reals), measured, began_on=began_on)


if __name__ == "__main__":
    main()
