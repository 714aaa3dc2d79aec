"""From the bytes of a file to documents, as a stream: text, JSONL or Parquet, by the ending of the file's name.

A text file is cut into pieces of 8 to 64 Ki characters, at a blank line where there is one. A line of JSONL is a document, and so is a
row of Parquet.
"""

from __future__ import annotations

import codecs
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

from .cleaning import encodable
from .config import INSTALLED_DOCS, TrainerConfig
from .installed import installed_docs
from .sources import PACKED, Seen, Source, SourceFile, chunks, opened, unpacked_name

PAIR: Final = ("prompt", "completion")
LABEL: Final = "label"
MAX_LINE_BYTES: Final = 32 << 20
_MIN_PIECE_CHARS: Final = 8 << 10
_MAX_PIECE_CHARS: Final = 64 << 10
_NEARBY_CHARS: Final = 1 << 10  # a long line is cut at a space that is not further from its end
_ROWS: Final = 256  # of Parquet that are decoded at once
_BOM: Final = "\ufeff"


@dataclass(frozen=True, slots=True)
class Document:
    name: str  # stable: decides which side of the held-out split it is on
    texts: tuple[str, ...]  # one; of a pair two
    label: str = ""

    @property
    def has_text(self) -> bool:
        """Of a pair, something to complete with."""
        return bool(self.texts[-1].strip())


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is read of a record."""

    texts: tuple[str, ...]  # fields
    label: str = ""  # "": none
    objective: str

    @staticmethod
    def of(config: TrainerConfig) -> Wanted:
        objective = config.train.objective
        texts = PAIR if objective == "pairs" else (config.data.text_field,)
        return Wanted(texts=texts, label=LABEL if objective == "classes" else "", objective=objective)

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.texts, self.label) if self.label else self.texts

    @property
    def needs_records(self) -> bool:
        """A piece of plain text has no fields."""
        return len(self.fields) > 1

    def said(self) -> str:
        return " and ".join(f'"{name}"' for name in self.fields)


def documents(source: Source, file: SourceFile, wanted: Wanted, seen: Seen = lambda num_bytes: None) -> Iterator[Document]:
    """The documents of one file, in order; also those without text.

    Raises:
        ValueError: it cannot be read, or does not hold what is wanted; the message names source, file and place.
    """
    form = PurePosixPath(unpacked_name(file.name)).suffix.lower()
    where = f"{source.key}: {file.name}"
    if form in (".jsonl", ".ndjson"):
        return _of_lines(_lines(chunks(source, file, seen), where), where, file.name, wanted)
    if form == ".parquet":
        return _of_rows(source, file, where, wanted, seen)
    if wanted.needs_records:
        raise ValueError(
            f'{where} is plain text, and train.objective = "{wanted.objective}" reads the fields {wanted.said()}: '
            "give JSONL (.jsonl) or Parquet (.parquet) files"
        )
    if file.name == INSTALLED_DOCS and source.filesystem is None:
        return (Document(name, (text,)) for name, text in installed_docs())
    return (Document(f"{file.name}#{i}", (text,)) for i, text in enumerate(pieces(decoded(chunks(source, file, seen), where))))


def decoded(blocks: Iterable[bytes], where: str) -> Iterator[str]:
    """UTF-8 as text, without a byte order mark. Raises ValueError that names the byte where it is none."""
    decoder, before, is_first = codecs.getincrementaldecoder("utf-8")(), 0, True
    left = filter(None, blocks)
    while True:
        block = next(left, b"")
        kept = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8 text (byte {before - kept + error.start}); convert it or take it out") from None
        before += len(block)
        if text and is_first:
            text, is_first = text.removeprefix(_BOM), False
        if text:
            yield text
        if not block:
            return


def pieces(texts: Iterable[str]) -> Iterator[str]:
    """A long text as documents of 8 Ki characters or a little more, cut at blank lines; of 64 Ki at most, cut at any line, where there are
    none, and inside a line that is longer than that. Where it is cut does not depend on how the text comes."""
    piece: list[str] = []
    num_chars = 0
    for line in _text_lines(texts):
        if piece and num_chars + len(line) > _MAX_PIECE_CHARS:
            yield "".join(piece)
            piece, num_chars = [], 0
        piece.append(line)
        num_chars += len(line)
        if num_chars >= _MIN_PIECE_CHARS and not line.strip():
            yield "".join(piece)
            piece, num_chars = [], 0
    if piece:
        yield "".join(piece)


def _text_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines with their ends; of a line that is too long, parts."""
    rest = ""
    for text in texts:
        *lines, rest = (rest + text).splitlines(keepends=True)
        for line in lines:
            yield from _parts(line)
        *parts, rest = _parts(rest)  # its last part grows, and may be cut again further on
        yield from parts
    yield from _parts(rest)


def _parts(line: str) -> Iterator[str]:
    start = 0
    while len(line) - start > _MAX_PIECE_CHARS:
        end = _cut(line, start)
        yield line[start:end]
        start = end
    if line:
        yield line[start:]


def _cut(line: str, start: int) -> int:
    """Behind a space nearby; else where no character, with its accents, and no line end is torn."""
    end = start + _MAX_PIECE_CHARS
    space = line.rfind(" ", end - _NEARBY_CHARS, end)
    if space >= 0:
        return space + 1
    whole = end
    while whole > end - _NEARBY_CHARS and (line[whole - 1] == "\r" or unicodedata.combining(line[whole])):
        whole -= 1
    return whole


def _lines(blocks: Iterable[bytes], where: str) -> Iterator[bytes]:
    """Without their ends. Raises ValueError for one that is too long to be a document."""
    rest: list[bytes] = []
    num_bytes = number = 0
    for block in blocks:
        first, *others = block.split(b"\n")
        rest.append(first)
        num_bytes += len(first)
        if num_bytes > MAX_LINE_BYTES:
            raise ValueError(
                f"{where}: line {number + 1} is longer than {MAX_LINE_BYTES >> 20} MiB; cut that document into several, "
                "or is it not JSONL, one object per line?"
            )
        if others:
            yield b"".join(rest)
            yield from others[:-1]
            number += len(others)
            rest, num_bytes = [others[-1]], len(others[-1])
    if num_bytes:
        yield b"".join(rest)


def _of_lines(lines: Iterable[bytes], where: str, name: str, wanted: Wanted) -> Iterator[Document]:
    for number, body in enumerate(lines):
        line = body if number else body.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            yield Document(f"{name}#{number}", ("",))
            continue
        place = f"{where}: line {number + 1}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{place} is not UTF-8 text (byte {error.start} of the line); convert the file or take it out") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place} is no JSON ({error}); each line must be one JSON object") from None
        if not isinstance(record, dict):
            raise ValueError(f"{place} is no JSON object; each line must be one, with the fields {wanted.said()}")
        _check_fields(place, record, "field", wanted)
        yield _document(f"{name}#{number}", place, [record[field] for field in wanted.fields], wanted)


def _of_rows(source: Source, file: SourceFile, where: str, wanted: Wanted, seen: Seen) -> Iterator[Document]:
    """By row groups, of these only the columns that are wanted."""
    if PurePosixPath(file.name).suffix in PACKED:
        raise ValueError(f"{where}: a Parquet file is packed inside, and cannot be read in a packed file; unpack it")
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError('Parquet files need the library pyarrow: pip install "keepstep[data]"') from error
    with opened(source, file) as raw:
        try:
            with parquet.ParquetFile(raw, pre_buffer=False, buffer_size=1 << 20) as table:
                _check_fields(where, table.schema_arrow.names, "column", wanted)
                for number, row in enumerate(_rows(table, wanted.fields, file.num_bytes, seen)):
                    yield _document(f"{file.name}#{number}", f"{where}: row {number + 1}", row, wanted)
        except (arrow.ArrowException, UnicodeDecodeError) as error:
            raise ValueError(f"{where} is no Parquet file, or a damaged one ({error}); put it right or take it out") from None


def _rows(table: Any, fields: Sequence[str], num_bytes: int, seen: Seen) -> Iterator[Sequence[Any]]:
    told = 0
    for group in range(table.num_row_groups):
        for batch in table.iter_batches(batch_size=_ROWS, row_groups=[group], columns=list(fields), use_threads=False):
            yield from zip(*(batch.column(field).to_pylist() for field in fields), strict=True)
        share = num_bytes * (group + 1) // table.num_row_groups
        seen(share - told)
        told = share


def _check_fields(place: str, there: Iterable[str], what: str, wanted: Wanted) -> None:
    there = list(there)
    missing = [field for field in wanted.fields if field not in there]
    if not missing:
        return
    given = ", ".join(f'"{name}"' for name in there[:20]) or "none"
    remedy = "set data.text_field to one of these" if missing == list(wanted.texts) and len(missing) == 1 else "rename those that are there"
    raise ValueError(f'{place} has no {what} "{missing[0]}"; its {what}s are {given}: {remedy}')


def _document(name: str, place: str, values: Sequence[Any], wanted: Wanted) -> Document:
    texts = values[: len(wanted.texts)]
    for field, text in zip(wanted.texts, texts, strict=True):
        if text is not None and not isinstance(text, str):
            raise ValueError(f'{place}: "{field}" is {type(text).__name__}, not text; data.text_field and the objective say what is read')
    label = values[-1] if wanted.label else ""
    if isinstance(label, bool) or not isinstance(label, (str, int)):
        raise ValueError(f'{place}: "{wanted.label}" is {type(label).__name__}; a label is text or an integer')
    if wanted.label and not str(label).strip():
        raise ValueError(f'{place}: "{wanted.label}" is empty; give each document its class, or take it out')
    return Document(name, tuple(text or "" for text in texts), encodable(str(label)))
