"""The second pass over the text: documents to token ids, written unit by unit (units.py).

Nothing that is in the root is ever changed, so a killed `prepare` goes on behind the last complete unit, on any machine.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from keepstep.storage.canonical import sha256_hex
from keepstep.storage.store import Store

from .corpus import BEGIN, Corpus, Entry, Place, Reading, SourceChanged, lots
from .index import PARTS, Extent, Shard, shard_key
from .planning import Planned
from .splitting import is_below
from .spool import Spool
from .tokenizer import Tokenizer, as_array
from .units import Unit, UnitPart, unit_key

MEGABYTE: Final = 1 << 20
_ENCODERS: Final = 2  # one has its ids copied while the other's text is split, on all cores

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Encoded:
    entry: Entry
    side: str
    ids: Array  # its end included
    mark: int


class Encoder:
    """Documents to ids, and where they belong."""

    def __init__(self, corpus: Corpus, planned: Planned) -> None:
        self._planned, self._held_out, self._objective = planned, corpus.config.data.held_out, corpus.config.train.objective
        self._moved = frozenset(planned.plan.moved)
        self._labels = {label: number for number, label in enumerate(planned.plan.labels)}
        self.dtype = dtype_for(planned.tokenizer)
        self._before: dict[tuple[int, int], int] = {}  # documents with text before each file
        count = 0
        for number, facts in planned.plan.files.items():
            self._before[number] = count
            count += facts.documents

    @property
    def has_marks(self) -> bool:
        return self._objective in ("pairs", "classes")

    def side(self, entry: Entry) -> str | None:
        """None for a duplicate. Raises SourceChanged for a document that is not in the plan."""
        facts = self._planned.plan.files.get(entry.place[:2])
        if facts is None or entry.place.number >= facts.documents:
            raise SourceChanged(f"the text changed while it was being prepared: {entry.document.name} is new; prepare again")
        number = self._before[entry.place[:2]] + entry.place.number
        if not self._planned.kept[number]:
            return None
        return PARTS[is_below(entry.document.name, self._held_out) != (number in self._moved)]

    def encode(self, chosen: Sequence[tuple[Entry, str]]) -> list[_Encoded]:
        tokenizer = self._planned.tokenizer
        ids = iter(tokenizer.encode_all([text for entry, _ in chosen for text in entry.document.texts]))
        return [self._encoded(entry, side, [as_array(next(ids)) for _ in entry.document.texts]) for entry, side in chosen]

    def _encoded(self, entry: Entry, side: str, texts: Sequence[Array]) -> _Encoded:
        ids = np.empty(sum(map(len, texts)) + len(texts), dtype=self.dtype)
        end = 0
        for text in texts:
            ids[end : end + len(text)] = text
            end += len(text) + 1
            ids[end - 1] = self._planned.tokenizer.end_of_text
        mark = len(texts[0]) + 1 if self._objective == "pairs" else self._labels[entry.document.label] if self._labels else 0
        return _Encoded(entry, side, ids, mark)


def dtype_for(tokenizer: Tokenizer) -> str:
    """Little-endian, numpy's name."""
    return "uint16" if tokenizer.size <= 1 << 16 else "uint32"


class _PartWriter:
    def __init__(self, dtype: str, vocabulary: int, num_sources: int) -> None:
        self.spool = Spool(dtype)
        self.lengths, self.marks = array("I"), array("I")
        self.counts = np.zeros(vocabulary, dtype=np.int64)
        self.text_bytes = 0
        self._extents = np.zeros((num_sources, 2), dtype=np.int64)
        self._waiting: list[Array] = []
        self.num_tokens = 0

    def add(self, one: _Encoded) -> None:
        self._waiting.append(one.ids)
        self.lengths.append(len(one.ids))
        self.marks.append(one.mark)
        self.text_bytes += one.entry.num_bytes
        self.num_tokens += len(one.ids)
        self._extents[one.entry.place.source] += (1, len(one.ids))

    def flush(self) -> None:
        if self._waiting:
            ids = np.concatenate(self._waiting)
            self._waiting.clear()
            self.counts += np.bincount(ids, minlength=len(self.counts))
            self.spool.add(ids)

    def part(self, shards: Sequence[Shard]) -> UnitPart:
        sources = tuple(Extent(documents=documents, tokens=tokens) for documents, tokens in self._extents.tolist())
        return UnitPart(documents=len(self.lengths), text_bytes=self.text_bytes, shards=tuple(shards), sources=sources)

    def arrays(self, *, has_marks: bool) -> bytes:
        marks = np.array(self.marks if has_marks else (), dtype="<u4").tobytes()
        return np.array(self.lengths, dtype="<u4").tobytes() + marks + self.counts.astype("<i8").tobytes()


class UnitWriter:
    """Collects encoded documents and writes them as units."""

    def __init__(self, corpus: Corpus, encoder: Encoder, planned: Planned, store: Store, units: Sequence[Unit]) -> None:
        self._store, self._encoder, self._vocabulary = store, encoder, planned.tokenizer.size
        self._num_sources, self._plan = len(corpus.sources), sha256_hex(planned.plan.body())
        itemsize = np.dtype(encoder.dtype).itemsize
        self._room = max(1, corpus.config.data.shard_mb * MEGABYTE // itemsize)
        self.units = list(units)
        self._begin()

    def _begin(self) -> None:
        self._parts = {name: _PartWriter(self._encoder.dtype, self._vocabulary, self._num_sources) for name in PARTS}

    def add(self, one: _Encoded) -> None:
        part = self._parts[one.side]
        if part.num_tokens and part.num_tokens + len(one.ids) > self._room:
            self.end(one.entry.place)
        self._parts[one.side].add(one)

    def flush(self) -> None:
        for part in self._parts.values():
            part.flush()

    def end(self, next_: Place | None) -> None:
        """Writes the unit."""
        self.flush()
        made = {name: part.part(self._shards(name, part)) for name, part in self._parts.items()}
        arrays = b"".join(self._parts[name].arrays(has_marks=self._encoder.has_marks) for name in PARTS)
        number = len(self.units)
        self._store.write_file(unit_key(number, "bin"), [arrays], num_bytes=len(arrays))
        unit = Unit(plan=self._plan, arrays_sha256=sha256_hex(arrays), next=next_, **made)
        self._store.put(unit_key(number, "json"), unit.body())
        self.units.append(unit)
        self.close()
        self._begin()

    def _shards(self, name: str, part: _PartWriter) -> list[Shard]:
        first = sum(len(unit.part(name).shards) for unit in self.units)
        starts = range(0, part.num_tokens, self._room)
        room = self._room
        return [
            part.spool.write(self._store, shard_key(name, first + i), start, min(room, part.num_tokens - start))
            for i, start in enumerate(starts)
        ]

    def close(self) -> None:
        for part in self._parts.values():
            part.spool.close()


def write_units(corpus: Corpus, planned: Planned, store: Store, reading: Reading, units: Sequence[Unit]) -> list[Unit]:
    """Goes on behind the units that are there, to the end of the text; all units.

    Raises:
        SourceChanged: the text is not that of the plan.
    """
    if units and units[-1].next is None:
        return list(units)
    begin = units[-1].next if units and units[-1].next else BEGIN
    encoder = Encoder(corpus, planned)
    writer = UnitWriter(corpus, encoder, planned, store, units)
    try:
        entries = (entry for entry in corpus.read(reading, begin) if entry.place >= begin)
        with closing(_in_order(encoder, lots(entries))) as all_encoded:
            for encoded in all_encoded:
                for one in encoded:
                    writer.add(one)
                writer.flush()
        writer.end(None)
    finally:
        writer.close()
    return writer.units


def _in_order(encoder: Encoder, some: Iterable[list[Entry]]) -> Generator[list[_Encoded], None, None]:
    """What `encode` makes of each lot; the next ones are read and encoded meanwhile."""
    waiting: deque[Future[list[_Encoded]]] = deque()
    with ThreadPoolExecutor(_ENCODERS, thread_name_prefix="encode") as pool:
        try:
            for lot in some:
                chosen = [(entry, side) for entry in lot if (side := encoder.side(entry))]
                waiting.append(pool.submit(encoder.encode, chosen))
                if len(waiting) > _ENCODERS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
