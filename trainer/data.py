"""Which samples a rank trains on: pure functions of the step.

The canonical order is an endless sequence of positions. Position p is sample `order(p)`: the samples of an epoch in a seeded order,
then those of the next epoch in another. Step n consumes the positions [(n - 1) B, n B), B = batch_tokens / context, whatever the world
size. So the data position of a run is its step, and nothing about it needs to be saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from .tokens import TokenArray

Positions = npt.NDArray[np.uint64]
Batch = npt.NDArray[np.int64]
_ROUNDS: Final = 6
_U64: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """Everything that decides what is consumed when."""

    seed: int
    num_samples: int  # of an epoch
    samples_per_step: int

    def positions(self, step: int) -> tuple[int, int]:
        """[first, last) of the canonical order that the update number `step` (from 1) consumes."""
        return (step - 1) * self.samples_per_step, step * self.samples_per_step

    def share(self, step: int, rank: int, world_size: int) -> tuple[int, int]:
        """A rank's contiguous part of `positions(step)`; parts differ by one sample at most."""
        first, _ = self.positions(step)
        return tuple(first + self.samples_per_step * r // world_size for r in (rank, rank + 1))  # type: ignore[return-value]

    def samples(self, first: int, last: int) -> Positions:
        """The samples at the positions [first, last), uint64."""
        positions = np.arange(first, last, dtype=np.uint64)
        epochs, places = np.divmod(positions, np.uint64(self.num_samples))
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            places[chosen] = shuffled(places[chosen], self.num_samples, key=_mix_int(self.seed + 0x9E3779B97F4A7C15 * (int(epoch) + 1)))
        return places


def feed_for(tokens: TokenArray, *, seed: int, context: int, batch_tokens: int) -> Feed:
    """Raises ValueError when the text is shorter than one sample or the batch is no whole number of samples."""
    num_samples = (len(tokens) - 1) // context
    if num_samples < 1:
        raise ValueError(
            f"data.source gave {len(tokens)} training tokens, fewer than one sample (model.context = {context}): give it more text"
        )
    if batch_tokens % context:
        raise ValueError(f"train.batch_tokens = {batch_tokens} must be a multiple of model.context = {context}")
    return Feed(seed=seed, num_samples=num_samples, samples_per_step=batch_tokens // context)


def rows(tokens: TokenArray, samples: Positions, context: int) -> Batch:
    """(samples, context + 1) token ids as int64: inputs are [:, :-1], targets [:, 1:]. Sample i starts at token i * context."""
    starts = samples.astype(np.int64) * context
    ids: Batch = tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64)
    return ids


def micro_batches(first: int, last: int, largest_share: int, micro_batch_samples: int) -> list[tuple[int, int]]:
    """[first, last) cut into parts of at most `micro_batch_samples` (0: any size).

    Every rank of a step gets equally many, because each forward pass communicates: a rank with fewer samples gets empty parts at the end.
    """
    size = micro_batch_samples or max(1, largest_share)
    count = -(-largest_share // size)
    return [(min(first + i * size, last), min(first + (i + 1) * size, last)) for i in range(count)]


def shuffled(places: Positions, count: int, *, key: int) -> Positions:
    """A keyed permutation of range(count), element by element and without a table: a balanced Feistel network over the next power of
    four, walked until it falls below `count` (Black and Rogaway 2002). NumPy's own permutations may change between versions."""
    half = np.uint64(max(1, (max(1, count - 1).bit_length() + 1) // 2))
    out = places.astype(np.uint64)
    todo = np.ones(out.shape, dtype=np.bool_)
    while todo.any():
        out[todo] = _feistel(out[todo], half, key)
        todo &= out >= np.uint64(count)
    return out


def _feistel(values: Positions, half: np.uint64, key: int) -> Positions:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for i in range(_ROUNDS):
        left, right = right, left ^ (_mix(right + np.uint64(_mix_int(key + i))) & mask)
    return (left << half) | right


def _mix(values: Positions) -> Positions:
    """SplitMix64's finaliser (Steele et al. 2014); arithmetic is modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mix_int(value: int) -> int:
    return int(_mix(np.array([(value + 0x9E3779B97F4A7C15) & _U64], dtype=np.uint64))[0])
