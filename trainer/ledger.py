"""Proof that every sample was consumed exactly once: what ranks say they consumed, against the canonical order.

Each rank adds [first turn, last turn, CRC-32 of its rows] to the record of a step: which samples it took its rows for, and what those rows
really were. The records of a history prove the promise when, for each step, the turns tile the step's without gap or overlap, and the rows
are those that the root's tokens hold at these places of the order.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keepstep.storage.store import Store

from .config import TrainerConfig
from .data import Feed, feed_for
from .samples import Rows, Samples, rows_of, samples_of
from .tokens import open_tokens

if TYPE_CHECKING:
    from .loader import MicroBatch

Entry = tuple[int, int, int]  # first turn, last turn, CRC-32


def entry_of(parts: Sequence[MicroBatch]) -> Entry:
    """What one rank was fed in a step: its micro-batches, in order."""
    fed = [part for part in parts if part.counts] or parts[:1]
    assert all(one.turns[1] == next_.turns[0] for one, next_ in pairwise(fed)), "a rank's samples follow each other"
    crc = 0
    for part in fed:
        crc = _crc(part.rows, crc) if part.counts else crc
    return fed[0].turns[0], fed[-1].turns[1], crc


def _crc(rows: Rows, crc: int = 0) -> int:
    """Row by row, so that parts of a batch give what the whole of it gives."""
    both = np.concatenate(rows, axis=1).astype("<i8", copy=False)
    return zlib.crc32(both.tobytes(), crc)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """What the records of a history prove."""

    samples: int  # that were consumed as they should
    problems: tuple[str, ...]

    @property
    def sentence(self) -> str:
        if not self.problems:
            return f"ledger: {self.samples} samples, each exactly once"
        more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
        return f"ledger: not proved: {self.problems[0]}{more}"


def prove(store: Store, config: TrainerConfig, records: Sequence[Mapping[str, Any]], *, skips: Sequence[str] = ()) -> Ledger:
    """`check_ledger` with the tokens of a root, which are read where they lie.

    Args:
        config: that the history ends with.
        skips: in force at its end, on top of run.toml's.

    Raises:
        ValueError: the root holds no tokens, or they are damaged.
    """
    with tempfile.TemporaryDirectory(prefix="keepstep-") as scratch:  # mapped files stay readable after they are gone
        samples = samples_of(open_tokens(store, Path(scratch), streaming=True), config)
    return check_ledger(records, samples, feed_for(samples.sizes, config, skips=skips))


def check_ledger(records: Sequence[Mapping[str, Any]], samples: Samples, feed: Feed) -> Ledger:
    """Compares the step records of one history, steps 1 to the last in order, with what should have been consumed.

    Args:
        feed: with the skips that are in force at its end. None of them changes what came before it, so one feed fits the whole history.
    """
    problems: list[str] = []
    consumed = 0
    for expected, record in enumerate(records, start=1):
        if record["step"] != expected:
            problems.append(f"step {expected} has no record, or two: a record of step {record['step']} stands in its place")
            break
        found = _problems(expected, record, samples, feed)
        consumed += 0 if found else feed.samples_per_step
        problems += [f"step {expected}: {problem}" for problem in found]
    return Ledger(samples=consumed, problems=tuple(problems))


def _problems(step: int, record: Mapping[str, Any], samples: Samples, feed: Feed) -> list[str]:
    turn, last = feed.turns(step)
    out = []
    rows = rows_of(samples, feed, turn, last)
    for rank, (first, end, crc) in enumerate(record["ledger"]):
        if first != turn:
            what = "a gap" if first > turn else "consumed twice"
            out.append(f"{what}: samples {min(first, turn)} to {max(first, turn)}, before those of rank {rank}")
        begin = feed.turns(step)[0]
        if _crc(rows.part(max(0, first - begin), max(0, end - begin))) != crc:
            out.append(f"the rows that rank {rank} was fed are not samples {first} to {end}")
        turn = end
    if turn != last:
        out.append(
            f"{'a gap' if turn < last else 'consumed twice'}: samples {min(turn, last)} to {max(turn, last)}, behind those of the last rank"
        )
    return out
