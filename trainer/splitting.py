"""Which documents are kept for evaluation. Pure.

Of a source with many documents those whose names hash below a share: which side a document is on depends on nothing else, so more text
moves nobody. Of one with few, where that would be chance, exactly as many as the share says, those with the lowest hashes. Either way at
least one document is on each side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

import xxhash

FEW_DOCUMENTS: Final = 256
FEW_BYTES: Final = 8 << 20  # that are kept in memory until it is known how many documents there are
_ALL: Final = 2**64
_TEACHES: Final = 1  # seed of the other choice that is made by name

Texts = tuple[str, ...]


def is_below(name: str, share: float, *, seed: int = 0) -> bool:
    """Whether the hash of a name lies in the first `share` of all hashes."""
    return xxhash.xxh3_64_intdigest(name.encode(), seed=seed) < share * _ALL


def teaches(name: str, share: float) -> bool:
    """Whether a document is among that share from which a tokenizer is learnt."""
    return share >= 1 or is_below(name, share, seed=_TEACHES)


@dataclass(frozen=True, slots=True)
class Candidate:
    number: int  # of the document, however the caller counts
    name: str
    texts: Texts

    @property
    def hash(self) -> int:
        return xxhash.xxh3_64_intdigest(self.name.encode())


class Split:
    """The documents of one source, as they come: what is certain to be trained on, and in the end which are not where their names say.

    Documents that may still change sides are held back: no tokenizer learns from held-out text.
    """

    def __init__(self, held_out: float) -> None:
        self._held_out = held_out
        self.count = self._num_held_out = 0
        self._few: list[Candidate] | None = []  # all of them, as long as they are few
        self._few_bytes = 0
        self._lowest: Candidate | None = None  # training document, while nothing is held out
        self._highest: Candidate | None = None  # held-out document, while there is nothing to train on

    def add(self, number: int, name: str, texts: Texts, num_bytes: int = 0) -> Texts:
        """The next document, duplicates left out; returns texts that are certain to be trained on.

        Args:
            texts: from which a tokenizer may learn.
            num_bytes: of the document, whoever learns from it: what the split depends on must not depend on the tokenizer.
        """
        mine = Candidate(number, name, texts)
        self.count += 1
        if self._few is None:
            return self._by_name(mine)
        self._few.append(mine)
        self._few_bytes += num_bytes
        if len(self._few) <= FEW_DOCUMENTS and self._few_bytes <= FEW_BYTES:
            return ()
        few, self._few = self._few, None
        return tuple(chain.from_iterable(map(self._by_name, few)))

    def end(self) -> tuple[Sequence[int], Texts]:
        """(numbers of the documents that are on the other side than their names say, further texts to be trained on). There must be two
        documents at least."""
        assert self.count >= 2
        if self._few is not None:
            return self._end_of_few(self._few)
        if self._lowest is not None:
            return [self._lowest.number], ()
        if self._highest is not None:
            return [self._highest.number], self._highest.texts
        return [], ()

    def _end_of_few(self, few: Sequence[Candidate]) -> tuple[Sequence[int], Texts]:
        num_held_out = min(max(1, round(len(few) * self._held_out)), len(few) - 1)
        by_hash = sorted(range(len(few)), key=lambda i: hashlib.sha256(f"{i} {few[i].name}".encode()).digest())
        held_out = frozenset(by_hash[:num_held_out])
        moved = [each.number for i, each in enumerate(few) if (i in held_out) != is_below(each.name, self._held_out)]
        return moved, _texts(each for i, each in enumerate(few) if i not in held_out)

    def _by_name(self, mine: Candidate) -> Texts:
        if is_below(mine.name, self._held_out):
            return self._held_out_by_name(mine)
        self._highest = None
        if self._num_held_out:
            return mine.texts
        if self._lowest is not None and mine.hash >= self._lowest.hash:
            return mine.texts
        freed, self._lowest = self._lowest, mine
        return freed.texts if freed else ()

    def _held_out_by_name(self, mine: Candidate) -> Texts:
        is_first_of_all = self._lowest is None and (self._num_held_out == 0 or self._highest is not None)
        self._num_held_out += 1
        if is_first_of_all and (self._highest is None or mine.hash > self._highest.hash):
            self._highest = mine
        freed, self._lowest = self._lowest, None
        return freed.texts if freed else ()


def _texts(some: Iterable[Candidate]) -> Texts:
    return tuple(text for each in some for text in each.texts)


def held_out_of(names: Sequence[str], held_out: float) -> frozenset[int]:
    """Of a whole source at once: the numbers of the documents that are held out."""
    split = Split(held_out)
    for number, name in enumerate(names):
        split.add(number, name, ())
    moved, _ = split.end()
    return frozenset(number for number, name in enumerate(names) if is_below(name, held_out)) ^ frozenset(moved)
