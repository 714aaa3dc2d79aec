"""Which tokenizer a text gets: learnt from its training side as it streams by, or one that exists.

Learnt from at most `LEARN_BYTES` of text, which bounds memory: what grows is a table of different words. Of more text a share of the
documents teaches, chosen by their names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from queue import Queue
from threading import Thread
from typing import Any, Final, Protocol

import numpy as np

from keepstep.storage.errors import NotFound, StoreError
from keepstep.storage.store import Store

from .config import TrainerConfig
from .index import TOKENIZER
from .sources import read_small
from .tokenizer import END_OF_TEXT, MASK, UNKNOWN, WORDS, ByteTokenizer, CharacterTokenizer, LibraryTokenizer, Tokenizer, load_tokenizer
from .unigram import UnigramLearner

LEARN_BYTES: Final = 256 << 20
LEARN_BYTES_UNIGRAM: Final = 64 << 20  # each step of its training goes through all different words

_LEARNT: Final = ("bpe", "unigram", "words", "characters")
_WAITING: Final = 4  # lots of texts


class Learner(Protocol):
    """Fed with training texts, then finished; or abandoned, when something else has failed."""

    max_bytes: int  # of text that it should be fed with; 0: none

    def feed(self, texts: Sequence[str]) -> None: ...
    def finish(self) -> Tokenizer: ...
    def abandon(self) -> None: ...


def open_learner(config: TrainerConfig) -> Learner:
    """Raises ValueError where data.tokenizer names neither a kind nor a tokenizer that can be read."""
    with_mask, data = config.train.objective == "masked", config.data
    match data.tokenizer:
        case "bytes":
            return Exists(ByteTokenizer(with_mask=with_mask))
        case "characters":
            return CharacterLearner(data.vocabulary, data.min_frequency, with_mask=with_mask)
        case "unigram":
            return UnigramLearner(data.vocabulary, with_mask=with_mask, max_bytes=LEARN_BYTES_UNIGRAM)
        case "bpe":
            return LibraryLearner(*_bpe(data.vocabulary, with_mask=with_mask))
        case "words":
            return LibraryLearner(*_words(data.vocabulary, data.min_frequency, with_mask=with_mask))
        case where:
            return Exists(existing(where, with_mask=with_mask))


def is_learnt(config: TrainerConfig) -> bool:
    return config.data.tokenizer in _LEARNT


def existing(where: str, *, with_mask: bool) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of a run's root. Raises ValueError that says why it cannot be that."""
    key = f"data.tokenizer = {where!r}"
    try:
        body = read_small(where, key) if where.endswith(".json") else Store.open(where).get(TOKENIZER)
    except NotFound:
        raise ValueError(
            f"{key} is no run's root with tokens, and none of {', '.join((*_LEARNT, 'bytes'))}; name one of these, "
            "a tokenizer.json, or the root of a run that was prepared"
        ) from None
    except StoreError as error:
        raise ValueError(f"{key} cannot be read: {error}") from error
    try:
        tokenizer = load_tokenizer(body)
    except ValueError as error:
        raise ValueError(f"{key} cannot be used: {error}") from None
    return _masked(tokenizer, key) if with_mask else tokenizer


def _masked(tokenizer: Tokenizer, key: str) -> Tokenizer:
    if tokenizer.mask is not None:
        return tokenizer
    if isinstance(tokenizer, LibraryTokenizer):
        return tokenizer.with_mask()
    if isinstance(tokenizer, ByteTokenizer):
        return ByteTokenizer(with_mask=True)
    raise ValueError(f'{key} has no mask token, which train.objective = "masked" needs: name one that was prepared for it')


class Exists:
    max_bytes = 0

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def feed(self, texts: Sequence[str]) -> None:
        """There is nothing to learn."""

    def finish(self) -> Tokenizer:
        return self._tokenizer

    def abandon(self) -> None:
        """There is nothing to end."""


class CharacterLearner:
    """The most frequent characters; of equally frequent ones those with lower code points."""

    max_bytes = 1 << 62  # counting them takes no memory

    def __init__(self, vocabulary: int, min_frequency: int, *, with_mask: bool) -> None:
        self._room, self._min_frequency, self._with_mask = vocabulary - 2 - with_mask, min_frequency, with_mask
        self._counts: Counter[int] = Counter()

    def feed(self, texts: Sequence[str]) -> None:
        points, counts = np.unique(np.frombuffer("".join(texts).encode("utf-32-le"), dtype="<u4"), return_counts=True)
        self._counts.update(dict(zip(points.tolist(), counts.tolist(), strict=True)))

    def finish(self) -> Tokenizer:
        frequent = sorted((-count, point) for point, count in self._counts.items() if count >= self._min_frequency)
        return CharacterTokenizer([chr(point) for _, point in frequent[: max(0, self._room)]], with_mask=self._with_mask)

    def abandon(self) -> None:
        """There is nothing to end."""


class LibraryLearner:
    """Trained by the library, in a thread of its own: it takes what it learns from out of an iterator, and splits it on all cores."""

    max_bytes = LEARN_BYTES

    def __init__(self, tokenizer: Any, trainer: Any) -> None:
        self._tokenizer, self._trainer = tokenizer, trainer
        self._lots: Queue[list[str] | None] = Queue(_WAITING)
        self._is_abandoned = False
        self._error: Exception | None = None
        self._thread = Thread(target=self._train, name="tokenizer", daemon=True)
        self._thread.start()

    def feed(self, texts: Sequence[str]) -> None:
        self._lots.put(list(texts))

    def finish(self) -> Tokenizer:
        self._end()
        if self._error:
            raise self._error
        return LibraryTokenizer(self._tokenizer)

    def abandon(self) -> None:
        self._is_abandoned = True
        self._end()

    def _end(self) -> None:
        self._lots.put(None)
        self._thread.join()

    def _train(self) -> None:
        try:
            self._tokenizer.train_from_iterator(self._read(), self._trainer)
        except Exception as error:  # noqa: BLE001 - raised again by `finish`
            self._error = error
            if not self._is_abandoned:
                list(iter(self._lots.get, None))  # whoever feeds must not wait for ever

    def _read(self) -> Iterator[list[str]]:
        yield from iter(self._lots.get, None)
        if self._is_abandoned:
            raise RuntimeError("abandoned")  # else it would go on with what it has


def _bpe(vocabulary: int, *, with_mask: bool) -> tuple[Any, Any]:
    """Byte-level, as GPT-2 has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, MASK][: 1 + with_mask]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return tokenizer, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False)


def _words(vocabulary: int, min_frequency: int, *, with_mask: bool) -> tuple[Any, Any]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    special = [END_OF_TEXT, UNKNOWN, MASK][: 2 + with_mask]
    return tokenizer, trainers.WordLevelTrainer(
        vocab_size=vocabulary, min_frequency=min_frequency, special_tokens=special, show_progress=False
    )
