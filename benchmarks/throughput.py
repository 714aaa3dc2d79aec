"""Steps per second with everything switched on, beside bare torchrun with the same loop, model and batches: what a healthy run pays.

    python benchmarks/throughput.py                                   results/throughput.json, some three minutes
    python benchmarks/throughput.py --seconds 20                      a look
    python benchmarks/throughput.py -o checkpoint.interval='"auto"'   what the first minute of a run pays

Three launches of 4 ranks live at once, and by turns two of them are stopped (SIGSTOP of all of their processes) while one trains for two
seconds: what drifts on the machine hits all alike. They are bare torchrun, keepstep, and bare torchrun again: what the two bare ones differ
by is the noise. A rate is steps finished per second of a launch's own turns.

keepstep hashes, commits and reads back a checkpoint every 30 steps, which is half a minute and what "auto" comes to for this model after an
hour without failure (a young run expects to fail soon and saves more often). It writes step records and layers, beats, watches for hangs
and holds its next ranks ready. Its lease is longer than a turn of the others, or else standing still would be taken for silence. The bare
loop (in this file) is forward, backward, one all-reduce of two numbers, clipping and update, by the same model and kernels; it saves and
writes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from common import HERE, Verdict, machine, parser, publish
from recovery import Generation, keepstep
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(HERE / "peers"))

from contenders import descendants, send

RANKS: Final = 4
CONTENDERS: Final = ("bare", "keepstep", "bare again")
TARGET: Final = 0.99
# A step of about a second on 2 cores: a model of 3.4 million parameters, 4,096 tokens.
MODEL: Final = {"model": {"layers": 4, "width": 256, "heads": 4, "context": 256}, "train": {"batch_tokens": 4096}}
START_S: Final = 120.0
SAVE_EVERY: Final = 30  # steps: sqrt(2 x 0.05 s x 9,000 s), Young's formula; see orchestrator/interval.py
TURN_S: Final = 2.0
POLL_S: Final = 0.05  # looking costs time of the cores that are measured
WARM_UP: Final = 6  # turns of each that are not counted
GROUPS: Final = 6  # of turns, for the spread
Figures = dict[str, Any]


def config_of(root: Path) -> Figures:
    """run.toml of both; what the bare loop does not know it leaves alone."""
    config: Figures = tomllib.loads((HERE / "recovery.toml").read_text())
    config["checkpoint"] = {"interval": SAVE_EVERY}
    return config | MODEL | {"run": {**config["run"], "root": str(root)}, "cluster": {"nodes": 1, "ranks_per_node": RANKS, "lease_s": 60}}


def bare(config_path: Path, folder: Path) -> None:
    """One rank of the bare loop, until it is killed. It tells its steps as a rank of keepstep does: one page, written after each."""
    import torch
    import torch.distributed as dist

    from keepstep.trainer.attach import attach
    from keepstep.trainer.config import TrainerConfig
    from keepstep.trainer.contract import PROGRESS, Phase
    from keepstep.trainer.loader import batches
    from keepstep.trainer.optim import clip_scale
    from keepstep.trainer.parallel import join
    from keepstep.trainer.run import open_run
    from keepstep.trainer.schedule import learning_rate

    me = attach()
    run = open_run(TrainerConfig.model_validate_json(config_path.read_text()), me, join(me))
    optimizer, steps = run.config.optimizer, run.config.run.steps
    page = os.open(folder / f"progress-{os.getpid()}-{me.rank}", os.O_RDWR | os.O_CREAT, 0o644)
    blank = (0,) * (len(PROGRESS.unpack(bytes(PROGRESS.size))) - 5)
    with batches(run.share, range(1, steps + 1), 0) as shares:
        for step in range(1, steps + 1):
            sums = run.engine.backward(next(shares), step=step)
            figures = torch.tensor([sums.nll, sums.gradient_square], dtype=torch.float64)
            dist.all_reduce(figures)
            norm = math.sqrt(float(figures[1]))
            run.engine.update(lr=learning_rate(optimizer, step, steps), scale=clip_scale(norm, optimizer.clip_norm))
            os.pwrite(page, PROGRESS.pack(Phase.STEP, 0, step, step, time.monotonic(), *blank), 0)


class Launch:
    """One contender on 4 ranks of one node; its processes are stopped and go on as one."""

    def __init__(self, contender: str, overrides: Sequence[str]) -> None:
        self.folder = folder = Path(tempfile.mkdtemp(prefix="ks-bench-"))
        self._is_ours = contender == "keepstep"
        config_path = folder / ("run.toml" if self._is_ours else "config.json")
        config = config_of(folder / "root")
        config_path.write_text(toml_of(config) if self._is_ours else json.dumps(config))
        torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        options = [word for override in overrides for word in ("-o", override)]
        command = keepstep("run", str(config_path), *options) if self._is_ours else [*torchrun, __file__, "--bare", str(config_path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "KEEPSTEP_SCRATCH_BASE": str(folder / "s")}
        with (folder / "output.log").open("wb") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self._generation = Generation(folder)
        self.turns: list[list[float]] = []  # for each turn when it began, when steps were finished in it, and when it ended

    def steps(self) -> int:
        """Finished by the slowest rank; -1 until all are there."""
        self._generation.look()
        return self._generation.slowest

    def turn(self, seconds: float) -> None:
        """Lets it train for so long; the others are stopped."""
        times = [time.monotonic()]
        signal_all(self._tree(), signal.SIGCONT)
        seen = self.steps()
        while (now := time.monotonic()) < times[0] + seconds:
            if (steps := self.steps()) > seen:
                times += [now] * (steps - seen)
                seen = steps
            time.sleep(POLL_S)
        self.stop()
        self.turns.append([*times, time.monotonic()])

    def stop(self) -> None:
        signal_all(self._tree(), signal.SIGSTOP)

    def _tree(self) -> list[int]:
        return descendants(self._process.pid)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def saves(self) -> int:
        """Commits so far."""
        events = self.folder / "root" / "events.jsonl"
        return sum(json.loads(line)["kind"] == "committed" for line in events.read_text().splitlines())

    def end(self) -> None:
        signal_all(self._tree(), signal.SIGKILL)
        self._process.wait()


def signal_all(pids: Sequence[int], number: signal.Signals) -> None:
    """Parents before children where they stop, after them where they go on: nobody watches somebody who stands still."""
    for pid in reversed(pids) if number is signal.SIGCONT else pids:
        send(pid, number)


def rate(turns: Sequence[Sequence[float]]) -> float:
    """Steps per second of its own turns, from the first step in them to the last one."""
    own, before = list[float](), 0.0
    for began, *steps, ended in turns:
        own += [before + at - began for at in steps]
        before += ended - began
    return (len(own) - 1) / (own[-1] - own[0]) if len(own) > 1 else math.nan


def measure(seconds: float, warm_up: int, overrides: Sequence[str]) -> Figures:
    """Rates over everything, and over each of GROUPS parts of it. The first `warm_up` turns do not count."""
    launches = {name: Launch(name, overrides) for name in CONTENDERS}
    try:
        for launch in launches.values():
            until = time.monotonic() + START_S
            while launch.steps() < 1:
                if time.monotonic() > until or launch.has_ended():
                    raise SystemExit(f"it does not train, see {launch.folder}/output.log")
                time.sleep(0.05)
        for launch in launches.values():
            launch.stop()
        for _ in range(warm_up):
            for launch in launches.values():
                launch.turn(TURN_S)
                launch.turns.clear()
        saves, rounds = launches["keepstep"].saves(), max(2, round(seconds / TURN_S))
        for _ in range(rounds):
            for launch in launches.values():
                launch.turn(TURN_S)
        saves = launches["keepstep"].saves() - saves
    finally:
        for launch in launches.values():
            launch.end()
    for launch in launches.values():
        shutil.rmtree(launch.folder, ignore_errors=True)
    size = -(-rounds // GROUPS)
    parts = {name: [rate(launch.turns[at : at + size]) for at in range(0, rounds, size)] for name, launch in launches.items()}
    return {
        "seconds": {name: round(rounds * TURN_S, 1) for name in launches},
        "steps": {name: sum(len(turn) - 2 for turn in launch.turns) for name, launch in launches.items()},
        "steps_per_s": {name: rate(launch.turns) for name, launch in launches.items()},
        "parts": parts,
        "saves": saves,
    }


def verdict(found: Figures) -> Verdict:
    rates, parts = found["steps_per_s"], found["parts"]
    ratio = rates["keepstep"] / statistics.mean((rates["bare"], rates["bare again"]))
    noise = rates["bare again"] / rates["bare"]
    pairs = zip(parts["keepstep"], parts["bare"], parts["bare again"], strict=True)
    ratios = [ours / statistics.mean(theirs) for ours, *theirs in pairs]
    told = f"{ratio:.3f} x ({min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} parts), {found['saves']} saves"
    what = "steps per second, everything on, beside bare torchrun"
    return Verdict(what=what, target=f">= {TARGET} x", result=told, met=ratio >= TARGET, note=f"bare beside itself {noise:.3f} x")


def toml_of(config: Figures) -> str:
    lines = []
    for section, values in config.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--seconds", type=float, default=45.0, help="timed of each")
    made.add_argument("-o", dest="overrides", nargs="*", default=(), help="SECTION.KEY=VALUE for keepstep: to find what costs")
    made.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.bare:
        bare(options.bare, options.bare.parent)
        return
    began_on = machine()
    found = measure(*((5.0, 1) if options.quick else (options.seconds, WARM_UP)), options.overrides)
    table = Table("contender", "steps", "seconds", "steps/s", "in parts")
    for name in CONTENDERS:
        parts = ", ".join(f"{each:.3f}" for each in found["parts"][name])
        table.add_row(name, str(found["steps"][name]), str(found["seconds"][name]), f"{found['steps_per_s'][name]:.3f}", parts)
    Console(width=120).print(table)
    publish("throughput", [verdict(found)], found, began_on=began_on)


if __name__ == "__main__":
    main()
