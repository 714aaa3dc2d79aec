"""A Unigram language model of subwords (Kudo 2018), learnt so that equal text gives equal bits.

The library's own trainer adds up probabilities in the order of a hash map that is seeded at random, and of its threads: five processes made
five files of the same text (tokenizers 0.23.3). Here the counts are whole numbers: each step splits every word in its most probable way
(the library does that, on all cores), counts the pieces, and drops those that the text would miss least. It works on the bytes of the text,
so nothing is ever unknown.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .tokenizer import END_OF_TEXT, MASK, LibraryTokenizer, Tokenizer

_WORD: Final = re.compile(r" ?[^\W\d_]+| ?\d+| ?[^\s\w]+| ?_+|\s+")  # as the library splits, but for rare letters
_MAX_WORDS: Final = 1 << 20  # different ones that are counted; then those that came once go
_TAUGHT_WORDS: Final = 200_000  # the most frequent ones teach
_SEED_WORDS: Final = 100_000  # and of these the pieces are taken that it begins with
_SEEDS: Final = 8  # times the vocabulary
_MAX_PIECE: Final = 16  # bytes
_KEPT: Final = 0.75  # of the pieces, in each step
_LOT: Final = 20_000  # words that are split at once
_DIGITS: Final = 6  # of a score: no more than any machine's logarithm agrees on

Counts = npt.NDArray[np.int64]


class UnigramLearner:
    """See `learning.Learner`."""

    def __init__(self, vocabulary: int, *, with_mask: bool, max_bytes: int) -> None:
        self._special = (END_OF_TEXT, MASK)[: 1 + with_mask]
        self._room = vocabulary - len(self._special)
        self._words: Counter[str] = Counter()
        self.max_bytes = max_bytes

    def feed(self, texts: Sequence[str]) -> None:
        for text in texts:
            self._words.update(_WORD.findall(text))
        if len(self._words) > _MAX_WORDS:
            self._words = Counter({word: count for word, count in self._words.items() if count > 1})

    def finish(self) -> Tokenizer:
        from tokenizers import decoders, pre_tokenizers

        split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        words: Counter[str] = Counter()
        for word, count in sorted(self._words.items(), key=lambda each: (-each[1], each[0]))[:_TAUGHT_WORDS]:
            words[split.pre_tokenize_str(word)[0][0]] += count
        scores = learn(words, pre_tokenizers.ByteLevel.alphabet(), self._room)
        tokenizer = _model([(name, 0.0) for name in self._special] + sorted(scores.items(), key=lambda each: (-each[1], each[0])))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(list(self._special))
        return LibraryTokenizer(tokenizer)

    def abandon(self) -> None:
        """There is nothing to end."""


def learn(words: Mapping[str, int], alphabet: Sequence[str], room: int) -> dict[str, float]:
    """At most `room` pieces with their scores (natural logarithms of probabilities), among them the whole alphabet."""
    ordered = sorted(words, key=lambda word: (-words[word], word))
    counts = np.array([words[word] for word in ordered], dtype=np.int64)
    scores = _scores(_seeds({word: words[word] for word in ordered[:_SEED_WORDS]}, alphabet, _SEEDS * room))
    while True:
        used = _used(ordered, counts, scores)
        scores = _scores({piece: used[piece] for piece in scores if used[piece] or len(piece) == 1})
        if len(scores) <= room:
            return scores
        scores = _pruned(scores, used, max(room, int(_KEPT * len(scores))))


def _seeds(words: Mapping[str, int], alphabet: Sequence[str], most: int) -> dict[str, int]:
    """What occurs more than once, by how much of the text it covers, and the alphabet."""
    found: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(len(word), start + _MAX_PIECE) + 1):
                found[word[start:end]] += count
    covering = [piece for piece, count in found.items() if count > 1 and len(piece) > 1]
    covering.sort(key=lambda piece: (-found[piece] * len(piece), piece))
    return {piece: found[piece] for piece in (*sorted(alphabet), *covering[: max(0, most - len(alphabet))])}


def _scores(counts: Mapping[str, int]) -> dict[str, float]:
    """A piece that does not occur (one of the alphabet) counts as half an occurrence."""
    total = math.log(max(1, sum(counts.values())))
    return {piece: round(math.log(count or 0.5) - total, _DIGITS) for piece, count in counts.items()}


def _model(pieces: Sequence[tuple[str, float]]) -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.Unigram(list(pieces)))


def _used(words: Sequence[str], counts: Counts, scores: Mapping[str, float]) -> Counter[str]:
    """How often each piece occurs in the most probable splits of the words."""
    pieces = list(scores)
    model = _model(list(scores.items()))
    used = np.zeros(len(pieces), dtype=np.int64)
    for start in range(0, len(words), _LOT):
        found = [encoding.ids for encoding in model.encode_batch_fast(list(words[start : start + _LOT]), add_special_tokens=False)]
        repeated = np.repeat(counts[start : start + _LOT], [len(ids) for ids in found])
        np.add.at(used, np.array([i for ids in found for i in ids], dtype=np.int64), repeated)
    return Counter(dict(zip(pieces, used.tolist(), strict=True)))


def _pruned(scores: Mapping[str, float], used: Mapping[str, int], most: int) -> dict[str, float]:
    """Without the pieces that the text can do without at the least cost: theirs, against that of the next best way to write them."""
    cost = {piece: used[piece] * (score - _without(piece, scores)) for piece, score in scores.items() if len(piece) > 1}
    kept = sorted(cost, key=lambda piece: (-cost[piece], piece))[: max(0, most - (len(scores) - len(cost)))]
    chosen = {*kept, *(piece for piece in scores if len(piece) == 1)}
    return {piece: score for piece, score in scores.items() if piece in chosen}


def _without(piece: str, scores: Mapping[str, float]) -> float:
    """The best score of a piece that is split into others."""
    best = [0.0] + [-math.inf] * len(piece)
    for end in range(1, len(piece) + 1):
        for start in range(end):
            if end - start < len(piece) and (score := scores.get(piece[start:end])) is not None:
                best[end] = max(best[end], best[start] + score)
    return best[-1]
