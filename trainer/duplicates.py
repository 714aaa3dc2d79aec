"""Documents that came before: with the same text, or with a similar one.

Exact: the xxh3-128 of every document that was kept, 16 bytes each. Near: MinHash of word 5-grams with 128 permutations and
locality-sensitive hashing, of the library datasketch; the signatures (512 bytes a document, and 4.5 KB for its tables)
decide which of its candidates are similar enough. Both keep the first of those that are alike, in the order in which they come, so what is
left does not depend on how they come in batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from .config import DataSection

PERMUTATIONS: Final = 128
SHINGLE_WORDS: Final = 5
_SEED: Final = 1  # of the permutations
_AT_ONCE: Final = 4096  # shingles: numpy needs 128 numbers for each
_BASE: Final = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
_INVERSE: Final = pow(_BASE, -1, 2**64)
_MIX: Final = 0xBF58476D1CE4E5B9
_MOST: Final = 0.9  # the library has no tables for much higher thresholds, and the signatures decide in any case
_WEIGHTS: Final = (0.1, 0.9)  # of candidates that are none, which costs a comparison, and of duplicates that are no candidates
_ROOM: Final = 1024  # signatures that are made room for at first

Kept = npt.NDArray[np.bool_]


class Filter(Protocol):
    def new(self, texts: Sequence[str]) -> Kept:
        """Which of the next documents are no duplicates of any before."""


def open_filter(config: DataSection, threads: int) -> Filter:
    """Raises ImportError where the library for deduplicate = "near" is missing."""
    match config.deduplicate:
        case "none":
            return EveryDocument()
        case "exact":
            return ExactFilter()
        case "near":
            return NearFilter(config.near_threshold, threads)


class EveryDocument:
    def new(self, texts: Sequence[str]) -> Kept:
        return np.ones(len(texts), dtype=np.bool_)


class ExactFilter:
    """Sorted runs of hashes, each at least twice as long as the next: a document is looked up in a few of them, and moved rarely."""

    def __init__(self) -> None:
        self._runs: list[npt.NDArray[np.bytes_]] = []

    def new(self, texts: Sequence[str]) -> Kept:
        if not texts:
            return np.ones(0, dtype=np.bool_)
        hashes = np.array([xxhash.xxh3_128_digest(text.encode()) for text in texts], dtype="S16")
        found, first = np.unique(hashes, return_index=True)
        is_new = ~self._holds(found)
        self._add(found[is_new])
        kept = np.zeros(len(texts), dtype=np.bool_)
        kept[first[is_new]] = True
        return kept

    def _holds(self, hashes: npt.NDArray[np.bytes_]) -> Kept:
        known = np.zeros(len(hashes), dtype=np.bool_)
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            known |= run[places] == hashes
        return known

    def _add(self, hashes: npt.NDArray[np.bytes_]) -> None:
        if not len(hashes):
            return
        self._runs.append(hashes)
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            last = self._runs.pop()
            self._runs[-1] = np.sort(np.concatenate([self._runs[-1], last]))


class NearFilter:
    def __init__(self, threshold: float, threads: int) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise ImportError('data.deduplicate = "near" needs the library datasketch: pip install "keepstep[data]"') from error
        self._threshold, self._threads = threshold, max(1, threads)
        self._first = MinHash(num_perm=PERMUTATIONS, seed=_SEED, hashfunc=_as_it_is, scheme="affine32")
        self._index = MinHashLSH(threshold=min(threshold, _MOST), num_perm=PERMUTATIONS, weights=_WEIGHTS)
        self._exact = ExactFilter()
        self._signatures = np.zeros((_ROOM, PERMUTATIONS), dtype=np.uint32)  # of the documents that were kept
        self._num_kept = 0

    def new(self, texts: Sequence[str]) -> Kept:
        kept = self._exact.new(texts)
        chosen: list[int] = np.flatnonzero(kept).tolist()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="minhash") as pool:  # numpy works without the interpreter's lock
            for number, signature in zip(chosen, pool.map(self._signed, [texts[i] for i in chosen]), strict=True):
                kept[number] = self._is_new(signature)
        return kept

    def _signed(self, text: str) -> Any:
        signature = self._first.copy()
        for hashes in shingles(text):
            signature.update_batch(hashes.tolist())
        return signature

    def _is_new(self, signature: Any) -> bool:
        mine = signature.hashvalues.astype(np.uint32)
        candidates = self._index.query(signature)
        if candidates and (self._signatures[candidates] == mine).mean(axis=1).max() >= self._threshold:
            return False
        if self._num_kept == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.zeros_like(self._signatures)])
        self._signatures[self._num_kept] = mine
        self._index.insert(self._num_kept, signature)
        self._num_kept += 1
        return True


def shingles(text: str) -> Iterator[npt.NDArray[np.uint64]]:
    """The 32-bit hashes of its word 5-grams, some thousand at once; of fewer words, of all of them together. Case makes no difference.

    A 5-gram's hash is a difference of two sums over the bytes before it (a polynomial modulo 2^64, then mixed). Nothing is done by word,
    which would hold the interpreter's lock, and threads would wait for each other.
    """
    body = np.frombuffer(b" ".join(text.lower().encode().split()), dtype=np.uint8)
    spaces = np.flatnonzero(body == ord(" "))
    starts, ends = np.concatenate([[0], spaces + 1]), np.concatenate([spaces, [len(body)]])
    ends = ends[min(SHINGLE_WORDS, len(ends)) - 1 :]
    for first in range(0, len(ends), _AT_ONCE):
        some = slice(first, min(first + _AT_ONCE, len(ends)))
        yield _hashes(body[starts[first] : ends[some][-1]], starts[some] - starts[first], ends[some] - starts[first])


def _hashes(body: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Of body[start:end], each."""
    powers = np.full((2, len(body) + 1), [[_BASE], [_INVERSE]], dtype=np.uint64)
    powers[:, 0] = 1
    powers, inverses = np.cumprod(powers, axis=1, out=powers)
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum((body + np.uint64(1)) * powers[:-1])])
    found: npt.NDArray[np.uint64] = (sums[ends] - sums[starts]) * inverses[starts]
    found ^= found >> np.uint64(29)
    found *= np.uint64(_MIX)
    return found >> np.uint64(32)


def _as_it_is(hash_: int) -> int:
    return hash_
