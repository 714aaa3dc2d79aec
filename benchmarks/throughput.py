"""Steps per second with everything switched on, beside bare torchrun with the same loop, model and batches: what a healthy run pays.

    python benchmarks/throughput.py                       results/throughput.json, some four minutes
    python benchmarks/throughput.py --rounds 1 --seconds 8

Each round is bare, keepstep, bare: a launch each, timed for so many seconds once it is warm. keepstep's rate is compared with the mean of
the two around it, and those two with each other: what they differ by is the noise. keepstep hashes and commits its checkpoints, as often
as `checkpoint.interval = "auto"` says, writes step records and layers, beats, watches for hangs and holds its next ranks ready. The bare
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from common import HERE, Verdict, machine, parser, publish
from recovery import Generation, keepstep
from rich.console import Console
from rich.table import Table

RANKS: Final = 4
TARGET: Final = 0.99
# A step of some 0.4 s on 2 cores: a model of 3.4 million parameters, 2,048 tokens.
MODEL: Final = {"model": {"layers": 4, "width": 256, "heads": 4, "context": 256}, "train": {"batch_tokens": 2048}}
START_S: Final = 120.0
POLL_S: Final = 0.01
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One launch."""

    round: int
    contender: str
    steps: int
    steps_per_s: float
    saves: int
    load: float


def config_of(root: Path) -> Figures:
    """run.toml of both; what the bare loop does not know it leaves alone."""
    config: Figures = tomllib.loads((HERE / "recovery.toml").read_text())
    config["checkpoint"] = {}  # defaults
    return config | MODEL | {"run": {**config["run"], "root": str(root)}, "cluster": {"nodes": 1, "ranks_per_node": RANKS}}


def bare(config_path: Path, folder: Path) -> None:
    """One rank of the bare loop, until it is killed. It tells its steps as a rank of keepstep does: one page, written after each."""
    import torch
    import torch.distributed as dist

    from keepstep.trainer.attach import attach
    from keepstep.trainer.config import TrainerConfig
    from keepstep.trainer.contract import PROGRESS, Phase
    from keepstep.trainer.loader import batches
    from keepstep.trainer.optim import clip_scale, learning_rate
    from keepstep.trainer.parallel import join
    from keepstep.trainer.run import open_run

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


@contextmanager
def running(contender: str, folder: Path) -> Iterator[None]:
    """On 4 ranks of one node, until it is left."""
    config = config_of(folder / "root")
    if contender == "keepstep":
        config_path = folder / "run.toml"
        config_path.write_text(toml_of(config))
        command = keepstep("run", str(config_path))
    else:
        config_path = folder / "config.json"
        config_path.write_text(json.dumps(config))
        torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        command = [*torchrun, __file__, "--bare", str(config_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KEEPSTEP_SCRATCH_BASE": str(folder / "s")}
    with (folder / "output.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        process.send_signal(signal.SIGKILL if contender == "keepstep" else signal.SIGTERM)  # torchrun's ranks outlive its SIGKILL
        process.wait()


def toml_of(config: Figures) -> str:
    lines = []
    for section, values in config.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


class Steps:
    """Finished steps of the slowest rank, and when the last rank finished them."""

    def __init__(self, folder: Path) -> None:
        self._generation, self._folder = Generation(folder), folder

    def next(self) -> tuple[int, float]:
        """The next step that all ranks finish: its number and when (monotonic)."""
        self._generation.look()
        seen, until = self._generation.slowest, time.monotonic() + START_S
        while time.monotonic() < until:
            self._generation.look()
            if self._generation.slowest > max(seen, 0):
                return self._generation.slowest, time.monotonic()
            time.sleep(POLL_S)
        raise SystemExit(f"no step of all ranks within {START_S:.0f} s, see {self._folder}/output.log")


def trial(contender: str, number: int, warm_s: float, seconds: float) -> Row:
    folder = Path(tempfile.mkdtemp(prefix="ks-bench-"))
    load = os.getloadavg()[0]
    with running(contender, folder):
        steps = Steps(folder)
        first, began = steps.next()
        until = began + warm_s
        while began < until:
            first, began = steps.next()
        saves = saved(folder)
        last, ended = first, began
        while ended < began + seconds:
            last, ended = steps.next()
        saves = saved(folder) - saves
    shutil.rmtree(folder, ignore_errors=True)
    rate = (last - first) / (ended - began)
    return Row(round=number, contender=contender, steps=last - first, steps_per_s=round(rate, 4), saves=saves, load=round(load, 2))


def saved(folder: Path) -> int:
    """Checkpoints that were begun so far; those that are retired meanwhile are missing."""
    return len(list((folder / "root").glob("data/*/*")))


def verdict(rows: Sequence[Row]) -> tuple[Verdict, Figures]:
    """Medians over the rounds."""
    rate = {(row.round, row.contender): row.steps_per_s for row in rows}
    rounds = sorted({row.round for row in rows})
    ratios = [rate[n, "keepstep"] / statistics.mean((rate[n, "bare"], rate[n, "bare again"])) for n in rounds]
    noise = [rate[n, "bare again"] / rate[n, "bare"] for n in rounds]
    ratio, saves = statistics.median(ratios), sum(row.saves for row in rows)
    told = f"{ratio:.3f} x ({min(ratios):.3f} to {max(ratios):.3f}, n = {len(rounds)}), {saves} saves"
    note = f"bare against itself {min(noise):.3f} to {max(noise):.3f} x"
    summary = {"ratios": [round(each, 4) for each in ratios], "bare against itself": [round(each, 4) for each in noise]}
    what = "steps per second, everything on, beside bare torchrun"
    return Verdict(what=what, target=f">= {TARGET} x", result=told, met=ratio >= TARGET, note=note), summary


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--seconds", type=float, default=16.0, help="timed of each launch")
    made.add_argument("--warm", type=float, default=4.0, help="seconds from the first step, not timed")
    made.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.bare:
        bare(options.bare, options.bare.parent)
        return
    rounds, warm_s, seconds = (1, 1.0, 3.0) if options.quick else (options.rounds, options.warm, options.seconds)
    began_on, rows, table = machine(), list[Row](), Table("round", "contender", "steps", "steps/s", "saves", "load")
    for number in range(rounds):
        for contender in ("bare", "keepstep", "bare again"):
            row = trial(contender, number, warm_s, seconds)
            print(f"round {number}, {contender}: {row.steps_per_s:.3f} steps/s, {row.saves} saves (load {row.load})", flush=True)
            rows.append(row)
            table.add_row(str(number), contender, str(row.steps), f"{row.steps_per_s:.3f}", str(row.saves), f"{row.load:.1f}")
    Console(width=100).print(table)
    found, summary = verdict(rows)
    publish("throughput", [found], {"summary": summary, "rows": [asdict(row) for row in rows]}, began_on=began_on)


if __name__ == "__main__":
    main()
