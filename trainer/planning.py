"""The first pass over the text: what is there, what is left out, what is held out, and the tokenizer that is learnt from the rest.

What it finds is the plan of the second pass, which encodes the same documents: a killed `prepare` goes on with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from keepstep.storage.canonical import seal, sha256_hex, unseal

from .corpus import Corpus, Entry, Facts, FileFacts, Reading, lots
from .duplicates import Filter, open_filter
from .index import FOLDER, Report
from .learning import Learner, open_learner
from .sources import PACKED
from .splitting import Split, teaches
from .tokenizer import Tokenizer

FORMAT: Final = 1
PLAN: Final = f"{FOLDER}/plan.json"
MAX_LABELS: Final = 1 << 16
_NUMBER: Final = re.compile(r"-?[0-9]{1,18}")
_UNPACKED: Final = 4  # times what is packed, about

Kept = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """tokens/plan.json; there while tokens are made, and no longer."""

    recipe: str
    fingerprint: str  # of the sources
    files: Facts
    moved: tuple[int, ...]  # documents that are on the other side of the split than their names say, counted over all with text
    duplicates: int
    kept_sha256: str  # of the bits of all documents with text: 1 for what is no duplicate
    labels: tuple[str, ...]
    tokenizer_sha256: str

    def body(self) -> bytes:
        files = [[*number, *facts.to_json()] for number, facts in self.files.items()]
        return seal(
            {
                "format": FORMAT,
                "recipe": self.recipe,
                "fingerprint": self.fingerprint,
                "files": files,
                "moved": self.moved,
                "duplicates": self.duplicates,
                "kept_sha256": self.kept_sha256,
                "labels": self.labels,
                "tokenizer_sha256": self.tokenizer_sha256,
            }
        )

    @staticmethod
    def parse(body: bytes) -> Plan | None:
        """None for that of another version. Raises CorruptRecord."""
        fields = unseal(body, PLAN)
        if fields.pop("format", None) != FORMAT:
            return None
        files = {(source, file): FileFacts.parse(values) for source, file, *values in fields.pop("files")}
        return Plan(**{**fields, "files": files, "moved": tuple(fields["moved"]), "labels": tuple(fields["labels"])})

    @property
    def num_documents(self) -> int:
        """With text."""
        return sum(facts.documents for facts in self.files.values())

    def report(self, corpus: Corpus) -> Report:
        return Report(
            files=sum(len(source.files) for source in corpus.sources),
            empty_files=sum(not facts.documents for facts in self.files.values()),
            empty_documents=sum(facts.empty for facts in self.files.values()),
            duplicates=self.duplicates,
            source_bytes=corpus.num_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    plan: Plan
    tokenizer: Tokenizer
    kept: Kept  # of all documents with text


def make_plan(corpus: Corpus, recipe: str, seen: Callable[[int], None], learning: Callable[[], None], threads: int) -> Planned:
    """Reads all of the text.

    Args:
        seen: told how many bytes were read.
        learning: called when all was read, and a tokenizer is made of it.

    Raises:
        ValueError: there is no text, too little of it, or some that cannot be used.
        ImportError: a library is missing; the message says which.
    """
    reading = Reading(seen)
    learner = open_learner(corpus.config)
    try:
        scout = _Scout(corpus, learner, threads)
        for lot in lots(corpus.read(reading)):
            scout.take(lot)
        moved = scout.close()
        learning()
        tokenizer = learner.finish()
    except BaseException:
        learner.abandon()
        raise
    kept = np.concatenate([*scout.kept, np.zeros(0, dtype=np.bool_)])
    plan = Plan(
        recipe=recipe,
        fingerprint=corpus.fingerprint,
        files=reading.found,
        moved=tuple(moved),
        duplicates=int((~kept).sum()),
        kept_sha256=sha256_hex(packed(kept)),
        labels=_ordered(scout.labels),
        tokenizer_sha256=sha256_hex(tokenizer.to_json()),
    )
    return Planned(plan=plan, tokenizer=tokenizer, kept=kept)


def packed(kept: Kept) -> bytes:
    return np.packbits(kept).tobytes()


def unpacked(body: bytes, count: int) -> Kept:
    return np.unpackbits(np.frombuffer(body, dtype=np.uint8), count=count).astype(np.bool_)


class _Scout:
    """Looks at every document once."""

    def __init__(self, corpus: Corpus, learner: Learner, threads: int) -> None:
        self._corpus, self._learner = corpus, learner
        self._filter: Filter = open_filter(corpus.config.data, threads)
        self._splits = [Split(corpus.config.data.held_out) for _ in corpus.sources]
        self._share = _teaching_share(corpus, learner.max_bytes)
        self._left = 2 * learner.max_bytes  # characters that may still teach: the share goes by the size of the files
        self._count = 0
        self.labels: set[str] = set()
        self.kept: list[Kept] = []

    def take(self, lot: Sequence[Entry]) -> None:
        kept = self._filter.new(["\0".join(entry.document.texts) for entry in lot])
        teaching: list[str] = []
        for entry, is_kept in zip(lot, kept.tolist(), strict=True):
            if is_kept:
                teaching += self._kept(entry)
            self._count += 1
        self.kept.append(kept)
        self._teach(teaching)

    def close(self) -> list[int]:
        """The documents that change sides. Raises ValueError for a source that has not one for each."""
        moved: list[int] = []
        for source, split in zip(self._corpus.sources, self._splits, strict=True):
            if split.count < 2:
                found = "one short document only" if split.count else "no text"
                raise ValueError(
                    f"{source.key} holds {found}, and training needs another document than evaluation: give it more text "
                    "(a text file counts as several documents from 8 KiB on; duplicates do not count)"
                )
            numbers, texts = split.end()
            moved += numbers
            self._teach(texts)
        return moved

    def _kept(self, entry: Entry) -> tuple[str, ...]:
        """What can be learnt from now."""
        document, source = entry.document, entry.place.source
        if document.label:
            self.labels.add(document.label)
            if len(self.labels) > MAX_LABELS:
                raise ValueError(f'{self._corpus.sources[source].key} has more than {MAX_LABELS} different labels: "label" must be a class')
        texts = document.texts if self._learner.max_bytes and teaches(document.name, self._share) else ()
        return self._splits[source].add(self._count, document.name, texts, entry.num_bytes)

    def _teach(self, texts: Sequence[str]) -> None:
        if self._left > 0 and texts:
            self._left -= sum(map(len, texts))
            self._learner.feed(texts)


def _teaching_share(corpus: Corpus, max_bytes: int) -> float:
    limit = corpus.config.data.max_bytes or (1 << 62)
    expected = sum(min(limit, sum(_text_bytes(file.name, file.num_bytes) for file in source.files)) for source in corpus.sources)
    return min(1.0, max_bytes / max(1, expected))


def _text_bytes(name: str, num_bytes: int) -> int:
    """About, of a file."""
    return num_bytes * _UNPACKED if name.endswith((*PACKED, ".parquet")) else num_bytes


def _ordered(labels: set[str]) -> tuple[str, ...]:
    """Numbers by their size, other labels by their letters."""
    by_size: Mapping[str, Any] = {label: (int(label), label) for label in labels if _NUMBER.fullmatch(label)}
    return tuple(sorted(labels, key=by_size.__getitem__ if len(by_size) == len(labels) else str))
