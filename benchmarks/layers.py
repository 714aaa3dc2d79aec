"""What it costs to look into a training: norms in every step, every layer in sampled ones.

    python benchmarks/layers.py                          results/layers.json and a table
    python benchmarks/layers.py --rounds 5 --shapes small

One run; each round of it has three steps, in an order that is drawn anew: one that nobody looks into, one with the norms of every step, and
one whose layers are looked into as well. They compute the same (no bit depends on being looked at), a few hundred milliseconds apart, so
their differences say what a look costs, whatever else the machine does. A step is timed on rank 0, from the first forward pass to its
record, written as a line of JSON; all ranks meet in it.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import HERE, Verdict, machine, parser, publish
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(HERE.parent / "tests" / "unit"))

import trainer_ranks  # the tests' ranks
from trainer_ranks import FolderStaging, run_ranks, spec_of

trainer_ranks.DEADLINE_S = 3600.0

MODES = ("nothing", "norms", "layers")
WARM_UP = 4  # rounds
TEXT = {"source": "installed-docs", "max_bytes": 4_000_000}
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"model": {"layers": 2, "width": 64, "context": 64}, "train": {"batch_tokens": 2048}},
    "quickstart": {"model": {"layers": 4, "width": 128, "context": 128}, "train": {"batch_tokens": 4096}},
    "larger": {"model": {"layers": 6, "width": 384, "heads": 6, "context": 256}, "train": {"batch_tokens": 4096}},
}


class NoTrace:
    """A StepTrace that looks at nothing."""

    def parameter_square(self) -> float:
        return 0.0

    def ratio_square(self) -> float:
        return 0.0

    @contextmanager
    def activations(self, step: int, model: Any, parts: Sequence[Any]) -> Iterator[None]:
        yield

    @contextmanager
    def update(self, step: int, norm: float) -> Iterator[None]:
        yield

    def layers(self, step: int, gradient_scale: float) -> None:
        return None


def measure(rank: int, world_size: int, root: str, config: dict[str, Any], rounds: int) -> None:
    """Rank 0 leaves {mode: seconds of each round} in the root."""
    from keepstep.trainer.attach import Attached
    from keepstep.trainer.config import TraceSection, TrainerConfig
    from keepstep.trainer.loop import advance
    from keepstep.trainer.parallel import join
    from keepstep.trainer.run import open_run
    from keepstep.trainer.steptrace import StepTrace

    me = Attached(spec_of(Path(root), rank, 1, None))
    me.__dict__["staging"] = FolderStaging(Path(root), attempt=1, rank=rank, world_size=world_size)
    run = open_run(TrainerConfig.model_validate(config), me, join(me))
    looks: dict[str, Any] = {
        "nothing": NoTrace(),
        "norms": StepTrace(TraceSection(interval=0), run.engine.optimizer, run.world),
        "layers": StepTrace(TraceSection(interval=1), run.engine.optimizer, run.world),
    }
    draw = random.Random(1)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for round_ in range(WARM_UP + rounds):
        for mode in draw.sample(MODES, k=len(MODES)):
            run.trace = looks[mode]
            parts = run.share[run.step + 1]
            began = time.perf_counter()
            advance(run, parts)
            if round_ >= WARM_UP:
                seconds[mode].append(time.perf_counter() - began)
    if rank == 0:
        (Path(root) / "seconds.json").write_text(json.dumps(seconds))


def result(shape: str, world_size: int, rounds: int) -> dict[str, Any]:
    """Medians over the rounds; of what a look adds, the median of the differences within rounds."""
    from keepstep.trainer.config import TraceSection

    with tempfile.TemporaryDirectory(prefix="keepstep-") as root:
        steps = (WARM_UP + rounds) * len(MODES)
        config = {**SHAPES[shape], "data": TEXT, "run": {"root": root, "steps": steps}}
        run_ranks(world_size, measure, root, config, rounds)
        seconds = json.loads((Path(root) / "seconds.json").read_text())
    nothing, norms, layers = (seconds[mode] for mode in MODES)
    step_s = statistics.median(nothing)
    norms_s = statistics.median(more - less for more, less in zip(norms, nothing, strict=True))
    layers_s = statistics.median(more - less for more, less in zip(layers, norms, strict=True))
    interval = TraceSection().interval
    return {
        "shape": shape,
        "ranks": world_size,
        "rounds": rounds,
        "step_ms": round(1e3 * step_s, 2),
        "norms_ms": round(1e3 * norms_s, 3),
        "layers_ms": round(1e3 * layers_s, 3),
        "interval": interval,
        "share": round((norms_s + layers_s / interval) / step_s, 5),
        "load": os.getloadavg()[0],
        "seconds": {mode: [round(each, 6) for each in values] for mode, values in seconds.items()},
    }


def table_of(results: Sequence[dict[str, Any]]) -> Table:
    table = Table("shape", "ranks", "step ms", "norms, each step, ms", "layers, a sampled step, ms", "at the default interval")
    for each in results:
        numbers = f"{each['step_ms']:.1f}", f"{each['norms_ms']:.2f}", f"{each['layers_ms']:.2f}", f"{each['share']:.2%}"
        table.add_row(each["shape"], str(each["ranks"]), *numbers)
    return table


def verdict(result: dict[str, Any]) -> Verdict:
    """No target of its own: it is a part of what everything together may cost (throughput.py)."""
    numbers = f"{result['share']:.2%} of a step of {result['step_ms']:.0f} ms"
    return Verdict(what=f"looking into layers, {result['shape']}, {result['ranks']} rank(s)", target="(a figure)", result=numbers, met=None)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=60)
    made.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    made.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    options = made.parse_args()
    rounds, ranks, shapes = (15, [1], ["small"]) if options.quick else (options.rounds, options.ranks, options.shapes)
    began_on, results = machine(), []
    for shape in shapes:
        for world_size in ranks:
            results.append(result(shape, world_size, rounds))
            print({key: value for key, value in results[-1].items() if key != "seconds"}, flush=True)
    Console(width=110).print(table_of(results))
    publish("layers", [verdict(each) for each in results], results, began_on=began_on)


if __name__ == "__main__":
    main()
