"""Every kind of fault on 4 ranks (2 nodes x 2): how soon it is noticed, how soon all ranks step again, and whether the right one is blamed.

    python benchmarks/faults.py                            20 trials of each kind (4 ranks x 5 seeds), results/faults.json
    python benchmarks/faults.py --trials 4 --only kill-rank hang-rank

Runs of recovery.toml take many faults one after the other, in an order drawn from the seed; each seed is a run of its own. A fault comes
at a random moment, once all ranks have finished 12 steps since the last one (more than the checkpoint interval). All clocks are the
machine's monotonic one: that of whoever inflicts the fault, of the coordinator that tells about it, and of the ranks that finish a step.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from common import Verdict, machine, median, parser, percentile, publish
from live import Live, RunBroke, make_folder
from recovery import Generation

from keepstep.orchestrator import cgroups, faultverdict
from keepstep.orchestrator.breaking import fault_points
from keepstep.orchestrator.chaos import in_groups, node_groups, on_hosts_of
from keepstep.orchestrator.conducting import Conductor
from keepstep.orchestrator.faultkinds import KINDS, AtStep, Fault
from keepstep.orchestrator.faultverdict import Judgement
from keepstep.orchestrator.lab import Lab
from keepstep.storage.steps import read_steps

RANKS = 4
STEPS_BETWEEN = 12
JITTER_S = 0.5  # a fault comes so long after the boundary at most: in any phase of a step
PAGES_PERIOD_S = 0.02  # shorter than any step
PATIENCE_S = 120.0
OUTAGE_S = 9.0  # of a lost host: longer than its lease and the fence
LEASE_S = 5.0
MAX_BROKEN = 8

CRASHES = ("kill-rank", "segfault-rank", "abort-rank", "raise-rank", "exit-rank", "leave-rank", "oom-rank")
HANGS = ("stop-rank", "hang-rank", "spin-rank")
NODES = ("kill-agent", "kill-node")
LOST_HOSTS = ("cut", "kill-host")
PROCESS_FAULTS = (*CRASHES, *HANGS, *NODES)
QUICK = ("kill-rank", "raise-rank", "stop-rank", "kill-node")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One trial."""

    kind: str
    seed: int
    rank: int
    noticed_s: float | None  # from the fault to the event that stops the attempt
    recovered_s: float | None  # from the fault to the moment at which every rank of the new attempt has finished a step
    redone: int | None  # steps; None: not seen
    right: bool
    wrong: str
    said: str
    load: float


class Trials:
    """The faults of one run, one after the other; those that were played are taken off the list."""

    def __init__(self, run: Live, seed: int, faults: list[Fault], results: Results) -> None:
        self._run = run
        self._seed = seed
        self._faults = faults
        self._results = results
        self._chance = random.Random(f"moments {seed}")
        self._conductor = Conductor((), run.config, run.scene, run.witness)

    async def play(self) -> None:
        try:
            while self._faults:
                await self._train_on()
                self._results.keep(await self._one(self._faults.pop(0)))
        finally:
            events = self._run.witness.events
            self._results.alarms += faultverdict.false_alarms(faultverdict.judge(self._conductor.episodes, events), events)
            await self._conductor.hang_up()

    async def _train_on(self) -> None:
        """12 steps further, and then some fraction of a step."""
        witness = self._run.witness
        if not await witness.until(lambda: witness.training, PATIENCE_S):
            raise RunBroke(f"it does not train, see {self._run.folder}")
        goal = witness.step + STEPS_BETWEEN
        if not await witness.until(lambda: witness.training and witness.step >= goal, PATIENCE_S):
            raise RunBroke(f"no {STEPS_BETWEEN} steps within {PATIENCE_S:g} s, see {self._run.folder}")
        await asyncio.sleep(self._chance.random() * JITTER_S)

    async def _one(self, fault: Fault) -> Row:
        generation, load = Generation(self._run.folder / "s"), os.getloadavg()[0]
        looking = asyncio.create_task(_watch(generation))
        try:
            episode = await self._conductor.play(fault)
            if episode is None:
                raise RunBroke(f"{self._conductor.failed[-1]}, see {self._run.folder}")
            await self._run.witness.until(lambda: generation.stepped_at is not None, 1.0)
        finally:
            looking.cancel()
        (judged,) = faultverdict.judge([episode], self._run.witness.events)
        return self._row(judged, generation, load)

    def _row(self, judged: Judgement, generation: Generation, load: float) -> Row:
        episode, stepped_at = judged.episode, generation.stepped_at
        return Row(
            kind=episode.fault.kind.name,
            seed=self._seed,
            rank=episode.fault.rank,
            noticed_s=_rounded(judged.noticed_s),
            recovered_s=_rounded(judged.stepped_s if stepped_at is None else stepped_at - episode.at_s),
            redone=None if stepped_at is None else generation.reached - generation.began_at_step,
            right=not judged.wrong,
            wrong=judged.wrong,
            said=judged.said,
            load=load,
        )


async def _watch(generation: Generation) -> None:
    while True:
        generation.look()
        await asyncio.sleep(PAGES_PERIOD_S)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def order(kinds: Sequence[str], ranks: Sequence[int], seed: int) -> list[Fault]:
    """Each kind on each rank once, mixed."""
    lasting = dict.fromkeys(LOST_HOSTS, OUTAGE_S)
    faults = [Fault(kind=KINDS[kind], moment=AtStep(1), rank=rank, lasting_s=lasting.get(kind)) for kind in kinds for rank in ranks]
    random.Random(f"order {seed}").shuffle(faults)
    return faults


def on_processes(faults: list[Fault], seed: int, results: Results) -> Live:
    """One run whose nodes are processes."""
    run = Live(make_folder())
    with node_groups(() if cgroups.missing() else ("node0", "node1")) as groups:
        run.scene = replace(run.scene, groups=groups)
        run.run(Trials(run, seed, faults, results).play, faults=fault_points(run.triggers), place=in_groups(groups))
    return run


def on_hosts(faults: list[Fault], seed: int, results: Results) -> Live:
    """One run on hosts in network namespaces, with a spare: what is cut off comes back later."""
    folder = make_folder()
    with Lab(3, shared=(folder,)) as lab:
        hosts = {f"node{i}": host for i, host in enumerate(lab.hosts)}
        run = Live(folder, "cluster.spares=1", f"cluster.listen={lab.gateway}:0")
        run.scene = replace(run.scene, hosts=hosts)
        run.run(Trials(run, seed, faults, results).play, place=on_hosts_of(hosts))
    return run


# The table.


def target_of(kind: str, step_p99_s: float) -> float:
    """Seconds within which it must be noticed."""
    if kind in CRASHES:
        return 0.2
    if kind in NODES:
        return 1.0
    return max(5.0, 5 * step_p99_s) if kind in HANGS else LEASE_S + 3.0


def summary(rows: Sequence[Row], step_p99_s: float) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(row.kind for row in rows):
        mine = [row for row in rows if row.kind == kind]
        noticed = [row.noticed_s for row in mine if row.noticed_s is not None]
        recovered = [row.recovered_s for row in mine if row.recovered_s is not None]
        redone = [row.redone for row in mine if row.redone is not None]
        table[kind] = {
            "trials": len(mine),
            "noticed": len(noticed),
            "noticed_median_s": median(noticed),
            "noticed_p95_s": percentile(noticed, 0.95),
            "target_s": round(target_of(kind, step_p99_s), 2),
            "recovered": len(recovered),
            "recovered_median_s": median(recovered),
            "recovered_p95_s": percentile(recovered, 0.95),
            "redone_median": median(redone),
            "right": sum(row.right for row in mine),
        }
    return table


def markdown(table: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| fault | trials | noticed after s: median | p95 | target | all ranks step again after s: median | p95 | redone | culprit right |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, line in table.items():
        cells = [line["noticed_median_s"], line["noticed_p95_s"], line["target_s"], line["recovered_median_s"], line["recovered_p95_s"]]
        seconds = " | ".join("-" if cell is None else f"{cell:.2f}" for cell in cells)
        redone = "-" if line["redone_median"] is None else f"{line['redone_median']:g}"
        lines.append(f"| {kind} | {line['trials']} | {seconds} | {redone} | {line['right']} of {line['trials']} |")
    rights, trials = sum(line["right"] for line in table.values()), sum(line["trials"] for line in table.values())
    return "\n".join([*lines, f"\nculprit right in {rights} of {trials} ({100 * rights / max(1, trials):.1f} %)"])


def step_seconds(run: Live) -> list[float]:
    """How long rank 0 says that its steps took."""
    return [float(record["seconds"]) for records in read_steps(run.store).values() for record in records]


class Results:
    """Written after every trial: an interrupted benchmark has shown what it saw."""

    def __init__(self) -> None:
        self._began, self._began_on = time.monotonic(), machine()
        self.rows: list[Row] = []
        self.alarms: list[str] = []  # failures that nobody inflicted
        self.broken: list[str] = []  # runs that did not go on
        self.steps: list[float] = []

    @property
    def table(self) -> dict[str, dict[str, Any]]:
        return summary(self.rows, percentile(self.steps, 0.99) or 0.0)

    def keep(self, row: Row) -> None:
        print(f"{row.kind} rank {row.rank}: noticed {row.noticed_s} s, recovered {row.recovered_s} s, {row.wrong or 'right'}", flush=True)
        self.rows.append(row)
        self.write()

    def write(self, *, final: bool = False) -> None:
        measured = {
            "minutes": round((time.monotonic() - self._began) / 60, 1),
            "step_p99_s": percentile(self.steps, 0.99),
            "false_alarms": self.alarms,
            "broken_runs": self.broken,
            "summary": self.table,
            "rows": [asdict(row) for row in self.rows],
        }
        publish("faults", self.verdicts() if final else (), measured, began_on=self._began_on)

    def verdicts(self) -> list[Verdict]:
        """All kinds together; the table beside it has each."""
        late = [kind for kind, line in self.table.items() if (line["noticed_p95_s"] or math.inf) > line["target_s"]]
        right, trials = sum(row.right for row in self.rows), len(self.rows)
        recovered = sum(row.recovered_s is not None for row in self.rows)
        kinds = f"{len(self.table) - len(late)} of {len(self.table)} kinds within their target"
        return [
            Verdict(what="faults noticed in time", target="p95 of each kind", result=kinds, met=not late, note=", ".join(late)),
            Verdict(what="faults recovered from", target="all", result=f"{recovered} of {trials}", met=recovered == trials),
            Verdict(what="culprit named right", target="all", result=f"{right} of {trials}", met=right == trials),
            Verdict(what="failures that nobody inflicted", target="0", result=str(len(self.alarms)), met=not self.alarms),
        ]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--trials", type=int, default=20, help="of each kind: 4 ranks x so many seeds; the last seed may be cut short")
    made.add_argument("--host-trials", type=int, default=8, help="of each way to lose a host (needs root)")
    made.add_argument("--only", nargs="+", choices=[*PROCESS_FAULTS, *LOST_HOSTS], default=[*PROCESS_FAULTS, *LOST_HOSTS])
    options = made.parse_args()
    trials, host_trials, only = (1, 0, QUICK) if options.quick else (options.trials, options.host_trials, options.only)
    results = Results()
    for way, kinds, number in ((on_processes, PROCESS_FAULTS, trials), (on_hosts, LOST_HOSTS, host_trials)):
        wanted = possible([kind for kind in kinds if kind in only])
        for seed in range(-(-number // RANKS) if wanted else 0):
            ranks = range(min(RANKS, number - seed * RANKS))
            faults = order(wanted, ranks, seed)
            while faults and len(results.broken) < MAX_BROKEN:
                one_run(way, faults, seed, results)
    print(markdown(results.table))
    print(f"{len(results.alarms)} false alarms, {len(results.broken)} runs that did not go on")
    results.write(final=True)


def one_run(way: Callable[[list[Fault], int, Results], Live], faults: list[Fault], seed: int, results: Results) -> None:
    """Plays faults of the list until it is empty or the run breaks, which says something, too."""
    try:
        run = way(faults, seed, results)
    except RunBroke as error:
        print(f"a run broke: {error}", flush=True)
        results.broken.append(str(error))
        return
    results.steps += step_seconds(run)
    shutil.rmtree(run.folder, ignore_errors=True)


def possible(kinds: Sequence[str]) -> list[str]:
    """Without what this machine cannot do, which is said."""
    whys = {"oom-rank": cgroups.missing(), **dict.fromkeys(LOST_HOSTS, Lab.missing())}
    for kind in kinds:
        if whys.get(kind):
            print(f"{kind} is left out: {whys[kind]}", flush=True)
    return [kind for kind in kinds if not whys.get(kind)]


if __name__ == "__main__":
    main()
