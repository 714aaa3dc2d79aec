"""When which rank finished which step: written by every process that trains, read by benchmarks/peers.py. Torch-free."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ENV_FOLDER: Final = "BENCH_FOLDER"
_RECORD: Final = struct.Struct("<qqqdd")


class StepLog:
    """This process's file of finished steps.

    Args:
        life: grows where one process begins anew, as under in-process restart.
    """

    def __init__(self, rank: int, life: int = 0) -> None:
        self._rank, self._life = rank, life
        folder = Path(os.environ[ENV_FOLDER]) / "steps"
        folder.mkdir(exist_ok=True)
        self._file = os.open(folder / str(os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def stepped(self, step: int, loss: float) -> None:
        os.write(self._file, _RECORD.pack(self._life, self._rank, step, time.monotonic(), loss))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One rank's end of one step. `at` is time.monotonic(), one clock for all processes of a machine."""

    pid: int
    life: int
    rank: int
    step: int
    at: float
    loss: float


def read_steps(folder: Path) -> list[Step]:
    """Everything that any process has written so far, in the order of time."""
    found = []
    for path in folder.glob("steps/*"):
        content = path.read_bytes()
        whole = content[: len(content) // _RECORD.size * _RECORD.size]
        for life, rank, step, at, loss in _RECORD.iter_unpack(whole):
            found.append(Step(pid=int(path.name), life=life, rank=rank, step=step, at=at, loss=loss))
    return sorted(found, key=lambda each: each.at)


def all_stepped(steps: Iterable[Step], *, ranks: int, since: float, dead: Set[int] = frozenset()) -> Step | None:
    """The last rank's end of the first step that all ranks finished after `since`, none of them in a process of `dead`.

    Survivors that end the step in which others died do not count: the dead never finish that one, and who replaces them redoes an older
    one or goes on with the next.
    """
    finished: dict[int, dict[int, Step]] = {}
    for each in steps:
        if each.at > since and each.pid not in dead:
            by_rank = finished.setdefault(each.step, {})
            by_rank[each.rank] = each
            if len(by_rank) == ranks:
                return each
    return None


def newest_pids(steps: Iterable[Step]) -> Mapping[int, int]:
    """Rank -> the process that finished its newest step."""
    return {each.rank: each.pid for each in steps}


def same_bits(steps: Iterable[Step]) -> bool:
    """Whether every step that was done more than once had the same loss each time, on each rank, to the bit."""
    losses: dict[tuple[int, int], float] = {}
    return all(losses.setdefault((each.rank, each.step), each.loss) == each.loss for each in steps)
