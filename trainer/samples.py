"""From the number of a sample to its row of token ids.

    stream      documents follow each other, and sample i of a source is its tokens [i C, (i + 1) C], C = model.context
    documents   no sample holds parts of two documents: a document of L tokens (its end-of-text included) has ceil((L - 1) / C) samples,
                the last of which is filled up with padding, whose targets do not count

A row has C + 1 ids: inputs are [:-1], targets [1:]. A sample's tokens are found in O(1), or O(log documents).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from .config import DataSection
from .order import Positions
from .tokens import Extent, TokenReader, Tokens

Batch = npt.NDArray[np.int64]
IGNORED: Final = -100  # cross_entropy's mark for targets that do not count
_Places = npt.NDArray[np.int64]


class Samples(ABC):
    """The samples of the training text, numbered through over all sources."""

    tokens: TokenReader
    context: int
    sizes: tuple[int, ...]  # samples of each source

    @abstractmethod
    def spans(self, samples: Positions) -> tuple[_Places, _Places]:
        """(first token of each sample, number of its tokens: context + 1 or fewer)."""

    def rows(self, samples: Positions) -> Batch:
        """(samples, context + 1) token ids; IGNORED behind the sample's tokens."""
        starts, counts = self.spans(samples)
        places = np.arange(self.context + 1)
        if (counts == len(places)).all():
            return self.tokens[starts[:, None] + places].astype(np.int64)
        is_token = places < counts[:, None]
        ids = self.tokens[np.where(is_token, starts[:, None] + places, starts[:, None])].astype(np.int64)
        return np.where(is_token, ids, IGNORED)


def samples_of(tokens: Tokens, data: DataSection, context: int) -> Samples:
    """Raises ValueError when a source has less text than one sample."""
    sources = tokens.index.train.sources
    by_document = data.pack == "documents"
    samples = (
        DocumentSamples(tokens.train, tokens.starts, sources, context) if by_document else StreamSamples(tokens.train, sources, context)
    )
    if 0 in samples.sizes:
        source = samples.sizes.index(0)
        raise ValueError(
            f"{data.source_key(source)} gave {sources[source].tokens} training tokens, fewer than one sample "
            f"(model.context = {context}): give it more text"
        )
    return samples


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
