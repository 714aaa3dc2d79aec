"""What a save costs training: the stall, and how much slower steps are while a checkpoint is written in the background.

    python benchmarks/slowdown.py                   results/slowdown.json and a table
    python benchmarks/slowdown.py --quick

Two ranks train the GPT (FSDP2, gloo, one thread each) and save a state of some 190 MB through real persisters, one at the default niceness
and one that competes as any process does. Stretches of steps alternate: without saves, and with a save as soon as the last one is durable:
every step of such a stretch begins with a checkpoint on its way. A step's time is that of the slower rank, without the stall, which is told
by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import Verdict, machine, parser, publish, spread
from rich.console import Console
from rich.table import Table
from saving import persister

from keepstep.storage.arena import Staging
from keepstep.trainer.attach import Attached
from keepstep.trainer.checkpoint import Checkpointer
from keepstep.trainer.config import CheckpointSection, ModelSection, OptimizerSection
from keepstep.trainer.models import build_model
from keepstep.trainer.optim import ShardOptimizer
from keepstep.trainer.parallel import World, initialise, join, shard
from keepstep.trainer.state import tensors_of

RANKS: Final = 2
MODEL: Final = ModelSection(layers=5, width=512, heads=8, context=64, dropout=0.0)
VOCABULARY, SAMPLES = 512, 2
NICE: Final = CheckpointSection().nice
ALONE, POLITE, EAGER = "no save", f"niceness {NICE}", "niceness 0"
DEADLINE_S: Final = 300.0
ROUNDS, STEPS, QUICK_ROUNDS, QUICK_STEPS = 4, 8, 1, 6

Stretch = dict[str, list[float]]  # "step": seconds of each; "stall": of each save


class Training:
    """One rank's model and optimizer."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.model = build_model(MODEL, VOCABULARY)
        shard(self.model, world, precision="fp32", reshard=False)
        self.model.to_empty(device=world.device)
        initialise(self.model, seed=0)
        self.optimizer = ShardOptimizer(self.model, OptimizerSection())
        self.tensors = tensors_of(self.model, self.optimizer)

    def step(self) -> float:
        """Seconds that the slower rank took."""
        started = time.perf_counter()
        tokens_BT = torch.randint(VOCABULARY, (SAMPLES, MODEL.context + 1))
        logits_BTV = self.model(tokens_BT[:, :-1])
        torch.autograd.backward(F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten()))
        self.optimizer.take_gradients()
        self.optimizer.update(lr=1e-4, scale=1.0)
        return float(self._world.gather([time.perf_counter() - started]).max())

    def stretch(self, saver: Checkpointer | None, first: int, steps: int) -> Stretch:
        """`steps` of them, with a save whenever no rank is busy with one."""
        found: Stretch = {"step": [], "stall": []}
        for number in range(first, first + steps):
            if saver is not None and not self._world.gather([saver.busy]).any():
                assert saver.save(number, self.tensors, {})
                found["stall"].append(saver.stall_s)
            found["step"].append(self.step())
        while saver is not None and self._world.gather([saver.busy]).any():
            time.sleep(0.01)
        return found


def run_rank(out: Path, sockets: Mapping[str, str], rounds: int, steps: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(int(os.environ["RANK"]))
    world = join(Attached(None), dist.FileStore(str(out.with_suffix(".store")), RANKS))
    training = Training(world)
    training.step()
    savers = {}
    for name, socket in sockets.items():
        staging = Staging.connect(socket, attempt=1, rank=world.rank, world_size=RANKS)
        savers[name] = Checkpointer(staging, rank=world.rank, attempt=1, nonce="bench")
        savers[name].get_ready(training.tensors)
    found: list[dict[str, Stretch]] = []
    at = 1
    for round_ in range(rounds + 1):  # the first one, in which the buffers are filled for the first time, does not count
        row: dict[str, Stretch] = {}
        for name in (POLITE, ALONE, EAGER, f"{ALONE} again") if round_ % 2 else (EAGER, ALONE, POLITE, f"{ALONE} again"):
            row[name] = training.stretch(savers.get(name), at, steps)
            at += steps
        found.append(row)
    if world.rank == 0:
        out.write_text(json.dumps(found[1:]))
    dist.destroy_process_group()


def run_ranks(rounds: int, steps: int) -> list[dict[str, Stretch]]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="keepstep-bench-")))
        niceness = {POLITE: NICE, EAGER: 0}
        sockets = {name: stack.enter_context(persister(str(folder / f"root{nice}"), nice=nice)) for name, nice in niceness.items()}
        out = folder / "found.json"
        command = [sys.executable, __file__, "--rank", json.dumps([str(out), sockets, rounds, steps])]
        ranks = []
        for rank in range(RANKS):
            environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))  # as the agent starts them
        try:
            assert [rank.wait(DEADLINE_S) for rank in ranks] == [0] * RANKS
        finally:
            for rank in ranks:
                rank.kill()
        found: list[dict[str, Stretch]] = json.loads(out.read_text())
        return found


def slower_by(row: Mapping[str, Stretch], name: str) -> float:
    """In per cent, against the steps of the same round in which nothing was saved. Means: a step that waits long must count."""
    alone = [*row[ALONE]["step"], *row[f"{ALONE} again"]["step"]]
    return 100 * (statistics.mean(row[name]["step"]) / statistics.mean(alone) - 1)


def extra_ms(row: Mapping[str, Stretch], name: str) -> float:
    """Of steps, per save: what a checkpoint costs beside its stall."""
    alone = statistics.mean([*row[ALONE]["step"], *row[f"{ALONE} again"]["step"]])
    return 1e3 * sum(seconds - alone for seconds in row[name]["step"]) / max(1, len(row[name]["stall"]))


def show(found: list[dict[str, Stretch]]) -> None:
    table = Table(
        "", "a step", "slower by", "stall of a save", "other cost of a save", title="two ranks, while a checkpoint is being written"
    )
    for name in (ALONE, POLITE, EAGER):
        steps = [1e3 * seconds for row in found for seconds in row[name]["step"]]
        stalls = [1e3 * seconds for row in found for seconds in row[name]["stall"]]
        saves = [
            spread(values, unit, 1)
            for values, unit in ((_each(found, slower_by, name), "%"), (stalls, "ms"), (_each(found, extra_ms, name), "ms"))
        ]
        table.add_row(name, spread(steps, "ms", 0), *(saves if stalls else ("", "", "")))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _each(found: list[dict[str, Stretch]], measure: Any, name: str) -> list[float]:
    return [measure(row, name) for row in found]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=0)
    arguments.add_argument("--rank", default="", help="for its own use")
    options = arguments.parse_args()
    if options.rank:
        out, sockets, rounds, steps = json.loads(options.rank)
        run_rank(Path(out), sockets, rounds, steps)
        return
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    began_on = machine()
    found = run_ranks(rounds, QUICK_STEPS if options.quick else STEPS)
    show(found)
    polite, eager = (_each(found, slower_by, name) for name in (POLITE, EAGER))
    verdict = Verdict(
        what="steps while a checkpoint is written, 2 ranks, 2 x 95 MB",
        target="slower by <= 10 %",
        result=f"by {spread(polite, '%', 1)}",
        met=statistics.median(polite) <= 10,
        note=f"at niceness 0 by {spread(eager, '%', 1)}",
    )
    publish("slowdown", [verdict], found, began_on=began_on)


if __name__ == "__main__":
    main()
