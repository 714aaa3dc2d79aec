"""What a killed `prepare` goes on with: units of the second pass over the text, in the order in which they are written.

A unit is what fits into one token file of each side. Its files come first, then its arrays (tokens of each document, marks, how often each
token occurs), and last tokens/unit-NNNNN.json, which says that they are complete and where the next unit begins.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from keepstep.storage.canonical import seal, sha256_hex, unseal
from keepstep.storage.errors import CorruptRecord, NotFound
from keepstep.storage.store import Store

from .corpus import Place
from .index import FOLDER, PARTS, Extent, Shard

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPart:
    """What a unit holds of one side."""

    documents: int
    text_bytes: int
    shards: tuple[Shard, ...]
    sources: tuple[Extent, ...]  # of each source, in order


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """tokens/unit-NNNNN.json; there while tokens are made, and no longer."""

    plan: str  # SHA-256 of plan.json
    arrays_sha256: str
    next: Place | None  # where the next unit begins; None: this is the last
    train: UnitPart
    held_out: UnitPart

    def part(self, name: str) -> UnitPart:
        return {"train": self.train, "held_out": self.held_out}[name]

    def body(self) -> bytes:
        return seal(asdict(self))

    @staticmethod
    def parse(body: bytes, key: str) -> Unit:
        fields = unseal(body, key)
        parts = {name: _part(fields[name]) for name in PARTS}
        return Unit(**{**fields, **parts, "next": Place(*fields["next"]) if fields["next"] else None})


def _part(fields: dict[str, Any]) -> UnitPart:
    shards, sources = tuple(map(Shard.parse, fields["shards"])), tuple(Extent(**each) for each in fields["sources"])
    return UnitPart(documents=fields["documents"], text_bytes=fields["text_bytes"], shards=shards, sources=sources)


def unit_key(number: int, ending: str) -> str:
    return f"{FOLDER}/unit-{number:05d}.{ending}"


def read_units(store: Store, plan: str) -> list[Unit]:
    """Those of a plan that are complete, without a gap."""
    units: list[Unit] = []
    while not units or units[-1].next:
        key = unit_key(len(units), "json")
        try:
            unit = Unit.parse(store.get(key), key)
        except (NotFound, CorruptRecord):
            break
        if unit.plan != plan:
            break
        units.append(unit)
    return units


@dataclass(frozen=True, slots=True)
class UnitArrays:
    """Of one side of a unit: tokens of each document, its end included; its mark; occurrences of each token."""

    lengths: npt.NDArray[np.uint32]
    marks: npt.NDArray[np.uint32]  # none where documents have none
    counts: npt.NDArray[np.int64]


def read_arrays(store: Store, number: int, unit: Unit, vocabulary: int) -> dict[str, UnitArrays]:
    """By side. Raises ValueError where they are not what the unit says."""
    key = unit_key(number, "bin")
    body = store.get(key)
    if sha256_hex(body) != unit.arrays_sha256:
        raise ValueError(f"{store.name}: {key} is damaged; delete the folder {FOLDER}/ and run `keepstep prepare` again")
    documents = [unit.part(name).documents for name in PARTS]
    has_marks = len(body) - 16 * vocabulary > 4 * sum(documents)
    found, place = {}, 0
    for name, count in zip(PARTS, documents, strict=True):
        lengths, place = _taken(body, "<u4", count, place)
        marks, place = _taken(body, "<u4", count if has_marks else 0, place)
        counts, place = _taken(body, "<i8", vocabulary, place)
        found[name] = UnitArrays(lengths, marks, counts)
    return found


def _taken(body: bytes, dtype: str, count: int, place: int) -> tuple[Array, int]:
    values: Array = np.frombuffer(body, dtype=dtype, count=count, offset=place)
    return values, place + values.nbytes
