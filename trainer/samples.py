"""From the number of a sample to its row of inputs and targets.

    stream      documents follow each other, and sample i of a source is its tokens [i C, (i + 1) C], C = model.context
    documents   no sample holds parts of two documents: a document of L tokens (its end-of-text included) has ceil((L - 1) / C) samples,
                the last of which is filled up with padding, whose targets do not count
    whole       a sample is a document, for pairs and classes (objective of the same name)

What counts as a target is the objective's: the next token; what was masked (Devlin et al. 2019); the completion of a pair; the class of a
document, asked for at its last token. A sample's tokens are found in O(1), or O(log documents).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .config import TrainerConfig
from .data import Feed
from .order import Positions, hashed
from .tokens import Extent, TokenReader, Tokens

Batch = npt.NDArray[np.int64]
IGNORED: Final = -100  # cross_entropy's mark for targets that do not count; as an input it is padding
_Places = npt.NDArray[np.int64]
_MASKED, _REPLACED = 0.8, 0.9  # of what is asked for: so much is masked; up to so much another token, and the rest stays


class Rows(NamedTuple):
    """B samples, (B, C) each."""

    inputs: Batch
    targets: Batch

    def part(self, first: int, last: int) -> Rows:
        """Of the samples [first, last)."""
        return Rows(self.inputs[first:last], self.targets[first:last])

    @property
    def num_targets(self) -> int:
        return int((self.targets != IGNORED).sum())


class Samples(ABC):
    """The samples of the training text, numbered through over all sources."""

    tokens: TokenReader
    context: int
    sizes: tuple[int, ...]  # samples of each source

    @abstractmethod
    def spans(self, samples: Positions) -> tuple[_Places, _Places]:
        """(first token of each sample, number of its tokens: context + 1 or fewer)."""

    def ids(self, samples: Positions) -> Batch:
        """(samples, context + 1) token ids; IGNORED behind the sample's tokens."""
        starts, counts = self.spans(samples)
        places = np.arange(self.context + 1)
        if (counts == len(places)).all():
            return self.tokens[starts[:, None] + places].astype(np.int64)
        is_token = places < counts[:, None]
        ids = self.tokens[np.where(is_token, starts[:, None] + places, starts[:, None])].astype(np.int64)
        return np.where(is_token, ids, IGNORED)

    def rows(self, samples: Positions, positions: Positions) -> Rows:
        """What is fed for these samples where they stand at these positions of the order."""
        ids = self.ids(samples)
        return Rows(ids[:, :-1], ids[:, 1:])


def samples_of(tokens: Tokens, config: TrainerConfig) -> Samples:
    """Raises ValueError when a source has less text than one sample, or a document that must be whole is longer than the context."""
    samples = _samples_of(tokens, config)
    if 0 in samples.sizes:
        source = samples.sizes.index(0)
        raise ValueError(
            f"{config.data.source_key(source)} gave {tokens.index.train.sources[source].tokens} training tokens, fewer than one sample "
            f"(model.context = {config.model.context}): give it more text"
        )
    return samples


def _samples_of(tokens: Tokens, config: TrainerConfig) -> Samples:
    sources, context, objective = tokens.index.train.sources, config.model.context, config.train.objective
    if objective in {"pairs", "classes"}:
        if tokens.marks is None:
            raise ValueError(f'the tokens of this root are those of a text: train.objective = "{objective}" needs another run.root')
        kind = PairSamples if objective == "pairs" else ClassSamples
        return kind(tokens.train, tokens.starts, sources, context, tokens.marks, is_cut=config.train.truncate)
    if config.data.pack == "documents":
        samples: Samples = DocumentSamples(tokens.train, tokens.starts, sources, context)
    else:
        samples = StreamSamples(tokens.train, sources, context)
    if objective == "masked":
        return MaskedSamples(samples, mask_of(tokens, config))
    return samples


def rows_of(samples: Samples, feed: Feed, first: int, last: int) -> Rows:
    """Of the turns [first, last)."""
    positions = feed.at(first, last)
    return samples.rows(feed.order.samples(positions), positions)


class StreamSamples(Samples):
    def __init__(self, tokens: TokenReader, sources: Sequence[Extent], context: int) -> None:
        self.tokens, self.context = tokens, context
        self.sizes = tuple(max(0, (source.tokens - 1) // context) for source in sources)
        self._sample_bounds = np.cumsum([0, *self.sizes])
        self._token_bounds = np.cumsum([0, *(source.tokens for source in sources)])

    def spans(self, samples: Positions) -> tuple[_Places, _Places]:
        numbers = samples.astype(np.int64)
        sources = np.searchsorted(self._sample_bounds, numbers, side="right") - 1
        starts = self._token_bounds[sources] + (numbers - self._sample_bounds[sources]) * self.context
        return starts, np.full_like(starts, self.context + 1)


class DocumentSamples(Samples):
    def __init__(self, tokens: TokenReader, starts: npt.NDArray[np.uint64], sources: Sequence[Extent], context: int) -> None:
        self.tokens, self.context = tokens, context
        self._starts = np.append(starts.astype(np.int64), len(tokens))
        per_document = -(-(np.diff(self._starts) - 1) // context)  # a document of its end alone has none
        self._bounds = np.concatenate([[0], np.cumsum(per_document)])
        documents = np.cumsum([0, *(source.documents for source in sources)])
        self.sizes = tuple(np.diff(self._bounds[documents]).tolist())

    def spans(self, samples: Positions) -> tuple[_Places, _Places]:
        numbers = samples.astype(np.int64)
        documents = np.searchsorted(self._bounds, numbers, side="right") - 1
        starts = self._starts[documents] + (numbers - self._bounds[documents]) * self.context
        return starts, np.minimum(self.context + 1, self._starts[documents + 1] - starts)


class _WholeDocuments(Samples):
    """Raises ValueError where a document is longer than the context and none may be cut."""

    extra = 0  # tokens of a document that are targets only

    def __init__(
        self,
        tokens: TokenReader,
        starts: npt.NDArray[np.uint64],
        sources: Sequence[Extent],
        context: int,
        marks: npt.NDArray[np.uint32],
        *,
        is_cut: bool = False,
    ) -> None:
        self.tokens, self.context, self._marks = tokens, context, marks
        self._starts = np.append(starts.astype(np.int64), len(tokens))
        self.sizes = tuple(source.documents for source in sources)
        lengths, room = np.diff(self._starts), context + self.extra
        self._counts = np.minimum(lengths, room)
        if is_cut or not len(lengths) or (longest := int(lengths.max())) <= room:
            return
        raise ValueError(
            f"{int((lengths > room).sum())} of {len(lengths)} documents are longer than model.context = {context}, the longest has "
            f"{longest} tokens: set model.context = {longest - self.extra} or more, cut them with train.truncate = true, or take them out"
        )

    def spans(self, samples: Positions) -> tuple[_Places, _Places]:
        documents = samples.astype(np.int64)
        return self._starts[documents], self._counts[documents]


class PairSamples(_WholeDocuments):
    """Of a prompt and its completion, both ended by end-of-text; the mark counts the tokens of the former."""

    extra = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if too_long := int((self._marks > self.context).sum()):
            raise ValueError(
                f"of {too_long} of {len(self._marks)} pairs the prompt alone fills model.context = {self.context}, and nothing of the "
                f"completion is left: set model.context = {int(self._marks.max())} or more, or take them out"
            )

    def rows(self, samples: Positions, positions: Positions) -> Rows:
        return completion_rows(self.ids(samples), self._marks[samples.astype(np.int64)])


class ClassSamples(_WholeDocuments):
    """The mark is the number of the document's class."""

    def rows(self, samples: Positions, positions: Positions) -> Rows:
        return class_rows(self.ids(samples), self._marks[samples.astype(np.int64)])


def completion_rows(ids: Batch, marks: npt.NDArray[np.uint32]) -> Rows:
    """Each token predicts the next one; those of the prompt do not count, but for its end, which predicts the completion's beginning."""
    is_prompt = np.arange(1, ids.shape[1]) < marks.astype(np.int64)[:, None]
    return Rows(ids[:, :-1], np.where(is_prompt, IGNORED, ids[:, 1:]))


def class_rows(ids: Batch, marks: npt.NDArray[np.uint32]) -> Rows:
    """The class is asked for at each row's last token (Radford et al. 2018)."""
    inputs = ids[:, :-1]
    is_last = np.arange(inputs.shape[1]) == ((inputs != IGNORED).sum(1) - 1)[:, None]
    return Rows(inputs, np.where(is_last, marks.astype(np.int64)[:, None], IGNORED))


class Mask(NamedTuple):
    """How tokens are hidden: a function of (seed, position, place in the row), the same on every machine."""

    seed: int
    share: float  # of the tokens, asked for
    token: int  # that stands for them
    vocabulary: int
    end_of_text: int  # never asked for

    def rows(self, ids: Batch, positions: Positions) -> Rows:
        """Rows of C tokens, some of them hidden; of each row at least one, if it has any to ask for.

        Args:
            ids: (B, C), IGNORED is padding.
            positions: (B,), what each row's choice follows from beside the seed.
        """
        of_row = hashed(hashed(np.full_like(positions, self.seed)) + positions)
        places: Positions = np.arange(ids.shape[1], dtype=np.uint64)
        chance = hashed(of_row[:, None] + places)
        may = (ids != IGNORED) & (ids != self.end_of_text)
        order = np.where(may, chance >> np.uint64(1), np.uint64(1 << 63))  # the last place of all: what may not
        is_first = np.arange(ids.shape[1]) == order.argmin(1)[:, None]
        asked = may & ((_shares(chance) < self.share) | is_first)
        way, other = _shares(hashed(chance)), (hashed(chance + np.uint64(1)) % np.uint64(self.vocabulary)).astype(np.int64)
        hidden = np.where(way < _MASKED, self.token, np.where(way < _REPLACED, other, ids))
        return Rows(np.where(asked, hidden, ids), np.where(asked, ids, IGNORED))


def _shares(values: Positions) -> npt.NDArray[np.float64]:
    """In [0, 1), of 53 bits."""
    return (values >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mask_of(tokens: Tokens, config: TrainerConfig) -> Mask:
    """Raises ValueError where the tokenizer has no mask."""
    tokenizer = tokens.tokenizer
    if tokenizer.mask is None:
        raise ValueError(
            'train.objective = "masked": the tokenizer of this root has no token "<|mask|>", "[MASK]" or "<mask>"; prepare the text '
            "anew for this objective, in another run.root, or choose another data.tokenizer"
        )
    return Mask(config.run.seed, config.train.mask_share, tokenizer.mask, tokens.index.vocabulary, tokenizer.end_of_text)


class MaskedSamples(Samples):
    """Those of another kind, with some of their tokens hidden, others each time that they come."""

    def __init__(self, samples: Samples, mask: Mask) -> None:
        self.tokens, self.context, self.sizes = samples.tokens, samples.context, samples.sizes
        self._samples, self._mask = samples, mask

    def spans(self, samples: Positions) -> tuple[_Places, _Places]:
        return self._samples.spans(samples)

    def rows(self, samples: Positions, positions: Positions) -> Rows:
        return self._mask.rows(self.ids(samples)[:, :-1], positions)
