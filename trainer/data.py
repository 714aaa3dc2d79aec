"""Which samples a rank trains on: pure functions of the step. Pure.

*Positions* count the canonical order (order.py), *turns* count what is consumed of it: all positions but those that are skipped. Step n
consumes the turns [(n - 1) B, n B), B = batch_tokens / context, whatever the world size. So the data position of a run is its step and
the list of skips. A skip changes nothing before its first position.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from keepstep.storage.skips import Range, ranges

from .config import TrainerConfig
from .order import Order, Positions, apportion


@dataclass(frozen=True, slots=True)
class _Gaps:
    """Skips as tables to bisect, one entry for each."""

    starts: Positions  # its first position
    turns: Positions  # the first turn behind it
    before: Positions  # positions skipped before it; at the end those of all

    @staticmethod
    def of(skips: Sequence[Range]) -> _Gaps:
        starts = np.array([first for first, _ in skips], dtype=np.uint64)
        lengths = np.array([last - first for first, last in skips], dtype=np.uint64)
        before = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(lengths, dtype=np.uint64)])
        return _Gaps(starts, starts - before[:-1], before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """Everything that decides what is consumed when."""

    order: Order
    samples_per_step: int
    skips: tuple[Range, ...] = ()  # of positions; sorted, apart from each other
    _gaps: _Gaps = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert all(first < last for first, last in self.skips)
        assert all(last < first for (_, last), (first, _) in pairwise(self.skips))
        object.__setattr__(self, "_gaps", _Gaps.of(self.skips))

    def turns(self, step: int) -> Range:
        """[first, last) that the update number `step` (from 1) consumes."""
        return (step - 1) * self.samples_per_step, step * self.samples_per_step

    def share(self, step: int, rank: int, world_size: int) -> Range:
        """A rank's contiguous part of `turns(step)`; parts differ by one sample at most, but the last ones of "streams" by more."""
        first, last = self.turns(step)
        if self.order.kind == "streams":  # as DTensor cuts rows: the state of the model that belongs to them lies where they are fed
            largest = -(-self.samples_per_step // world_size)
            return min(first + rank * largest, last), min(first + (rank + 1) * largest, last)
        return tuple(first + self.samples_per_step * r // world_size for r in (rank, rank + 1))  # type: ignore[return-value]

    def at(self, first: int, last: int) -> Positions:
        """The positions of the turns [first, last), in O(log skips) each."""
        turns = np.arange(first, last, dtype=np.uint64)
        return turns + self._gaps.before[np.searchsorted(self._gaps.turns, turns, side="right")]

    def samples(self, first: int, last: int) -> Positions:
        """The samples of the turns [first, last)."""
        return self.order.samples(self.at(first, last))

    def goes_on(self, first: int, last: int) -> npt.NDArray[np.bool_]:
        """Of the turns [first, last) in the order "streams": whether each row's tokens follow those of that row in the step before."""
        if first < self.samples_per_step:
            return np.zeros(last - first, dtype=np.bool_)
        before = self.samples(first - self.samples_per_step, last - self.samples_per_step)
        follows: npt.NDArray[np.bool_] = self.samples(first, last) == before + np.uint64(1)
        return follows

    def positions(self, step: int) -> Range:
        """From the first position that the step consumes to behind its last; skipped ones may lie between."""
        first, _ = self.turns(step)
        return int(self.at(first, first + 1)[0]), self.end(step)

    def end(self, step: int) -> int:
        """Behind the last position that the first `step` steps consume. No skip that lies at or after it has changed them."""
        last = step * self.samples_per_step
        return int(self.at(last - 1, last)[0]) + 1 if last else 0

    def turn(self, position: int) -> int | None:
        """Inverse of `at`; None for a position that is skipped."""
        i = int(np.searchsorted(self._gaps.starts, np.uint64(position), side="right"))
        if i and position < self.skips[i - 1][1]:
            return None
        return position - int(self._gaps.before[i])


def skips_before(skips: Iterable[Range], position: int) -> tuple[Range, ...]:
    """What of them lies before a position, and so has decided what was consumed up to it."""
    return tuple((first, min(last, position)) for first, last in skips if first < position)


def feed_for(sizes: Sequence[int], config: TrainerConfig, *, skips: Sequence[str] = ()) -> Feed:
    """What run.toml says, with `skips` on top of its own.

    Args:
        sizes: samples of each source, see samples.py.

    Raises:
        ValueError: the batch is no whole number of samples, a source is too small for its weight, or a skip is malformed.
    """
    context, batch_tokens = config.model.context, config.train.batch_tokens
    if batch_tokens % context:
        raise ValueError(f"train.batch_tokens = {batch_tokens} must be a multiple of model.context = {context}")
    quotas = apportion(config.data.weights or sizes)
    if 0 in quotas:
        raise ValueError(
            f"data.weights: the share of data.sources[{quotas.index(0)}] is below 1/65536 (without weights: by its size), and it would "
            "never be trained on; give it a larger weight, or take it out"
        )
    samples_per_step = batch_tokens // context
    if config.data.order == "streams" and min(sizes) < samples_per_step:
        raise ValueError(
            f'data.order = "streams" needs a sample for each of the {samples_per_step} rows of a batch (train.batch_tokens / '
            f"model.context), and {config.data.source_key(0)} gave {min(sizes)}: give it more text, or make batches smaller"
        )
    order = Order(
        seed=config.run.seed,
        sizes=tuple(size - size % samples_per_step if config.data.order == "streams" else size for size in sizes),
        quotas=quotas,
        kind=config.data.order,
        block_samples=config.data.block_samples,
        streams=samples_per_step if config.data.order == "streams" else 1,
    )
    return Feed(order=order, samples_per_step=samples_per_step, skips=ranges((*config.data.skip, *skips)))


def micro_batches(first: int, last: int, largest_share: int, micro_batch_samples: int) -> list[Range]:
    """[first, last) cut into parts of at most `micro_batch_samples` (0: any size).

    Every rank of a step gets equally many, because each forward pass communicates: a rank with fewer samples gets empty parts at the end.
    """
    size = micro_batch_samples or max(1, largest_share)
    count = -(-largest_share // size)
    return [(min(first + i * size, last), min(first + (i + 1) * size, last)) for i in range(count)]
