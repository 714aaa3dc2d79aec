"""A coordinator's death is a non-event: one run whose coordinators are killed thirty times, beside the same run left alone.

    python benchmarks/coordinator_kills.py                        results/coordinator_kills.json; exit code 1 where a promise was broken
    python benchmarks/coordinator_kills.py --kills 5 --steps 800  a look

Kills with SIGKILL: at any moment; in the middle of a commit; in the middle of a restart decision, for which a rank is killed; while the
successor of one that was just killed starts. All ranks write (step, time.monotonic()) into their progress pages, which this script reads.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common import HERE, Verdict, machine, parser, percentile, publish
from recovery import pages

from keepstep.orchestrator.archive import read_result
from keepstep.orchestrator.errors import InputError
from keepstep.orchestrator.processes import command_line, is_alive
from keepstep.orchestrator.viewing import read_status
from keepstep.storage.faults import ENV_FAULTS
from keepstep.storage.records import Opened
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store

NODES, RANKS = 2, 4
PATIENCE_S = 600.0
POLL_S = 0.005
# A small model: steps of some tens of milliseconds, so that a pause would be seen.
SMALL = ("model.layers=2", "model.width=64", "model.heads=2", "model.context=64", "train.batch_tokens=512", "checkpoint.interval=20")
PATIENT = ("cluster.backoff_s=0.05", "cluster.max_failures=1000", "cluster.strikes=1000")
POINTS = {
    "commit": ("coordinator.manifest.before", "coordinator.manifest.after", "coordinator.commit.before", "coordinator.commit.after"),
    "restart decision": ("coordinator.attempt.before", "coordinator.attempt.after"),
}
MOMENTS = ("any moment", "any moment", "commit", "restart decision", "while starting")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One coordinator's death, and what the ranks made of it."""

    moment: str
    point: str  # "" where no fault point was armed
    succeeded_s: float  # from the death to the successor's term in the log
    longest_gap_s: float | None  # between two finished steps of the slowest rank meanwhile; None where a rank was killed, too
    same_ranks: bool | None  # by pid; None where a rank was killed, too


@dataclass(slots=True)
class Steps:
    """Finished steps of the slowest rank of the newest attempt, and when they were finished."""

    folder: Path
    finished: list[tuple[str, int, float]] = field(default_factory=list)  # (attempt, step, monotonic)

    def look(self) -> None:
        newest: dict[str, list[tuple[int, float]]] = {}
        for path, page in pages(self.folder).items():
            newest.setdefault(path.name.split("-")[1], []).append((page.step, page.at))
        if not newest or len(ranks := newest[attempt := max(newest)]) < RANKS:
            return
        step, at = min(ranks)
        if any(at <= 0 for _, at in ranks):
            return  # a page that is being made or written
        if not self.finished or self.finished[-1][:2] != (attempt, step):
            self.finished.append((attempt, step, at))

    def gaps(self, first: int = 0) -> list[float]:
        """Seconds per step, from entry `first` on; never across a restart. A look that missed a step counts its gap once."""
        pairs = zip(self.finished[first:], self.finished[first + 1 :], strict=False)
        return [after[2] - before[2] for before, after in pairs if before[0] == after[0] and after[1] > before[1] > 0]


class Running:
    """`keepstep run` on 2 x 2 ranks as a child of ours."""

    def __init__(self, folder: Path, steps: int, faults: str = "") -> None:
        self.folder, self.root = folder, folder / "root"
        self.store = Store.open(str(self.root))
        self.steps = Steps(folder / "s")
        overrides = (f"run.root={self.root}", f"run.steps={steps}", f"cluster.nodes={NODES}", "cluster.ranks_per_node=2", *SMALL, *PATIENT)
        command = [sys.executable, "-m", "keepstep.orchestrator.cli", "run", str(HERE / "recovery.toml")]
        environment = {**os.environ, "KEEPSTEP_SCRATCH_BASE": str(folder / "s"), "OMP_NUM_THREADS": "1", ENV_FAULTS: faults}
        os.environ["KEEPSTEP_SCRATCH_BASE"] = str(folder / "s")
        with (folder / "output.log").open("wb") as log:
            arguments = [word for override in overrides for word in ("-o", override)]
            self.process = subprocess.Popen([*command, *arguments], stdout=log, stderr=log, env=environment)

    def watch_until(self, holds: Callable[[], bool], what: str) -> None:
        """Looks at the ranks' steps meanwhile. Leaves with a message when it does not come to that."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise SystemExit(f"it never came to that: {what}; see {self.folder}/output.log")
            self.steps.look()
            time.sleep(POLL_S)

    def terms(self) -> int:
        return sum(isinstance(record, Opened) for record in RunLog.open(self.store).records)

    def coordinator(self) -> int | None:
        """Its pid, in whatever state it is."""
        for entry in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            if " coordinator " in command_line(int(entry)) and is_alive(int(entry)):
                return int(entry)
        return None

    def ranks(self) -> list[int]:
        """Pids of the attempt's ranks, as the coordinator knows them; none while there is no coordinator to ask."""
        try:
            status = read_status(str(self.root))
        except InputError:
            return []
        return sorted(rank["pid"] for node in status["nodes"] for rank in node["ranks"] if rank["phase"] != "exited")

    def end(self) -> Mapping[str, Any]:
        """Lets it finish; its result."""
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None and time.monotonic() < deadline:
            self.steps.look()
            time.sleep(POLL_S)
        if self.process.poll() != 0:
            raise SystemExit(f"the run ended with {self.process.poll()}, see {self.folder}/output.log")
        return read_result(self.store) or {}


@dataclass(frozen=True, slots=True)
class Killer:
    run: Running
    triggers: Path
    chance: random.Random

    def kill(self, moment: str) -> Kill:
        """One death, and the successor's term."""
        run = self.run
        run.watch_until(lambda: len(run.steps.gaps()) > 0 and len(run.ranks()) == RANKS, "all ranks run")
        first, ranks = len(run.steps.finished), run.ranks()
        deadline = time.monotonic() + self.chance.uniform(0.1, 1.5)
        run.watch_until(lambda: time.monotonic() > deadline, "a random moment")
        point = self.chance.choice(POINTS.get(moment, ("",)))
        victim, terms = run.coordinator(), run.terms()
        assert victim
        if point:
            (self.triggers / point).touch()
        if moment == "restart decision":
            os.kill(self.chance.choice(ranks), signal.SIGKILL)
        elif not point:
            os.kill(victim, signal.SIGKILL)
        run.watch_until(lambda: not is_alive(victim), f"the coordinator dies at {point or moment}")
        died_at = time.monotonic()
        if moment == "while starting":
            self._kill_newborn(victim)
        run.watch_until(lambda: run.terms() > terms, "a successor opens a term")
        succeeded_s = time.monotonic() - died_at
        run.watch_until(lambda: time.monotonic() > died_at + succeeded_s + 0.5 and len(run.ranks()) == RANKS, "it settles")
        alone = moment != "restart decision"
        return Kill(
            moment=moment,
            point=point,
            succeeded_s=round(succeeded_s, 3),
            longest_gap_s=round(max(run.steps.gaps(max(0, first - 1)), default=0.0), 4) if alone else None,
            same_ranks=run.ranks() == ranks if alone else None,
        )

    def _kill_newborn(self, dead: int) -> None:
        run = self.run
        run.watch_until(lambda: run.coordinator() not in (None, dead), "its successor is started")
        newborn, deadline = run.coordinator(), time.monotonic() + self.chance.uniform(0.0, 1.0)
        run.watch_until(lambda: time.monotonic() > deadline, "a random moment of its start")
        assert newborn
        with contextlib.suppress(ProcessLookupError):
            os.kill(newborn, signal.SIGKILL)
        run.watch_until(lambda: not is_alive(newborn), "the newborn dies")


def undisturbed(steps: int) -> tuple[Mapping[str, Any], list[float]]:
    """Result, and seconds between steps."""
    run = Running(_folder(), steps)
    return run.end(), run.steps.gaps()


def disturbed(steps: int, kills: int, seed: int) -> tuple[Mapping[str, Any], list[Kill]]:
    folder = _folder()
    triggers = folder / "triggers"
    triggers.mkdir()
    points = [point for names in POINTS.values() for point in names]
    run = Running(folder, steps, ";".join(f"{point}:when={triggers / point}" for point in points))
    killer = Killer(run, triggers, random.Random(seed))
    rows = []
    for number in range(kills):
        rows.append(killer.kill(MOMENTS[number % len(MOMENTS)]))
        print(f"kill {number + 1}: {rows[-1]}", flush=True)
    return run.end(), rows


def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="ks-bench-"))


def verdicts(calm: Mapping[str, Any], result: Mapping[str, Any], rows: Sequence[Kill]) -> list[Verdict]:
    decisions = sum(row.moment == "restart decision" for row in rows)
    attempts = int(result["attempts"]) - 1
    alone = [row.same_ranks for row in rows if row.same_ranks is not None]
    same, equal = sum(alone), calm["state_sha256"] == result["state_sha256"]
    words = f"{attempts} for {decisions} killed ranks"
    return [
        Verdict(what="coordinators killed: final state", target="same hash", result="equal" if equal else "DIFFERS", met=equal),
        Verdict(what="... ranks that live on", target="all", result=f"in {same} of {len(alone)}", met=same == len(alone)),
        Verdict(what="... attempts added", target="one per killed rank", result=words, met=attempts == decisions),
    ]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--kills", type=int, default=30, help="a successor that is killed in its start is not counted")
    made.add_argument("--steps", type=int, default=6000, help="of both runs; the kills must fit into them")
    made.add_argument("--seed", type=int, default=1)
    options = made.parse_args()
    kills, steps = (2, 400) if options.quick else (options.kills, options.steps)
    began_on = machine()
    result, rows = disturbed(steps, kills, options.seed)
    calm, calm_gaps = undisturbed(steps)
    gaps = [row.longest_gap_s for row in rows if row.longest_gap_s is not None]
    summary = {
        "deaths": len(rows) + sum(row.moment == "while starting" for row in rows),  # two each where the successor died in its start
        "undisturbed gap p50, p99 s": [percentile(calm_gaps, share) for share in (0.5, 0.99)],
        "longest gap while a coordinator was dead, median and longest s": [percentile(gaps, share) for share in (0.5, 1.0)],
        "successor's term after, median and longest s": [percentile([row.succeeded_s for row in rows], share) for share in (0.5, 1.0)],
    }
    print(json.dumps(summary, indent=1))
    measured = {"summary": summary, "rows": [asdict(row) for row in rows]}
    publish("coordinator_kills", verdicts(calm, result, rows), measured, began_on=began_on)


if __name__ == "__main__":
    main()
