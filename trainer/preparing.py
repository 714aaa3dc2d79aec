"""`keepstep prepare`: text becomes token files below a run's root, in two passes over it.

    sources.py -> formats.py -> cleaning.py          files, documents, one spelling                 corpus.py: both passes read this
      planning.py: duplicates.py splitting.py learning.py       what is left out, held out, learnt      -> tokens/plan.json
      encoding.py: tokenizer.py spool.py                        ids, unit by unit                        -> tokens/unit-NNNNN.json
    preparing.py                                     documents' starts, hashes, figures             -> tokens/index.json

index.json is written last: until then there are no tokens. What a killed `prepare` leaves, the next one goes on with, if the sources and
the config are the same as far as one can see, and removes otherwise. The bytes depend on the text and the config alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from keepstep.storage.canonical import sha256_hex
from keepstep.storage.errors import CorruptRecord, NotFound
from keepstep.storage.store import Store

from . import spool
from .config import TrainerConfig
from .corpus import Corpus, Place, Reading, SourceChanged
from .encoding import dtype_for, write_units
from .index import FOLDER, INDEX, PARTS, TOKENIZER, Extent, Part, TokenIndex, documents_key, marks_key, read_index, recipe_digest
from .learning import is_learnt, open_learner
from .planning import PLAN, Plan, Planned, make_plan, packed, unpacked
from .spool import Spool
from .tokenizer import load_tokenizer
from .units import Unit, UnitArrays, read_arrays, read_units

KEPT = f"{FOLDER}/kept.bin"

Progress = Callable[[str, int, int], None]  # (what is being done, bytes of the sources that were read, bytes in all: twice theirs, or 0)


def prepare(
    config: TrainerConfig, store: Store, progress: Progress = lambda what, done, total: None, *, threads: int | None = None
) -> TokenIndex:
    """Makes the root's token files unless they are there. Deterministic: the same text and config give the same bytes.

    Args:
        threads: that look for near duplicates; None: one per core. Encoding has as many as the library wants.

    Raises:
        ValueError: there is no text, too little of it, or some that cannot be used; or the root holds tokens of another recipe.
        ImportError: a library is missing; the message says which.
    """
    recipe = recipe_digest(config)
    if found := read_index(store):
        if found.recipe != recipe:
            raise ValueError(f"{store.name} holds tokens of another [data] section; undo the change, or choose another run.root")
        return _alone(found, store)
    corpus = Corpus.find(config)
    told = _Told(progress, 2 * corpus.num_bytes)
    try:
        planned = _planned(corpus, recipe, store, told, threads or os.cpu_count() or 1)
        units = read_units(store, sha256_hex(planned.plan.body()))
        told.passed(corpus, units[-1].next if units else Place())
        units = write_units(corpus, planned, store, Reading(told.seen, expected=planned.plan.files), units)
    except SourceChanged:
        _discard(store)  # no later `prepare` could go on with it
        raise
    told.begins("writing tokens")
    return _finished(corpus, planned, units, store)


@dataclass
class _Told:
    """How far it is."""

    progress: Progress
    total: int
    what: str = "reading text"
    done: int = 0

    def seen(self, num_bytes: int) -> None:
        self.done += num_bytes
        self.progress(self.what, min(self.done, self.total), self.total)

    def begins(self, what: str) -> None:
        self.what = what
        self.progress(what, min(self.done, self.total), self.total)

    def passed(self, corpus: Corpus, begin: Place | None) -> None:
        """The second pass begins at the file of that document."""
        self.done = self.total if begin is None else self.total // 2 + _bytes_before(corpus, begin)
        self.begins("encoding text")


def _bytes_before(corpus: Corpus, begin: Place) -> int:
    sources = enumerate(corpus.sources)
    return sum(file.num_bytes for i, source in sources for j, file in enumerate(source.files) if (i, j) < (begin.source, begin.file))


def _planned(corpus: Corpus, recipe: str, store: Store, told: _Told, threads: int) -> Planned:
    """What a `prepare` that was killed has planned, or a new plan."""
    told.begins("reading text")
    if (planned := _known_plan(corpus, recipe, store)) is not None:
        return planned
    _discard(store)
    planned = make_plan(corpus, recipe, told.seen, lambda: told.begins("learning the tokenizer"), threads)
    store.put(TOKENIZER, planned.tokenizer.to_json())
    store.put(KEPT, packed(planned.kept))
    store.put(PLAN, planned.plan.body())
    return planned


def _discard(store: Store) -> None:
    """The plan first: whatever is left when this is killed belongs to none."""
    if store.exists(PLAN):
        store.delete(PLAN)
    store.delete_tree(FOLDER)


def _known_plan(corpus: Corpus, recipe: str, store: Store) -> Planned | None:
    """None: there is none, or it is of something else."""
    try:
        plan = Plan.parse(store.get(PLAN))
        if plan is None or (plan.recipe, plan.fingerprint) != (recipe, corpus.fingerprint):
            return None
        tokenizer, kept = store.get(TOKENIZER), store.get(KEPT)
    except (NotFound, CorruptRecord):
        return None
    if (sha256_hex(tokenizer), sha256_hex(kept)) != (plan.tokenizer_sha256, plan.kept_sha256):
        return None
    if not is_learnt(corpus.config) and open_learner(corpus.config).finish().to_json() != tokenizer:
        return None  # the tokenizer.json is another one now
    return Planned(plan=plan, tokenizer=load_tokenizer(tokenizer), kept=unpacked(kept, plan.num_documents))


def _finished(corpus: Corpus, planned: Planned, units: Sequence[Unit], store: Store) -> TokenIndex:
    """Writes what is about all units, and the index."""
    tokenizer = planned.tokenizer
    totals = {name: _Totals(tokenizer.size) for name in PARTS}
    try:
        for number, unit in enumerate(units):
            for name, arrays in read_arrays(store, number, unit, tokenizer.size).items():
                totals[name].add(arrays)
        taught = totals["train"].counts
        parts = {name: _part(name, totals[name], units, taught, tokenizer.unknown, store) for name in PARTS}
    finally:
        for each in totals.values():
            each.close()
    index = TokenIndex(
        recipe=planned.plan.recipe,
        dtype=dtype_for(tokenizer),
        vocabulary=tokenizer.size,
        tokenizer_sha256=planned.plan.tokenizer_sha256,
        block_bytes=spool.HASHED_BYTES,
        labels=planned.plan.labels,
        report=planned.plan.report(corpus),
        train=parts["train"],
        held_out=parts["held_out"],
    )
    if not store.put_new(INDEX, index.body()):
        raise ValueError(
            f"{store.name} was prepared by somebody else at the same time with other text; start again, or choose another run.root"
        )
    return _alone(index, store)


def _alone(index: TokenIndex, store: Store) -> TokenIndex:
    """What only the way to the index needed goes."""
    for key in sorted(set(store.list(FOLDER)) - set(index.keys)):
        store.delete(key)
    return index


class _Totals:
    """Of one side, over all units."""

    def __init__(self, vocabulary: int) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(vocabulary, dtype=np.int64)
        self.starts, self.marks = Spool("<u8"), Spool("<u4")
        self._tokens = 0

    def add(self, arrays: UnitArrays) -> None:
        ends = np.cumsum(arrays.lengths, dtype=np.uint64) + np.uint64(self._tokens)
        self.starts.add(ends - arrays.lengths)
        self.marks.add(arrays.marks)
        self.counts += arrays.counts
        self._tokens += int(arrays.lengths.sum(dtype=np.uint64))

    def close(self) -> None:
        self.starts.close()
        self.marks.close()


def _part(name: str, total: _Totals, units: Sequence[Unit], taught: npt.NDArray[np.int64], unknown: int | None, store: Store) -> Part:
    mine = [unit.part(name) for unit in units]
    starts = total.starts.write(store, documents_key(name))
    return Part(
        documents=len(total.starts),
        text_bytes=sum(part.text_bytes for part in mine),
        tokens=int(total.counts.sum()),
        unknown=0 if unknown is None else int(total.counts[unknown]),
        starts_sha256=starts.sha256,
        marks_sha256=total.marks.write(store, marks_key(name)).sha256 if len(total.marks) else "",
        sources=tuple(_together(extents) for extents in zip(*(part.sources for part in mine), strict=True)),
        shards=tuple(shard for part in mine for shard in part.shards),
        unigram_nats=unigram_nats(taught, total.counts, smoothing=0 if name == "train" else 1),
    )


def _together(extents: Sequence[Extent]) -> Extent:
    return Extent(documents=sum(each.documents for each in extents), tokens=sum(each.tokens for each in extents))


def unigram_nats(taught: npt.NDArray[np.int64], counts: npt.NDArray[Any], *, smoothing: int) -> float:
    """Mean -ln(frequency) over tokens that occur `counts` times, with frequencies from `taught` (both by token id); smoothing 1 is for
    text that was not counted."""
    occurring = np.flatnonzero(counts)
    frequencies = (taught[occurring] + smoothing) / (taught + smoothing).sum()
    return float(-(np.log(frequencies) * counts[occurring]).sum() / counts.sum())
