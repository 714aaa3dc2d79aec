"""The records of the run log, and their bytes. Pure.

A record travels in an envelope: its number, a UUID (so that the writer recognises its own record after an ambiguous answer), the
SHA-256 of the bytes of the record before it (a chain: nobody can change the past unnoticed) and a check over the rest (so that a
flipped bit in the newest record is noticed too).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, get_type_hints

from .canonical import seal, sha256_hex, unseal
from .errors import CorruptRecord

FORMAT: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A coordinator begins to reign. This is the fence: from here on every record of an older term is void."""

    term: int
    run: str
    identity: str  # SHA-256 text over what may not change within a run
    host: str
    pid: int
    url: str = ""
    at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One launch of all ranks. Commits that the history held after `resume_directory` leave it here."""

    term: int
    attempt: int
    nodes: tuple[str, ...]  # node ids in rank order
    world_size: int
    resume_step: int = -1  # -1: from scratch
    resume_directory: str = ""
    nonce: str
    unconfirmed: tuple[str, ...] = ()  # nodes that may still run an older attempt: a successor must wait for them too
    standing: str = ""  # JSON of the coordinator's own: what a successor should know of the run's past
    skips: tuple[str, ...] = ()  # all positions "FIRST:LAST" that it leaves out, [data] skip of run.toml aside
    overrides: tuple[str, ...] = ()  # all "section.key=value" that hold on top of run.toml
    at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A checkpoint exists from here on."""

    term: int
    attempt: int
    step: int
    directory: str
    manifest_sha256: str
    world_size: int
    best_step: int = -1  # whose checkpoint had the best evaluation so far, as of this one: it stays as long as this one; -1: none
    at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine:
    """A committed checkpoint turned out damaged: nobody resumes from it again."""

    term: int
    directory: str
    why: str
    at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Retention keeps this checkpoint (or, with pinned=False, may take it again)."""

    term: int
    directory: str
    pinned: bool = True
    at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retire:
    """These checkpoints are about to be deleted: nobody resumes from them again."""

    term: int
    directories: tuple[str, ...]
    why: str = ""
    at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """Every byte of this checkpoint was read back after its commit and found right."""

    term: int
    directory: str
    at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewind:
    """The history goes back to this checkpoint. What came after it leaves the history; its last checkpoint stays, as if it were pinned.

    The newest attempt commits nothing any more, and what ended the run is void.
    """

    term: int
    directory: str  # "": to the beginning
    step: int  # -1: to the beginning
    skips: tuple[str, ...] = ()  # of all later attempts, complete: they never become fewer
    overrides: tuple[str, ...] = ()  # likewise
    bad_step: int = -1  # the step that ranks refused; -1: people asked
    why: str = ""
    at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The run ended well."""

    term: int
    step: int
    outcome: str  # "succeeded" or "stopped"
    why: str
    at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The run ended badly. `requeue`: another try on other machines may help."""

    term: int
    why: str
    requeue: bool
    at: str = ""


Record = Opened | Attempt | Commit | Quarantine | Pin | Retire | Verified | Rewind | Finished | Failed

KINDS: Final[Mapping[str, type[Record]]] = {
    kind.__name__.lower(): kind for kind in (Opened, Attempt, Commit, Quarantine, Pin, Retire, Verified, Rewind, Finished, Failed)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A record in its place. `record` is None when the bytes are corrupt: it is void, and keeps its number."""

    sequence: int
    uuid: str
    previous: str  # SHA-256 of the bytes before it, "" for number 0
    sha256: str  # of its own bytes
    record: Record | None
    why: str = ""  # what is wrong with its bytes


def encode(record: Record, *, sequence: int, uuid: str, previous: str) -> bytes:
    """The bytes of a record in its envelope, canonical JSON with a newline at the end."""
    return seal({"format": FORMAT, "sequence": sequence, "uuid": uuid, "previous": previous, "record": fields_of(record)})


def decode(body: bytes, *, sequence: int) -> Entry:
    """The entry of number `sequence`. Raises CorruptRecord saying what is wrong with the bytes."""
    envelope = _checked_envelope(body, sequence)
    return Entry(
        sequence=sequence,
        uuid=_text(envelope, "uuid"),
        previous=_text(envelope, "previous"),
        sha256=sha256_hex(body),
        record=record_of(envelope.get("record"), f"record {sequence}"),
    )


def corrupt_entry(body: bytes, *, sequence: int, why: str) -> Entry:
    """The place of a record whose bytes cannot be trusted: the chain goes on over it."""
    return Entry(sequence=sequence, uuid="", previous="", sha256=sha256_hex(body), record=None, why=why)


def fields_of(record: Record) -> dict[str, Any]:
    """A record as JSON holds it."""
    kind = type(record).__name__.lower()
    return {"kind": kind} | {name: getattr(record, name) for name in _hints(kind)}


def _checked_envelope(body: bytes, sequence: int) -> dict[str, Any]:
    envelope = unseal(body, f"record {sequence}")
    if envelope.get("format") != FORMAT:
        raise CorruptRecord(f"record {sequence} has format {envelope.get('format')!r}, this keepstep reads {FORMAT}")
    if envelope.get("sequence") != sequence:
        raise CorruptRecord(f"record {sequence} says that it is number {envelope.get('sequence')!r}")
    return envelope


def _text(envelope: Mapping[str, Any], name: str) -> str:
    value = envelope.get(name)
    if not isinstance(value, str):
        raise CorruptRecord(f"record {envelope.get('sequence')}: {name} is {value!r}, not text")
    return value


def record_of(fields: Any, where: str) -> Record:
    """The inverse of `fields_of`. Fields that this version does not know are ignored: a newer one's commit must not vanish for it.

    Raises:
        CorruptRecord: these fields make no record; `where` is their name in messages.
    """
    kind = fields.get("kind") if isinstance(fields, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise CorruptRecord(f"{where} is of unknown kind {kind!r}")
    hints = _hints(kind)
    known = {name: _decode_field(fields[name], hint, f"{where}, {kind}.{name}") for name, hint in hints.items() if name in fields}
    try:
        return KINDS[kind](**known)
    except TypeError as error:
        raise CorruptRecord(f"{where}, {kind}: {error}") from None


@cache
def _hints(kind: str) -> dict[str, Any]:
    return get_type_hints(KINDS[kind])


def _decode_field(value: Any, hint: Any, where: str) -> Any:
    if hint in (int, str, bool):
        if type(value) is not hint:
            raise CorruptRecord(f"{where} is {value!r}, not {hint.__name__}")
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CorruptRecord(f"{where} is {value!r}, not a list of texts")
    return tuple(value)
