"""What the data path of a step costs: the order at its beginning and far out, rows, ledger; and what streaming reads in each order.

    python benchmarks/data.py                       results/data.json and two tables
    python benchmarks/data.py --rounds 3 --megabytes 16

A step is 512 samples of 1024 tokens, all on one rank: 64 ranks of 8 samples pay a 64th. Streaming reads a file of tokens in a folder (so
the seconds are those of a local disk, the blocks those of any store), in steps of 32 samples, with a cache of 8 MiB.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
from common import Verdict, machine, parser, publish
from rich.console import Console
from rich.table import Table

from keepstep.storage.manifest import hash_blocks
from keepstep.storage.posix import PosixStore
from keepstep.trainer.data import Feed
from keepstep.trainer.ledger import entry_of
from keepstep.trainer.loader import MicroBatch
from keepstep.trainer.order import Kind, Order
from keepstep.trainer.samples import StreamSamples, rows_of
from keepstep.trainer.streaming import StreamedFile, StreamedTokens
from keepstep.trainer.tokens import Extent

HERE = Path(__file__).resolve().parent
CONTEXT, STEP_SAMPLES, STREAM_SAMPLES = 1024, 512, 32
BLOCK, CACHE = 1 << 20, 8 << 20
FAR = 10**15
SIZES = (10**9, 10**7, 10**8)


class Counting(PosixStore):
    reads = 0

    def get_range(self, key: str, start: int, length: int) -> bytes:
        self.reads += 1
        return super().get_range(key, start, length)


def median_ms(call: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Median, least and most of so many calls, after one that warms up."""
    call()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        seconds.append(1000 * (time.perf_counter() - began))
    return {"median_ms": statistics.median(seconds), "min_ms": min(seconds), "max_ms": max(seconds)}


def computed(rounds: int) -> dict[str, Any]:
    """Milliseconds of a step's parts."""
    tokens = np.zeros(SIZES[1] // 10, dtype=np.uint16)
    samples = StreamSamples(tokens, (Extent(documents=1, tokens=len(tokens)),), CONTEXT)
    positions = np.arange(STEP_SAMPLES, dtype=np.uint64)
    rows = samples.rows(positions, positions)
    found: dict[str, Any] = {}
    for kind in get_args(Kind):
        for sizes, quotas in (((SIZES[0],), (1,)), (SIZES, (7, 2, 1))):
            order = Order(seed=1, sizes=sizes, quotas=quotas, kind=kind)
            for skips in ((), tuple((100 * i, 100 * i + 16) for i in range(1000))):
                feed = Feed(order=order, samples_per_step=STEP_SAMPLES, skips=skips)
                for first in (0, FAR):
                    name = f"order: {kind}, {len(sizes)} source(s), {len(skips)} skips, turn {first:.0e}"
                    found[name] = median_ms(lambda feed=feed, first=first: feed.samples(first, first + STEP_SAMPLES), rounds)  # type: ignore[misc]
    found["rows"] = median_ms(lambda: samples.rows(positions, positions), rounds)
    found["ledger"] = median_ms(lambda: entry_of([MicroBatch(rows, (0, STEP_SAMPLES))]), rounds)
    return found


def streamed(rounds: int, megabytes: int) -> dict[str, Any]:
    """Blocks and milliseconds per step, by order."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(1).integers(0, 1 << 16, megabytes << 19, dtype=np.uint16)
        (Path(folder) / "train.bin").write_bytes(tokens.tobytes())
        hashes = hash_blocks(tokens.data.cast("B"), BLOCK)
        found = {}
        for kind in get_args(Kind):
            store = Counting(Path(folder))
            read = StreamedTokens(
                store, (StreamedFile(key="train.bin", num_tokens=len(tokens), hashes=hashes),), tokens.dtype, BLOCK, CACHE
            )
            samples = StreamSamples(read, (Extent(documents=1, tokens=len(tokens)),), CONTEXT)
            feed = Feed(order=Order(seed=1, sizes=samples.sizes, kind=kind, block_samples=1024), samples_per_step=STREAM_SAMPLES)
            steps = iter(range(1, 1 << 30))

            def step(samples: StreamSamples = samples, feed: Feed = feed, steps: Any = steps) -> None:
                rows_of(samples, feed, *feed.turns(next(steps)))

            times = median_ms(step, rounds * 10)
            found[f"streaming: {kind}"] = times | {"blocks_per_step": store.reads / (rounds * 10 + 1)}
        return found


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=20)
    made.add_argument("--megabytes", type=int, default=256, help="of the streamed file")
    options = made.parse_args()
    rounds, megabytes = (3, 32) if options.quick else (options.rounds, options.megabytes)
    began_on = machine()
    found = computed(rounds) | streamed(rounds, megabytes)
    table = Table("what", "median ms", "least", "most", "blocks of 1 MiB")
    for name, row in found.items():
        numbers = (f"{row[key]:.2f}" for key in ("median_ms", "min_ms", "max_ms"))
        table.add_row(name, *numbers, f"{row['blocks_per_step']:.1f}" if "blocks_per_step" in row else "")
    Console(width=140).print(table)
    slowest = max((row["median_ms"], name) for name, row in found.items() if name.startswith("order"))
    order = Verdict(what="a step's order, the slowest kind", target="(a figure)", result=f"{slowest[0]:.2f} ms, {slowest[1][7:]}", met=None)
    publish("data", [order], found, began_on=began_on)


if __name__ == "__main__":
    main()
