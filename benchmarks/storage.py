"""Saving and restoring a state dict in a local folder: keepstep beside dcp.save and dcp.load and the raw floors, in alternating runs.

    python benchmarks/storage.py                    two shapes, results/storage.json and tables
    python benchmarks/storage.py --quick

One process holds the whole state. keepstep's side is the code that runs train with: `Checkpointer` into the shared memory of a real
persister process, which hashes and writes; `restore` with every byte compared with its hash. Everybody reads into tensors that exist
already, from a warm page cache; everybody's checkpoint is durable (fsync) when its clock stops.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from common import Verdict, spread
from saving import BIG, SMALL, Contender, Dcp, Keepstep, Measured, Place, State, Times, compare, only_rank, ratios, timed

from keepstep.trainer.state import byte_view

WRITE_BYTES = 16 << 20
VIEWS = 512  # of one preadv
ROUNDS, QUICK_ROUNDS = 9, 3


class Floor(Contender):
    """What the machine does without any of our work: no hashes, no names, no commit."""

    name = "floor"

    def __init__(self, root: Path) -> None:
        self._root = root
        self._memory: dict[int, State] = {}
        self._reused = root / "reused"

    def run(self, key: str, state: State, target: State) -> Times:
        path, blob = self._root / key, memoryview(bytearray(b"".join(byte_view(tensor) for tensor in state.values())))
        memory = self._memory.setdefault(len(state), {name: torch.zeros_like(tensor) for name, tensor in state.items()})
        self._write(self._reused, blob)  # makes it, or brings it back
        return {
            "save: memcpy": timed(lambda: self._copy(memory, state)),
            "save: pwrite + fsync": timed(lambda: self._write(path, blob)),
            "save: pwrite + fsync, reused file": timed(lambda: self._write(self._reused, blob)),
            "load: preadv": timed(lambda: self._read(path, target)),
            "load: memcpy": timed(lambda: self._copy(target, memory)),
        }

    def _copy(self, target: State, source: State) -> None:
        for name, tensor in source.items():
            target[name].copy_(tensor)

    def _write(self, path: Path, blob: memoryview) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        for start in range(0, len(blob), WRITE_BYTES):
            os.pwrite(descriptor, blob[start : start + WRITE_BYTES], start)
        os.fsync(descriptor)
        os.close(descriptor)

    def _read(self, path: Path, target: State) -> None:
        views, at = [byte_view(tensor) for tensor in target.values()], 0
        with path.open("rb", buffering=0) as file:
            for start in range(0, len(views), VIEWS):
                at += os.preadv(file.fileno(), views[start : start + VIEWS], at)


@contextlib.contextmanager
def local() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="keepstep-bench-") as folder, only_rank(f"{folder}/keepstep") as staging:
        root = Path(folder) / "peers"
        ours = Keepstep(f"{folder}/keepstep", staging)

        def clean() -> None:
            ours.clean()
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()

        yield Place("local", (ours, Dcp("dcp", str(root)), Floor(root)), clean)


def verdicts(measured: Mapping[str, Measured]) -> list[Verdict]:
    """Ratios of each round, then their median: neighbours of the machine hit both sides of a ratio."""
    waits, persist, durable = "keepstep: save: training waits", "keepstep: save: persist", "keepstep: save: durable"
    disk, memory = "keepstep: load: restore", "keepstep: load: restore from memory"
    rows = [
        ("training waits for a save", BIG, waits, "floor: save: memcpy", 1.2),
        ("training waits for a save", SMALL, waits, "floor: save: memcpy", 1.5),
        ("persist, local, beside a new file", BIG, persist, "floor: save: pwrite + fsync", 1.15),
        ("persist, local, beside a reused file", BIG, persist, "floor: save: pwrite + fsync, reused file", 1.15),
        ("restore, verified, beside preadv", BIG, disk, "floor: load: preadv", 1.3),
        ("restore from memory, verified, beside memcpy", BIG, memory, "floor: load: memcpy", 1.3),
    ]
    found = [_at_most(what, shape, ratios(measured[shape], one, floor), limit) for what, shape, one, floor, limit in rows]
    found.append(_at_least("persist, local", ratios(measured[SMALL], "dcp: save: dcp.save", durable), 10, "dcp.save"))
    found.append(_at_least("restore, verified", ratios(measured[SMALL], "dcp: load: dcp.load", disk), 20, "dcp.load"))
    return found


def _at_most(what: str, shape: str, found: list[float], limit: float) -> Verdict:
    middle = statistics.median(found)
    return Verdict(what=f"{what}, {shape}", target=f"<= {limit:g} x", result=spread(found, "x"), met=middle <= limit)


def _at_least(what: str, found: list[float], limit: float, peer: str) -> Verdict:
    middle = statistics.median(found)
    return Verdict(what=f"{what}, {SMALL}", target=f">= {limit:g} x as fast as {peer}", result=spread(found, "x"), met=middle >= limit)


if __name__ == "__main__":
    compare(__doc__, "storage", local, verdicts, rounds=ROUNDS, quick_rounds=QUICK_ROUNDS)
