"""Kill of a rank to the next finished step on all ranks: keepstep beside plain torchrun, in alternating runs on 4 ranks.

    python benchmarks/recovery.py                 all contenders, results/recovery.json
    python benchmarks/recovery.py --rounds 1 --kills 1 --only keepstep-2x2

keepstep-hot-* has `[cluster] hot_standby = true`: a second group, formed and built, waits with its memory.

Both sides are timed in the same way: every rank writes (step, time.monotonic()) into a small file after each finished step, and this script
reads those files. A kill is recovered when every rank of the new generation has finished a step; the time of the last of them counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import HERE, Verdict, machine, median, parser, percentile, progress_pages, publish, recoveries, spent_on, spread

from keepstep.trainer.contract import PROGRESS, Phase

RANKS = 4
STEPS_BETWEEN_KILLS = 15  # more than the checkpoint interval: every kill finds committed progress since the last one
BETWEEN_KILLS_S = 6.0  # and at least so long: what a restart used up is there again, as it is in life
START_TIMEOUT_S = 180.0
RECOVERY_TIMEOUT_S = 90.0
POLL_S = 0.02  # when a step was finished stands in the pages; looking costs time of the cores that are measured
# torchrun of torch 2.13 keeps one store for all rounds and does not recover over gloo; this makes it (pytorch #167288).
TORCHRUN_FIX = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@dataclass(frozen=True, slots=True)
class Page:
    """One rank process's progress, as it wrote it itself."""

    phase: int
    step: int
    at: float  # time.monotonic() of the last report, one clock for all processes of a machine


def pages(folder: Path) -> dict[Path, Page]:
    """Every progress page below a folder, of living and dead ranks."""
    found = {}
    for path, content in progress_pages(folder):
        if len(content) >= PROGRESS.size:
            phase, _, step, _, at, *_ = PROGRESS.unpack_from(content)
            found[path] = Page(phase, step, at)
    return found


@dataclass(slots=True)
class Life:
    """One process of one rank."""

    path: Path
    base: int  # the step that it began with
    page: Page
    first_step_at: float | None = None


class Generation:
    """The ranks that were started after a certain moment. Of a rank that was started more than once, the newest process counts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._old = set(pages(folder))
        self.reached = 0  # steps that the ranks before it had finished
        self._lives: dict[tuple[Path, str], Life] = {}  # by node's folder and local rank

    def look(self) -> None:
        for path, page in pages(self._folder).items():
            if path in self._old:
                self.reached = max(self.reached, page.step)
            else:
                self._see(path, page)

    def _see(self, path: Path, page: Page) -> None:
        rank = (path.parent, path.name.rpartition("-")[2])
        life = self._lives.get(rank)
        if life is None or (life.path != path and page.at > life.page.at):
            life = self._lives[rank] = Life(path, page.step, page)
        if life.path == path:
            life.page = page
            if life.first_step_at is None and page.step > life.base and page.phase >= Phase.STEP:
                life.first_step_at = page.at

    @property
    def slowest(self) -> int:
        """Finished steps of the slowest rank; -1 until all ranks are there."""
        return min(life.page.step for life in self._lives.values()) if len(self._lives) == RANKS else -1

    @property
    def began_at_step(self) -> int:
        """The step of the checkpoint that it resumed from."""
        return max(life.base for life in self._lives.values())

    @property
    def stepped_at(self) -> float | None:
        """When the last rank finished its first step (monotonic); None until it has."""
        times = [life.first_step_at for life in self._lives.values() if life.first_step_at is not None]
        return max(times) if len(times) == RANKS else None

    def wait_stepped(self, timeout_s: float) -> float | None:
        """`stepped_at`, or None if that takes longer than the time-out."""
        deadline = time.monotonic() + timeout_s
        while self.stepped_at is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
            self.look()
        return self.stepped_at


class Contender(ABC):
    """A training system on 4 ranks: start it, name a rank's process, end it for certain."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    @abstractmethod
    def start(self) -> None: ...

    def settle(self) -> bool:
        """Returns when it is as it will be until something fails; whether it came to that."""
        return True

    @abstractmethod
    def victim(self) -> int:
        """Pid of the last rank's living process."""

    @abstractmethod
    def stop(self) -> None: ...

    def spawn(self, *command: str, **environment: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        with (self.folder / f"output-{len(self.processes)}.log").open("wb") as output:
            self.processes.append(
                subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=self.folder, start_new_session=True)
            )


class Keepstep(Contender):
    """`keepstep run` plays all nodes; each has its own agent, persister and forkserver, as on real ones."""

    nodes = 2
    more: tuple[str, ...] = ()

    def start(self) -> None:
        cluster = (f"cluster.nodes={self.nodes}", f"cluster.ranks_per_node={RANKS // self.nodes}")
        overrides = (f"run.root={self.folder / 'root'}", *cluster, *self.more)
        options = [word for override in overrides for word in ("-o", override)]
        self.spawn(*keepstep("run", str(HERE / "recovery.toml"), *options), KEEPSTEP_SCRATCH_BASE=str(self.folder / "s"))

    def victim(self) -> int:
        status = subprocess.run(keepstep("status", str(self.folder / "root"), "--json"), stdout=subprocess.PIPE, check=True)
        ranks = [rank for node in json.loads(status.stdout)["nodes"] for rank in node["ranks"]]
        return int(next(rank["pid"] for rank in ranks if rank["rank"] == RANKS - 1 and rank["phase"] != "exited"))

    def stop(self) -> None:
        for process in self.processes:
            process.kill()  # all of a local run's processes die with the one that plays the platform
            process.wait()


class KeepstepOneNode(Keepstep):
    nodes = 1


class KeepstepHot(Keepstep):
    """Every failure finds a standby ready, and steps are timed when none is forming beside them."""

    more = ("cluster.hot_standby=true",)
    settled = 0

    def settle(self) -> bool:
        self.settled += 1
        events, deadline = self.folder / "root" / "events.jsonl", time.monotonic() + START_TIMEOUT_S
        while events.read_text().count('"standby-ready"') < self.settled:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True


class Torchrun(Contender):
    """Plain torchrun with the setting that makes it recover; one agent per node."""

    nodes = 1

    def start(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        options = [f"--nnodes={self.nodes}", f"--nproc-per-node={RANKS // self.nodes}", "--max-restarts=1000", "--rdzv-id=bench"]
        meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
        program = [str(HERE / "torchrun_train.py"), str(self.folder)]
        for _ in range(self.nodes):
            self.spawn(sys.executable, "-m", "torch.distributed.run", *options, *meeting, *program, **TORCHRUN_FIX)

    def victim(self) -> int:
        return next(pid for pid, rank in self._living() if rank == RANKS - 1)

    def stop(self) -> None:
        ranks = [pid for pid, _ in self._living()]
        for process in self.processes:
            process.kill()
            process.wait()
        for pid in ranks:  # torchrun's workers have sessions of their own and outlive a killed torchrun
            with contextlib.suppress(ProcessLookupError):  # it had ended by itself
                os.kill(pid, signal.SIGKILL)

    def _living(self) -> Iterator[tuple[int, int]]:
        for path in self.folder.glob("progress-*"):
            _, pid, rank = path.name.split("-")
            if Path(f"/proc/{pid}/environ").exists() and str(self.folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                yield int(pid), int(rank)


class TorchrunTwoNodes(Torchrun):
    nodes = 2


CONTENDERS: Mapping[str, type[Contender]] = {
    "keepstep-2x2": Keepstep,
    "keepstep-hot-2x2": KeepstepHot,
    "torchrun-2x2": TorchrunTwoNodes,
    "keepstep-1x4": KeepstepOneNode,
    "torchrun-1x4": Torchrun,
}


def keepstep(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "keepstep.orchestrator.cli", *arguments]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One kill."""

    contender: str
    round: int
    kill: int
    recovery_s: float | None  # None: not within RECOVERY_TIMEOUT_S
    step_s: float  # median seconds per step before the kill, for scale
    load: float  # of the machine just before the kill


def trial(name: str, number: int, kills: int, parts: list[dict[str, float]]) -> Iterator[Row]:
    """One launch of one contender, killed `kills` times; `parts` gets what keepstep says that each recovery was spent on."""
    folder = Path(tempfile.mkdtemp(prefix="ks-bench-"))
    contender = CONTENDERS[name](folder)
    generation = Generation(folder)
    try:
        contender.start()
        if generation.wait_stepped(START_TIMEOUT_S) is None:
            raise SystemExit(f"{name} did not start within {START_TIMEOUT_S:.0f} s, see {folder}/output-*.log")
        for kill in range(kills):
            if not contender.settle():
                raise SystemExit(f"{name} did not settle within {START_TIMEOUT_S:.0f} s, see {folder}/output-*.log")
            step_s = run_on(generation, STEPS_BETWEEN_KILLS, BETWEEN_KILLS_S)
            victim, load = contender.victim(), os.getloadavg()[0]
            assert victim > 1, "0 would be this script's own process group"
            generation = Generation(folder)
            killed_at = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            recovered_at = generation.wait_stepped(RECOVERY_TIMEOUT_S)
            yield Row(
                contender=name,
                round=number,
                kill=kill,
                recovery_s=None if recovered_at is None else round(recovered_at - killed_at, 3),
                step_s=round(step_s, 4),
                load=load,
            )
            if recovered_at is None:
                print(f"{name} did not recover within {RECOVERY_TIMEOUT_S:.0f} s, see {folder}", flush=True)
                return
        if isinstance(contender, Keepstep):
            parts += recoveries(folder / "root", kills)
    finally:
        contender.stop()
    shutil.rmtree(folder, ignore_errors=True)  # kept after an error: its logs say why


def run_on(generation: Generation, steps: int, seconds: float = 0.0) -> float:
    """Lets it train for so many steps, and at least so long; returns the seconds per step."""
    generation.look()
    began, first = time.monotonic(), generation.slowest
    while generation.slowest < first + steps or time.monotonic() < began + seconds:
        if time.monotonic() - began > START_TIMEOUT_S:
            raise SystemExit(f"no {steps} steps within {START_TIMEOUT_S:.0f} s")
        time.sleep(POLL_S)
        generation.look()
    return (time.monotonic() - began) / (generation.slowest - first)


def summary(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Per contender: kills, recoveries, median, smallest and largest seconds; the ratio is against keepstep on as many nodes."""
    table: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row.contender for row in rows):
        mine = [row for row in rows if row.contender == name]
        times = sorted(row.recovery_s for row in mine if row.recovery_s is not None)
        table[name] = {
            "kills": len(mine),
            "recovered": len(times),
            "median_s": statistics.median(times) if times else None,
            "min_s": times[0] if times else None,
            "max_s": times[-1] if times else None,
            "step_s": statistics.median(row.step_s for row in mine),
        }
    for name, line in table.items():
        ours = table.get(f"keepstep-{name[-3:]}", {}).get("median_s")
        line["ratio"] = round(line["median_s"] / ours, 2) if ours and line["median_s"] else None
    return table


def markdown(table: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| contender | recovered | median s | min - max s | step s | x keepstep |", "|---|---|---|---|---|---|"]
    for name, line in table.items():
        extremes = f"{line['min_s']:.2f} - {line['max_s']:.2f}" if line["recovered"] else "-"
        middle, ratio = (f"{value:.2f}" if value is not None else "-" for value in (line["median_s"], line["ratio"]))
        lines.append(f"| {name} | {line['recovered']} of {line['kills']} | {middle} | {extremes} | {line['step_s']:.3f} | {ratio} |")
    return "\n".join(lines)


def verdicts(rows: Sequence[Row], parts: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Verdict]:
    """Of each way to run keepstep; a step is its own median."""
    found = []
    for name in dict.fromkeys(row.contender for row in rows if row.contender.startswith("keepstep")):
        mine = [row for row in rows if row.contender == name]
        times, step_s = [row.recovery_s for row in mine if row.recovery_s is not None], median([row.step_s for row in mine]) or 0.0
        beyond = [each - step_s for each in times]
        hot = "-hot-" in name
        targets = {"median": (0.5, 0.1 if hot else 0.45)} | ({} if hot else {"p95": (0.95, 0.8)})
        for word, (share, target_s) in targets.items():
            taken = percentile(beyond, share)
            what = f"SIGKILL of a rank -> next step on all, {name[9:].replace('hot-', 'hot standby, ')}, {word}"
            result = f"{taken:.2f} s + a step of {step_s:.2f} s; in all {spread(times)}" if taken is not None else "it did not recover"
            met = taken is not None and taken <= target_s and len(times) == len(mine)
            note = spent_on(parts[name]) if word == "median" else ""
            found.append(Verdict(what=what, target=f"<= {target_s} s + one step", result=result, met=met, note=note))
    return found


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=3, help="launches of each contender, in alternation; of torchrun one")
    made.add_argument("--kills", type=int, default=3, help="kills per launch")
    made.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    options = made.parse_args()
    rounds, kills, names = (1, 2, ["keepstep-2x2"]) if options.quick else (options.rounds, options.kills, options.only)
    began_on, rows, parts = machine(), list[Row](), {name: list[dict[str, float]]() for name in names}
    for number in range(rounds):
        for name in names:
            if number == 0 or name.startswith("keepstep"):
                for row in trial(name, number, kills, parts[name]):
                    print(f"{name} round {number} kill {row.kill}: {row.recovery_s} s (step {row.step_s} s, load {row.load})", flush=True)
                    rows.append(row)
    table = summary(rows)
    print(markdown(table))
    publish("recovery", verdicts(rows, parts), {"summary": table, "parts": parts, "rows": [asdict(row) for row in rows]}, began_on=began_on)


if __name__ == "__main__":
    main()
