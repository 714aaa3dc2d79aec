"""What the same bits at every world size cost: steps per second with exact reduction beside the normal engine, at 1, 2 and 4 ranks.

    python benchmarks/exact_reduction.py                    results/exact_reduction.json and a table
    python benchmarks/exact_reduction.py --rounds 1 --steps 20 --worlds 1 2

Every trial is a torchrun of its own that trains the model of recovery.toml; engines and world sizes alternate. A step is timed from its
batch to its record, by rank 0, without the first ones. Checkpoints are not made: they are the same either way.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import HERE, Verdict, machine, parser, publish

LOGICAL_RANKS = 4
WARM_UP = 10  # steps that are not timed
BATCH_TOKENS = 4096
ENGINES: Mapping[str, Mapping[str, Any]] = {
    "normal": {},
    "exact": {"exact_reduction": True, "logical_ranks": LOGICAL_RANKS},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One trial."""

    engine: str
    world_size: int
    round: int
    step_s: float  # median
    steps_per_s: float  # all timed steps over their time
    peak_mb: float  # resident memory of rank 0
    loss_hex: str  # of the last step
    load: float  # of the machine before the trial


def config_of(engine: str, root: str, steps: int) -> dict[str, Any]:
    """The trainer's sections of run.toml."""
    config = tomllib.loads((HERE / "recovery.toml").read_text())
    config["run"] = {**config["run"], "root": root, "steps": WARM_UP + steps}
    config["train"]["batch_tokens"] = BATCH_TOKENS
    config["cluster"] = dict(ENGINES[engine])
    return config


def work(config_path: Path) -> None:
    """One rank; rank 0 prints what it measured as the last line."""
    from keepstep.trainer.attach import attach
    from keepstep.trainer.config import TrainerConfig
    from keepstep.trainer.loader import batches
    from keepstep.trainer.loop import advance
    from keepstep.trainer.parallel import join
    from keepstep.trainer.run import open_run

    me = attach()
    run = open_run(TrainerConfig.model_validate_json(config_path.read_text()), me, join(me))
    seconds = []
    with batches(run.share, range(1, run.config.run.steps + 1), 0) as shares:
        for _ in range(run.config.run.steps):
            began = time.monotonic()
            advance(run, next(shares))
            seconds.append(time.monotonic() - began)
    if run.world.rank == 0:
        timed, peak_mb = seconds[WARM_UP:], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found = {
            "step_s": statistics.median(timed),
            "steps_per_s": len(timed) / sum(timed),
            "peak_mb": round(peak_mb, 1),
            "loss_hex": run.loss_hex,
        }
        print(json.dumps(found), flush=True)


def trial(engine: str, world_size: int, number: int, steps: int, folder: Path) -> Row:
    path = folder / f"{engine}.json"
    path.write_text(json.dumps(config_of(engine, str(folder / "root"), steps)))
    load = os.getloadavg()[0]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, __file__, "--work", str(path)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{engine} at {world_size} ranks failed:\n{done.stderr[-3000:]}")
    return Row(engine=engine, world_size=world_size, round=number, load=load, **json.loads(done.stdout.splitlines()[-1]))


def trials(rounds: int, worlds: Sequence[int], steps: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="ks-bench-") as folder:
        for number in range(rounds):
            for world_size in worlds:
                for engine in ENGINES:
                    yield trial(engine, world_size, number, steps, Path(folder))


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per world size: medians over the rounds, and exact over normal."""
    table = []
    for world_size in dict.fromkeys(row.world_size for row in rows):
        mine = {engine: [row for row in rows if (row.engine, row.world_size) == (engine, world_size)] for engine in ENGINES}
        rate = {engine: statistics.median(row.steps_per_s for row in found) for engine, found in mine.items()}
        peak = {engine: statistics.median(row.peak_mb for row in found) for engine, found in mine.items()}
        table.append(
            {
                "world_size": world_size,
                **{f"{engine}_steps_per_s": round(value, 2) for engine, value in rate.items()},
                "time_ratio": round(rate["normal"] / rate["exact"], 3),
                **{f"{engine}_peak_mb": value for engine, value in peak.items()},
                "exact_losses": sorted({row.loss_hex for row in mine["exact"]}),
            }
        )
    return table


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| ranks | normal steps/s | exact steps/s | time x | normal MB | exact MB |", "|---|---|---|---|---|---|"]
    for line in table:
        rates = f"{line['normal_steps_per_s']:.2f} | {line['exact_steps_per_s']:.2f} | {line['time_ratio']:.2f}"
        lines.append(f"| {line['world_size']} | {rates} | {line['normal_peak_mb']:.0f} | {line['exact_peak_mb']:.0f} |")
    return "\n".join(lines)


def verdict(line: Mapping[str, Any]) -> Verdict:
    result = f"{line['time_ratio']:.2f} x the time, {line['exact_peak_mb'] / line['normal_peak_mb']:.2f} x the memory"
    return Verdict(what=f"exact reduction beside FSDP2, {line['world_size']} rank(s)", target="(a figure)", result=result, met=None)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=5, help="trials of each engine at each world size, in alternation")
    made.add_argument("--steps", type=int, default=100, help="timed steps of a trial")
    made.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    made.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.work:
        work(options.work)
        return
    rounds, steps, worlds = (1, 10, [2]) if options.quick else (options.rounds, options.steps, options.worlds)
    began_on, rows = machine(), list[Row]()
    for row in trials(rounds, worlds, steps):
        print(f"{row.engine} at {row.world_size}, round {row.round}: {row.steps_per_s:.2f} steps/s (load {row.load:.1f})", flush=True)
        rows.append(row)
    table = summary(rows)
    print(markdown(table))
    assert len({loss for line in table for loss in line["exact_losses"]}) == 1, "exact reduction must not show the number of ranks"
    measured = {"summary": table, "rows": [asdict(row) for row in rows]}
    publish("exact_reduction", [verdict(line) for line in table], measured, began_on=began_on)


if __name__ == "__main__":
    main()
