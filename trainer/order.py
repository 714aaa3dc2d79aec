"""The canonical order: which sample stands at which position. Pure.

An endless sequence of positions, each computed in O(1) from its number: a position of 10^15 costs what position 0 costs.

    position --(cycle of slots)--> source, how many of its samples came before --(divmod)--> epoch, place --(permutation)--> sample

**Sources.** A cycle has `quotas[s]` slots of source s, spread evenly and alike in every cycle. The quotas are the weights, as they are
written, reduced (0.75 and 0.25: three slots and one); where that makes more than 65,536 slots, rounded by largest remainders to so many.
With share = quota / slots of a cycle, any window of W positions holds W * share samples of a source, off by 1 + num_sources * share at the
most.

**Epochs.** Each source has its own, of its own length, each in an order of its own: see `Kind`. Arithmetic is on integers only: NumPy's own
permutations may change between versions (NEP 19), and floats would end at 2^53. tests/unit/test_trainer_order.py pins it all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.uint64]
# shuffled: any sample may follow any other. blocks: blocks of consecutive samples in a seeded order, and a seeded order inside each: what
# is read next lies close to what was read last. sequential: as the source has them.
# streams: S of them, each a run of consecutive samples, take turns: sample j of the next S follows sample j of these.
Kind = Literal["shuffled", "blocks", "sequential", "streams"]
SLOTS: Final = 1 << 16  # of a cycle, at the most: the resolution of weights
_ROUNDS: Final = 6
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_SOURCES: Final = np.uint64(0xD1342543DE82EF95)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Samples are numbered through: those of source 0, then those of source 1, ..."""

    seed: int
    sizes: tuple[int, ...]  # samples of each source, at least one
    quotas: tuple[int, ...] = (1,)  # slots of each source in a cycle, at least one
    kind: Kind = "shuffled"
    block_samples: int = 1024  # of "blocks"
    streams: int = 1  # of "streams", whose sizes are multiples of it

    def samples(self, positions: Positions) -> Positions:
        """The sample at each position."""
        sources, drawn = self.sources(positions)
        out = np.empty_like(drawn)
        for source in np.unique(sources).tolist():
            chosen = sources == source
            out[chosen] = self._of_source(source, drawn[chosen]) + np.uint64(sum(self.sizes[:source]))
        return out

    def sources(self, positions: Positions) -> tuple[npt.NDArray[np.int64], Positions]:
        """(source of each position, how many of that source's samples stand before it)."""
        slot_sources, slot_ranks = _cycle(self.quotas)
        cycles, slots = np.divmod(positions.astype(np.uint64), np.uint64(len(slot_sources)))
        sources = slot_sources[slots]
        return sources, cycles * np.array(self.quotas, dtype=np.uint64)[sources] + slot_ranks[slots]

    def drawn(self, position: int) -> tuple[int, ...]:
        """How many samples of each source stand before a position."""
        slot_sources, _ = _cycle(self.quotas)
        cycles, slots = divmod(position, len(slot_sources))
        in_cycle = np.bincount(slot_sources[:slots], minlength=len(self.quotas)).tolist()
        return tuple(cycles * quota + count for quota, count in zip(self.quotas, in_cycle, strict=True))

    def positions_of(self, sample: int, first: int, last: int) -> Positions:
        """Where a sample stands among the positions [first, last), ascending: once in each epoch of its source. Inverse of `samples`."""
        starts = np.cumsum((0, *self.sizes))
        source = int(np.searchsorted(starts, sample, side="right")) - 1
        size, quota = self.sizes[source], np.uint64(self.quotas[source])
        drawn_first, drawn_last = self.drawn(first)[source], self.drawn(last)[source]
        epochs = np.arange(drawn_first // size, -(-drawn_last // size), dtype=np.uint64)
        drawn = epochs * np.uint64(size) + self._places(source, np.full_like(epochs, sample - int(starts[source])), epochs)
        drawn = drawn[(drawn >= np.uint64(drawn_first)) & (drawn < np.uint64(drawn_last))]
        slot_sources, _ = _cycle(self.quotas)
        slots = np.flatnonzero(slot_sources == source).astype(np.uint64)
        found: Positions = drawn // quota * np.uint64(len(slot_sources)) + slots[drawn % quota]
        return found

    def _of_source(self, source: int, drawn: Positions) -> Positions:
        size = self.sizes[source]
        epochs, places = np.divmod(drawn, np.uint64(size))
        if self.kind == "sequential":
            return places
        if self.kind == "streams":
            turns, streams = np.divmod(places, np.uint64(self.streams))
            return streams * np.uint64(size // self.streams) + turns
        keys = self._keys(source, epochs)
        return in_blocks(places, size, self.block_samples, keys) if self.kind == "blocks" else shuffled(places, size, keys)

    def _places(self, source: int, samples: Positions, epochs: Positions) -> Positions:
        """Inverse of `_of_source`, for each epoch."""
        size = self.sizes[source]
        if self.kind == "sequential":
            return samples
        if self.kind == "streams":
            streams, turns = np.divmod(samples, np.uint64(size // self.streams))
            return turns * np.uint64(self.streams) + streams
        keys = self._keys(source, epochs)
        return out_of_blocks(samples, size, self.block_samples, keys) if self.kind == "blocks" else unshuffled(samples, size, keys)

    def _keys(self, source: int, epochs: Positions) -> Positions:
        """Of the permutations of these epochs."""
        seeds = np.full_like(epochs, self.seed)
        if source:
            seeds = hashed(seeds + np.full_like(epochs, source) * _SOURCES)
        return hashed(seeds + (epochs + np.uint64(1)) * _GOLDEN)


def apportion(weights: Sequence[float | int]) -> tuple[int, ...]:
    """Quotas for weights: exact where SLOTS suffice, else by largest remainders (ties: the first source); 0 for a weight below that."""
    written = [Fraction(str(weight)) for weight in weights]  # 0.7 is 7/10, not the nearest float64
    shares = [SLOTS * weight / sum(written) for weight in written]
    exact = _reduced([int(weight * lcm(*(other.denominator for other in written))) for weight in written])
    if sum(exact) <= SLOTS:
        return exact
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (quotas[i] - shares[i], i))
    for i in by_remainder[: SLOTS - sum(quotas)]:
        quotas[i] += 1
    return _reduced(quotas)


def _reduced(quotas: Sequence[int]) -> tuple[int, ...]:
    return tuple(quota // gcd(*quotas) for quota in quotas)


@lru_cache(maxsize=8)
def _cycle(quotas: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], Positions]:
    """(source of each slot, how many slots of that source come before it in the cycle).

    Slot j of a source with q slots is due at (j + 1/2) / q of the cycle; slots stand in the order in which they are due (ties: the first
    source). The due times of two sources differ by 2^-34 at least, or not at all, so 2^-40 is fine enough to be exact.
    """
    sources = np.repeat(np.arange(len(quotas)), quotas)
    ranks = np.concatenate([np.arange(quota) for quota in quotas])
    due = ((2 * ranks + 1) << 40) // (2 * np.array(quotas)[sources])
    by_due = np.argsort(due, kind="stable")
    return sources[by_due], ranks[by_due].astype(np.uint64)


def in_blocks(places: Positions, count: int, block: int, keys: Positions) -> Positions:
    """A keyed permutation of range(count) that keeps blocks of `block` consecutive numbers together. The last block may be short; it stands
    at a keyed place among the others.

    Args:
        keys: of the permutation to take, one for each place.
    """
    num_whole, rest = (np.uint64(part) for part in divmod(count, block))
    short_first = hashed(keys) % (num_whole + np.uint64(1)) * np.uint64(block)
    is_short = (places >= short_first) & (places - short_first < rest)
    blocks, offsets = np.divmod(np.where(places < short_first, places, places - rest), np.uint64(block))
    blocks = np.where(is_short, num_whole, shuffled(blocks, int(num_whole), keys))
    inside = hashed(keys + (blocks + np.uint64(1)) * _GOLDEN)
    offsets = np.where(is_short, shuffled(places - short_first, int(rest), inside), shuffled(offsets, block, inside))
    return blocks * np.uint64(block) + offsets


def out_of_blocks(values: Positions, count: int, block: int, keys: Positions) -> Positions:
    """Inverse of `in_blocks`."""
    num_whole, rest = (np.uint64(part) for part in divmod(count, block))
    short_first = hashed(keys) % (num_whole + np.uint64(1)) * np.uint64(block)
    blocks, offsets = np.divmod(values, np.uint64(block))
    is_short = blocks == num_whole
    inside = hashed(keys + (blocks + np.uint64(1)) * _GOLDEN)
    places = unshuffled(blocks, int(num_whole), keys) * np.uint64(block) + unshuffled(offsets, block, inside)
    places = np.where(places < short_first, places, places + rest)
    return np.where(is_short, short_first + unshuffled(offsets, int(rest), inside), places)


def shuffled(places: Positions, count: int, keys: Positions) -> Positions:
    """A keyed permutation of range(count), element by element and without a table: a balanced Feistel network over the next power of
    four, walked until it falls below `count` (Black and Rogaway 2002). A place that is not below `count` stays where it is.

    Args:
        keys: of the permutation to take, one for each place.
    """
    return _walked(_feistel, places, count, keys)


def unshuffled(values: Positions, count: int, keys: Positions) -> Positions:
    """Inverse of `shuffled`."""
    return _walked(_feistel_back, values, count, keys)


def _walked(permute: Callable[[Positions, np.uint64, Positions], Positions], numbers: Positions, count: int, keys: Positions) -> Positions:
    half = np.uint64(max(1, (max(1, count - 1).bit_length() + 1) // 2))
    out = numbers.astype(np.uint64)
    todo = out < np.uint64(count)
    while todo.any():
        out[todo] = permute(out[todo], half, keys[todo])
        todo &= out >= np.uint64(count)
    return out


def _feistel(values: Positions, half: np.uint64, keys: Positions) -> Positions:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for i in range(_ROUNDS):
        left, right = right, left ^ (_mix(right + hashed(keys + np.uint64(i))) & mask)
    return (left << half) | right


def _feistel_back(values: Positions, half: np.uint64, keys: Positions) -> Positions:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for i in reversed(range(_ROUNDS)):
        left, right = right ^ (_mix(left + hashed(keys + np.uint64(i))) & mask), left
    return (left << half) | right


def hashed(values: Positions) -> Positions:
    """One step of SplitMix64 from each state."""
    return _mix(values + _GOLDEN)


def _mix(values: Positions) -> Positions:
    """SplitMix64's finaliser (Steele et al. 2014); arithmetic is modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
