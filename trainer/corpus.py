"""All documents of a run's sources, cleaned, as one stream that may be begun anew at any file; and what each file was found to hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

import xxhash

from keepstep.storage.canonical import canonical_json, sha256_hex

from .cleaning import clean, cut_to
from .config import TrainerConfig
from .formats import Document, Wanted, documents
from .installed import installed_docs
from .sources import Seen, Source, find_source

_LOT_DOCUMENTS: Final = 1024
_LOT_CHARS: Final = 2 << 20
_NO_LIMIT: Final = 1 << 62


class Place(NamedTuple):
    """Of a document: its source, its file there, its number in that file among those with text."""

    source: int = 0
    file: int = 0
    number: int = 0


BEGIN: Final = Place()


class Entry(NamedTuple):
    place: Place
    document: Document
    num_bytes: int  # of its texts in UTF-8


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """What a file holds, or of it data.max_bytes leaves."""

    documents: int  # with text
    empty: int  # without
    text_bytes: int
    digest: str  # of names, texts and labels

    def to_json(self) -> list[Any]:
        return [self.documents, self.empty, self.text_bytes, self.digest]

    @staticmethod
    def parse(values: Sequence[Any]) -> FileFacts:
        count, empty, text_bytes, digest = values
        return FileFacts(documents=count, empty=empty, text_bytes=text_bytes, digest=digest)


Facts = Mapping[tuple[int, int], FileFacts]  # by source and file; none of files that data.max_bytes leaves out


@dataclass
class Corpus:
    """What [data] and the objective want of which files."""

    config: TrainerConfig
    sources: tuple[Source, ...]
    _installed: list[tuple[str, str]] = field(default_factory=list, repr=False)  # parsing it once is enough

    @staticmethod
    def find(config: TrainerConfig) -> Corpus:
        """Raises ValueError for a source that holds nothing that could be read."""
        data = config.data
        return Corpus(config, tuple(find_source(source, data.source_key(i)) for i, source in enumerate(data.all_sources)))

    @property
    def fingerprint(self) -> str:
        """Equal as long as all files are the same, as far as their file systems tell."""
        return sha256_hex(canonical_json([source.fingerprint for source in self.sources]))

    @property
    def num_bytes(self) -> int:
        """Of all files, as they are kept; 0: not known."""
        return sum(source.num_bytes for source in self.sources)

    def read(self, reading: Reading, begin: Place = BEGIN) -> Iterator[Entry]:
        """The documents with text, in order, from the beginning of the file of `begin`.

        Raises:
            ValueError: a file cannot be read, does not hold what it should, or is not what it was when `reading.expected` was found.
        """
        for source in range(begin.source, len(self.sources)):
            first = begin.file if source == begin.source else 0
            left = (self.config.data.max_bytes or _NO_LIMIT) - reading.text_bytes(source, first)
            is_full = False
            for file in range(first, len(self.sources[source].files)):
                if left <= 0 or is_full:
                    break
                one = _OneFile(self, source, file, left)
                yield from one.read(reading.seen)
                reading.ended(self.sources[source], (source, file), one.facts)
                left, is_full = left - one.text_bytes, one.is_full

    def documents(self, source: int, file: int, seen: Seen) -> Iterator[Document]:
        of = self.sources[source]
        wanted = Wanted.of(self.config)
        if of.filesystem is None and not wanted.needs_records:
            self._installed = self._installed or list(installed_docs())
            return (Document(name, (text,)) for name, text in self._installed)
        return documents(of, of.files[file], wanted, seen)


@dataclass
class Reading:
    """One pass over a corpus: what its files hold, compared with what they held in the pass before, if there was one."""

    seen: Seen = lambda num_bytes: None
    expected: Facts | None = None
    found: dict[tuple[int, int], FileFacts] = field(default_factory=dict)

    def text_bytes(self, source: int, before: int) -> int:
        """Of the files of a source before one of them, when it is begun there."""
        return sum(facts.text_bytes for (of, file), facts in (self.expected or {}).items() if of == source and file < before)

    def ended(self, source: Source, number: tuple[int, int], facts: FileFacts) -> None:
        self.found[number] = facts
        if self.expected is not None and self.expected.get(number) != facts:
            raise SourceChanged(f"{source.key}: {source.files[number[1]].name} changed while it was being prepared; prepare again")


class SourceChanged(ValueError):
    """The second pass over a file finds another text than the first."""


@dataclass
class _OneFile:
    corpus: Corpus
    source: int
    file: int
    left: int  # bytes of text that may be used
    count: int = 0
    empty: int = 0
    text_bytes: int = 0
    is_full: bool = False  # what follows is left out
    _hash: Any = field(default_factory=xxhash.xxh3_128, repr=False)

    @property
    def facts(self) -> FileFacts:
        return FileFacts(documents=self.count, empty=self.empty, text_bytes=self.text_bytes, digest=self._hash.hexdigest())

    def read(self, seen: Seen) -> Iterator[Entry]:
        data = self.corpus.config.data
        for document in self.corpus.documents(self.source, self.file, seen):
            fitting = self._fitting(tuple(clean(text, data) for text in document.texts))
            if fitting is None:
                return
            cleaned = replace(document, texts=fitting)
            if cleaned.has_text:
                num_bytes = self._note(cleaned)
                yield Entry(Place(self.source, self.file, self.count - 1), cleaned, num_bytes)
            else:
                self.empty += 1
            if self.is_full:
                return

    def _fitting(self, texts: tuple[str, ...]) -> tuple[str, ...] | None:
        """The last document ends where data.max_bytes does; a pair, or one with a label, is left out as a whole (None)."""
        left = self.left - self.text_bytes
        if 4 * sum(map(len, texts)) <= left or sum(len(text.encode()) for text in texts) <= left:
            return texts
        self.is_full = True
        return None if self.corpus.config.train.objective in ("pairs", "classes") else tuple(cut_to(text, left) for text in texts)

    def _note(self, document: Document) -> int:
        bodies = [text.encode() for text in document.texts]
        for part in (document.name.encode(), *bodies, document.label.encode()):
            self._hash.update(len(part).to_bytes(8, "little"))
            self._hash.update(part)
        self.count += 1
        num_bytes = sum(map(len, bodies))
        self.text_bytes += num_bytes
        return num_bytes


def lots(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Documents that are worked on together; a long one may be alone."""
    lot: list[Entry] = []
    num_chars = 0
    for entry in entries:
        lot.append(entry)
        num_chars += sum(map(len, entry.document.texts))
        if num_chars >= _LOT_CHARS or len(lot) >= _LOT_DOCUMENTS:
            yield lot
            lot, num_chars = [], 0
    if lot:
        yield lot
