"""The rows of the held-out text that a model is evaluated on: numbered, the same for whoever asks.

next-token   windows of `model.context` tokens, one after the other; the first token of the text is given, all others are predicted once
masked       such windows too; what is hidden in one follows from (run.seed, its number)
pairs        a document each; the completion is predicted, the prompt is given
classes      a document each; its class is predicted

Documents come in an order of their own (`shuffled`): where not all are asked for, those that are come from all files, whatever their order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise, takewhile
from typing import Final

import numpy as np
import numpy.typing as npt

from .config import TrainerConfig
from .order import Positions, hashed
from .samples import IGNORED, Batch, ClassSamples, Mask, PairSamples, Rows, Samples, mask_of
from .tokenizer import Tokenizer
from .tokens import TokenReader, Tokens

_LATER: Final = 8  # tokens, more than a character ever needs


class HeldOut(ABC):
    context: int
    num_rows: int
    labels: tuple[str, ...] = ()  # of the classes; none where tokens are predicted

    def rows(self, numbers: range) -> Rows:
        """(len(numbers), context) each. For no numbers one row that does not count: somebody computes it to keep others company."""
        if not numbers:
            return Rows(np.zeros((1, self.context), dtype=np.int64), np.full((1, self.context), IGNORED, dtype=np.int64))
        return self._rows(np.arange(numbers.start, numbers.stop, dtype=np.uint64))

    @property
    def text_bytes(self) -> int | None:
        """UTF-8 bytes of the text that all targets together stand for; None where that is no running text."""
        return None

    @abstractmethod
    def _rows(self, numbers: Positions) -> Rows: ...


def held_out_of(tokens: Tokens, config: TrainerConfig, max_tokens: int | None = None) -> HeldOut:
    """What the objective predicts of the held-out text.

    Args:
        max_tokens: of at most so many tokens of it, but at least one document; None: of all.

    Raises:
        ValueError: a document that must be whole is longer than the context, or the tokens are not of this objective.
    """
    context, objective, limit = config.model.context, config.train.objective, max_tokens or len(tokens.held_out)
    match objective:
        case "next-token":
            return Windows(tokens.held_out, lambda: tokens.tokenizer, context, limit)
        case "masked":
            return MaskedWindows(tokens.held_out, mask_of(tokens, config), context, limit)
        case "pairs" | "classes":
            return _documents_of(tokens, config, limit)


def _documents_of(tokens: Tokens, config: TrainerConfig, limit: int) -> HeldOut:
    objective = config.train.objective
    if tokens.held_out_marks is None:
        raise ValueError(f'the tokens of this root are those of a text: train.objective = "{objective}" needs another run.root')
    kind = PairSamples if objective == "pairs" else ClassSamples
    sources, is_cut = tokens.index.held_out.sources, config.train.truncate
    samples = kind(tokens.held_out, tokens.held_out_starts, sources, config.model.context, tokens.held_out_marks, is_cut=is_cut)
    lengths = np.diff(np.append(tokens.held_out_starts.astype(np.int64), len(tokens.held_out)))
    order = shuffled(len(lengths))
    num_rows = max(1, int(np.searchsorted(np.cumsum(lengths[order.astype(np.int64)]), limit, side="right")))
    return Documents(samples, order[:num_rows], tokens.index.labels if objective == "classes" else ())


def shuffled(count: int) -> Positions:
    """The numbers below `count` in an order that depends on nothing else."""
    return np.argsort(hashed(np.arange(count, dtype=np.uint64)), kind="stable").astype(np.uint64)


class Windows(HeldOut):
    """Of the first `max_tokens` predictions. The tokenizer is asked for when it is needed: a start does not wait for it."""

    def __init__(self, tokens: TokenReader, tokenizer: Callable[[], Tokenizer], context: int, max_tokens: int) -> None:
        self._tokens, self._tokenizer, self.context = tokens, tokenizer, context
        self._count = min(max_tokens, len(tokens) - 1)
        self.num_rows = -(-self._count // context)

    @cached_property
    def text_bytes(self) -> int | None:
        given, all_of_it = (completed_bytes(self._tokenizer(), self._tokens, count) for count in (1, self._count + 1))
        return all_of_it - given

    def _rows(self, numbers: Positions) -> Rows:
        ids = _windows(self._tokens, self._count + 1, numbers, self.context + 1, self.context)
        targets = ids[:, 1:]
        return Rows(np.where(targets == IGNORED, IGNORED, ids[:, :-1]), targets)


class MaskedWindows(HeldOut):
    """Of the first `max_tokens` tokens. Nothing is hidden by chance: an evaluation asks for the same tokens each time."""

    def __init__(self, tokens: TokenReader, mask: Mask, context: int, max_tokens: int) -> None:
        self._tokens, self._mask, self.context = tokens, mask, context
        self._count = min(max_tokens, len(tokens))
        self.num_rows = -(-self._count // context)

    def _rows(self, numbers: Positions) -> Rows:
        return self._mask.rows(_windows(self._tokens, self._count, numbers, self.context, self.context), numbers)


class Documents(HeldOut):
    """Those whose numbers are given, in this order."""

    def __init__(self, samples: Samples, chosen: Positions, labels: tuple[str, ...]) -> None:
        self._samples, self.context, self.labels = samples, samples.context, labels
        self._chosen, self.num_rows = chosen, len(chosen)

    def _rows(self, numbers: Positions) -> Rows:
        chosen = self._chosen[numbers.astype(np.int64)]
        return self._samples.rows(chosen, chosen)


def _windows(tokens: TokenReader, end: int, numbers: Positions, width: int, stride: int) -> Batch:
    """(numbers, width) ids, each row from token number x stride on; IGNORED from token `end` on."""
    places = numbers.astype(np.int64)[:, None] * stride + np.arange(width)
    ids: npt.NDArray[np.int64] = tokens[np.minimum(places, end - 1)].astype(np.int64)
    return np.where(places < end, ids, IGNORED)


def completed_bytes(tokenizer: Tokenizer, tokens: TokenReader, count: int) -> int:
    """UTF-8 bytes of all characters that the first `count` tokens make complete. Ends of documents stand for none.

    A token may hold a part of a character: that counts with the token that brings its last byte.
    """
    ids = tokens[np.arange(min(count + _LATER, len(tokens)))]
    ends = np.flatnonzero(ids[:count] == tokenizer.end_of_text) + 1
    begun = int(ends[-1]) if len(ends) else 0
    documents = [ids[first:last].tolist() for first, last in pairwise((0, *ends))]
    cut, later = (tokenizer.decode(ids[begun:last].tolist()) for last in (count, count + _LATER))
    same = takewhile(
        lambda pair: pair[0] == pair[1], zip(cut, later, strict=False)
    )  # what stands for an incomplete character is not what it turns out to be
    return sum(len(text.encode()) for text in (*map(tokenizer.decode, documents), "".join(one for one, _ in same)))
