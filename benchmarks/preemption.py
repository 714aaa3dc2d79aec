"""Nodes that are taken away with notice, on 4 nodes of one rank each: steps lost, commits intact, seconds from the notice to the commit.

    python benchmarks/preemption.py                                              60 runs, results/preemption.json
    python benchmarks/preemption.py --runs 2 --graces 2 --nodes two --workers 2  a look

In every run one, two or all nodes get SIGTERM or SIGUSR1 at once, at a random step. When the grace is over, whatever is
left of them is killed, as a platform does. With spares the run goes on; without them it must end with 75, and the same command is started
again. The end is compared with that of an undisturbed run, bit by bit: the state's hash and all losses.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import HERE, Verdict, machine, median, parser, percentile, publish
from recovery import RANKS, Generation, keepstep

from keepstep.orchestrator.archive import read_events, read_result
from keepstep.storage.errors import StorageError
from keepstep.storage.runlog import RunLog
from keepstep.storage.steps import read_steps
from keepstep.storage.store import Store
from keepstep.storage.verify import verify_checkpoint
from keepstep.trainer.contract import ENV_GRACE, EXIT_OK, EXIT_REQUEUE

STEPS = 120
NOTICE_STEPS = (25, 60)  # the notice comes after a step between these
GRACES_S = (2.0, 5.0, 15.0)
NOTICED = {"one": 1, "two": 2, "all": RANKS}
WORKERS = (0, 2)
DEADLOCK_S = 180.0  # a run that has not ended so long after its notice never will
POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Case:
    grace_s: float
    nodes: str  # of NOTICED
    workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run."""

    grace_s: float
    nodes: str
    workers: int
    signal: str
    step: int  # that all ranks had finished at the notice
    commit_s: float | None  # from the notice to the next commit; None: there was none within the grace
    gone_s: float | None  # from the notice to the end of the last agent that got one; None: it had to be killed
    lost_steps: int
    is_intact: bool  # the newest commit was verified when the nodes had gone, and the end has the bits of an undisturbed run
    is_deadlock: bool
    load: float  # of the machine at the notice


@dataclass(frozen=True, slots=True)
class Ending:
    state_sha256: str
    losses: tuple[str, ...]  # float.hex(), by step


class Trial:
    """One root, and the command that is started on it as often as a platform would."""

    def __init__(self, folder: Path, case: Case, *, spares: int) -> None:
        self.folder, self.case, self._spares = folder, case, spares
        self._root = str(folder / "root")
        self._process: subprocess.Popen[bytes] | None = None
        self.generation = Generation(folder)

    @property
    def store(self) -> Store:
        return Store.open(self._root)

    def start(self) -> None:
        cluster = f"nodes={RANKS}", "ranks_per_node=1", f"spares={self._spares}"
        keys = (
            f"run.root={self._root}",
            f"run.steps={STEPS}",
            f"train.loader_workers={self.case.workers}",
            *(f"cluster.{k}" for k in cluster),
        )
        command = keepstep("run", str(HERE / "recovery.toml"), *(word for key in keys for word in ("-o", key)))
        variables = {"OMP_NUM_THREADS": "1", "KEEPSTEP_SCRATCH_BASE": str(self.folder / "s"), ENV_GRACE: str(self.case.grace_s)}
        with (self.folder / "output.log").open("ab") as output:
            self._process = subprocess.Popen(
                command, env={**os.environ, **variables}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self) -> int | None:
        """The exit code; None: it had to be killed."""
        assert self._process
        try:
            return self._process.wait(DEADLOCK_S)
        except subprocess.TimeoutExpired:
            self.stop()
            return None

    def stop(self) -> None:
        """All of a local run's processes die with the one that plays the platform."""
        if self._process and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def wait_for_step(self, step: int) -> int:
        """The step that all ranks have finished."""
        deadline = time.monotonic() + DEADLOCK_S
        while self.generation.slowest < step:
            if time.monotonic() > deadline:
                raise SystemExit(f"no step {step} within {DEADLOCK_S:.0f} s, see {self.folder}")
            time.sleep(POLL_S)
            self.generation.look()
        return self.generation.slowest

    def agents(self) -> list[int]:
        """Pids of the agents whose nodes run ranks."""
        opened = RunLog.open(self.store).newest_opened()
        assert opened
        headers = {"Authorization": f"Bearer {self.store.get('token').decode()}"}
        with urllib.request.urlopen(urllib.request.Request(f"{opened.url}/v1/status", headers=headers), timeout=10) as answer:
            return [node["pid"] for node in json.load(answer)["nodes"] if node["state"] == "running"]

    def ending(self) -> Ending:
        result, lineage = read_result(self.store), RunLog.open(self.store).lineage
        losses = tuple(step.record["loss_hex"] for step in lineage.history(read_steps(self.store)))
        return Ending(result["state_sha256"] if result else "", losses)

    def lost_steps(self) -> int:
        result = read_result(self.store)
        return int(result["lost_steps"]) if result else -1

    def is_newest_commit_whole(self) -> bool:
        commit = RunLog.open(self.store).lineage.newest_committed()
        try:
            return commit is not None and bool(verify_checkpoint(self.store, commit.directory, commit.manifest_sha256))
        except StorageError:
            return False

    def commit_after(self, moment: float, step: int) -> float | None:
        """Seconds until the commit of this step or a later one."""
        commits = (event for event in read_events(self.store) if event["kind"] == "committed" and event["step"] >= step)
        return next((event["at_s"] - moment for event in commits), None)


def undisturbed() -> Ending:
    folder = Path(tempfile.mkdtemp(prefix="ks-bench-"))
    trial = Trial(folder, Case(GRACES_S[-1], "one", 0), spares=0)
    trial.start()
    if trial.wait() != EXIT_OK:
        raise SystemExit(f"the undisturbed run failed, see {folder}")
    ending = trial.ending()
    shutil.rmtree(folder, ignore_errors=True)
    return ending


def run_one(case: Case, number: signal.Signals, chance: random.Random, expected: Ending) -> Row:
    folder = Path(tempfile.mkdtemp(prefix="ks-bench-"))
    trial = Trial(folder, case, spares=0 if case.nodes == "all" else NOTICED[case.nodes])
    try:
        row = _run(trial, number, chance, expected)
    finally:
        trial.stop()
    if row.is_deadlock or not row.is_intact:
        print(f"see {folder}", flush=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return row


def _run(trial: Trial, number: signal.Signals, chance: random.Random, expected: Ending) -> Row:
    case = trial.case
    trial.start()
    trial.wait_for_step(1)
    victims = chance.sample(trial.agents(), NOTICED[case.nodes])
    step, load = trial.wait_for_step(chance.randint(*NOTICE_STEPS)), os.getloadavg()[0]
    noticed_at = time.monotonic()
    for pid in victims:
        os.kill(pid, number)
    gone_s = wait_gone(victims, noticed_at, case.grace_s)
    code, is_whole = trial.wait(), trial.is_newest_commit_whole()
    while code == EXIT_REQUEUE:
        trial.start()
        code = trial.wait()
    commit_s = trial.commit_after(noticed_at, step)
    return Row(
        **asdict(case),
        signal=number.name,
        step=step,
        commit_s=round(commit_s, 3) if commit_s is not None and commit_s <= case.grace_s else None,
        gone_s=gone_s,
        lost_steps=trial.lost_steps(),
        is_intact=is_whole and code == EXIT_OK and trial.ending() == expected,
        is_deadlock=code is None,
        load=load,
    )


def wait_gone(pids: Sequence[int], noticed_at: float, grace_s: float) -> float | None:
    """Seconds until the last of these processes had ended by itself; those that are left when the grace is over are killed."""
    while any(map(is_there, pids)):
        if time.monotonic() - noticed_at >= grace_s:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):  # this one had ended by itself
                    os.kill(pid, signal.SIGKILL)
            return None
        time.sleep(POLL_S)
    return round(time.monotonic() - noticed_at, 3)


def is_there(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line for each grace and number of nodes; loader workers and signals together."""
    groups: dict[tuple[float, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.grace_s, list(NOTICED).index(row.nodes))):
        groups.setdefault((row.grace_s, row.nodes), []).append(row)
    return [{"grace_s": grace_s, "nodes": nodes, **figures(group)} for (grace_s, nodes), group in groups.items()]


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    commits = [row.commit_s for row in rows if row.commit_s is not None]
    return {
        "runs": len(rows),
        "lost_steps": sum(row.lost_steps for row in rows),
        "intact": sum(row.is_intact for row in rows),
        "deadlocks": sum(row.is_deadlock for row in rows),
        "killed": sum(row.gone_s is None for row in rows),
        "committed": len(commits),
        "commit_median_s": median(commits),
        "commit_p95_s": percentile(commits, 0.95),
    }


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    text = [
        "| grace s | notice to | runs | steps lost | last commit intact | deadlocks | notice to commit, median s | p95 s |",
        "|" + "---|" * 8,
    ]
    for line in lines:
        median_s, p95_s = (f"{line[key]:.2f}" if line[key] is not None else "-" for key in ("commit_median_s", "commit_p95_s"))
        intact = f"{line['intact']} of {line['runs']}"
        cells = (f"{line['grace_s']:g}", line["nodes"], line["runs"], line["lost_steps"], intact, line["deadlocks"], median_s, p95_s)
        text.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(text)


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    late = sum(row.commit_s is None for row in rows)
    lost, deadlocks = sum(row.lost_steps for row in rows), sum(row.is_deadlock for row in rows)
    intact = sum(row.is_intact for row in rows)
    note = f"{late} of {len(rows)} without a commit within the grace" if late else ""
    told = f"{lost} in {len(rows)} runs"
    return [
        Verdict(what="nodes taken away with notice: steps lost", target="0", result=told, met=lost == 0, note=note),
        Verdict(what="... last commit intact, same bits", target="all", result=f"{intact} of {len(rows)}", met=intact == len(rows)),
        Verdict(what="... deadlocks", target="0", result=str(deadlocks), met=deadlocks == 0),
    ]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--runs", type=int, default=60, help="in all; the cases take turns")
    made.add_argument("--graces", nargs="+", type=float, default=list(GRACES_S), help="seconds")
    made.add_argument("--nodes", nargs="+", choices=list(NOTICED), default=list(NOTICED))
    made.add_argument("--workers", nargs="+", type=int, default=list(WORKERS), help="loader workers of each rank")
    made.add_argument("--seed", type=int, default=0)
    options = made.parse_args()
    runs, graces = (1, [5.0]) if options.quick else (options.runs, options.graces)
    began_on = machine()
    chance, expected, rows = random.Random(options.seed), undisturbed(), list[Row]()
    cases = itertools.cycle(Case(*case) for case in itertools.product(graces, options.nodes, options.workers))
    for i, case in enumerate(itertools.islice(cases, runs)):
        row = run_one(case, chance.choice((signal.SIGTERM, signal.SIGUSR1)), chance, expected)
        print(f"{i + 1}/{runs} {row}", flush=True)
        rows.append(row)
        measured = {"summary": summary(rows), "rows": [asdict(row) for row in rows]}
        publish("preemption", (), measured, began_on=began_on)  # after each: whoever interrupts the script keeps what it has
    print(markdown(summary(rows)))
    publish("preemption", verdicts(rows), measured, began_on=began_on)


if __name__ == "__main__":
    main()
