"""What opens a long log quickly: a snapshot of what its first records mean, and a hint where the newest one lies.

Neither is an authority. A snapshot is believed only when its check fits its bytes and the record that it ends with still has the hash
that it names; a hint only says where to look first. Without them, or with damaged ones, the log says the same, more slowly.

    snapshots/0000000256.json    put_new: whoever writes it writes the same bytes; the newest two are kept
    hint.json                    overwritten after each commit
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from .canonical import seal, sha256_hex, unseal
from .errors import CorruptRecord, StoreError, StoreUnavailable
from .layout import HINT_KEY, SNAPSHOTS, log_key, parse_snapshot_key, snapshot_key
from .lineage import End, Lineage
from .records import Attempt, Commit, Failed, Finished, Opened, Record, Rewind, fields_of, record_of
from .store import Store

R = TypeVar("R", bound=Record)
T = TypeVar("T")

FORMAT: Final = 5
"""Raise it whenever records come to mean something else (a new kind, another rule in `Folding`): old snapshots say what they meant then."""
PERIOD: Final = 256
KEPT: Final = 2
MAX_ALARMS: Final = 16
OUTCOMES: Final[tuple[type[Finished | Failed], ...]] = (Finished, Failed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What the first `count` records of a log mean."""

    count: int
    head: str  # SHA-256 of the bytes of record count - 1: of this log, and no other
    num_corrupt: int  # so many of them could not be read
    num_unread: int  # so many since the newest record that counts
    lineage: Lineage
    alarms: tuple[str, ...] = ()  # the newest that these records raise

    def body(self) -> bytes:
        """Canonical: two coordinators that read the same records write the same bytes."""
        envelope = {"format": FORMAT, "count": self.count, "head": self.head, "alarms": self.alarms}
        unreadable = {"num_corrupt": self.num_corrupt, "num_unread": self.num_unread}
        return seal(envelope | unreadable | {"lineage": _fields_of_lineage(self.lineage)})

    @staticmethod
    def parse(body: bytes, count: int) -> Snapshot:
        """Raises CorruptRecord: these bytes are no snapshot of so many records, or one by another version."""
        what = snapshot_key(count)
        fields = unseal(body, what)
        if (fields.get("format"), fields.get("count")) != (FORMAT, count):
            raise CorruptRecord(f"{what} has format {fields.get('format')!r} and covers {fields.get('count')!r} records")
        return Snapshot(
            count=count,
            head=_take(fields, "head", str, what),
            num_corrupt=_take(fields, "num_corrupt", int, what),
            num_unread=_take(fields, "num_unread", int, what),
            lineage=_lineage_of(_take(fields, "lineage", dict, what), what),
            alarms=_texts(fields, "alarms", what),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """How far the log went when somebody looked."""

    records: int
    head: str  # SHA-256 of the bytes of record records - 1
    snapshot: int  # records that the newest snapshot covers; 0: there is none yet

    def body(self) -> bytes:
        return seal({"format": FORMAT, "records": self.records, "head": self.head, "snapshot": self.snapshot})

    @staticmethod
    def parse(body: bytes) -> Hint:
        """Raises CorruptRecord: these bytes are no hint."""
        fields = unseal(body, HINT_KEY)
        if fields.get("format") != FORMAT:
            raise CorruptRecord(f"{HINT_KEY} has format {fields.get('format')!r}")
        return Hint(
            records=_take(fields, "records", int, HINT_KEY),
            head=_take(fields, "head", str, HINT_KEY),
            snapshot=_take(fields, "snapshot", int, HINT_KEY),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortcut:
    """Where a reader may begin, and what was wrong with what it found; nothing at all where it must read the whole log."""

    hint: Hint | None
    snapshot: Snapshot | None
    alarms: tuple[str, ...]


def find_shortcut(store: Store) -> Shortcut:
    """The newest snapshot that can be believed. One look at the hint, one round trip for the snapshot and its last record.

    Raises:
        StoreError: the store answers nobody, or lists nothing; objects that are not for us to read only make the way longer.
    """
    alarms: list[str] = []
    hint = _find_hint(store, alarms)
    snapshots = (_believable(store, count, alarms) for count in _candidates(store, hint))
    return Shortcut(hint=hint, snapshot=next(filter(None, snapshots), None), alarms=tuple(alarms))


def write_snapshot(store: Store, snapshot: Snapshot) -> None:
    """And forgets all but the newest ones. Raises StoreError."""
    store.put_new(snapshot_key(snapshot.count), snapshot.body())  # another one there: somebody's, or damaged; the next replaces it
    for count in _counts(store)[KEPT:]:
        store.delete(snapshot_key(count))


def write_hint(store: Store, hint: Hint) -> None:
    """Raises StoreError."""
    store.put(HINT_KEY, hint.body())


def _find_hint(store: Store, alarms: list[str]) -> Hint | None:
    (body,) = _read(store, [HINT_KEY])
    if body is None:
        return None
    try:
        return Hint.parse(body)
    except CorruptRecord as error:
        alarms.append(f"{error}; the hint is not used")
        return None


def _candidates(store: Store, hint: Hint | None) -> Iterator[int]:
    """Where snapshots may lie, the most promising first. A stale hint costs a listing, nothing more."""
    hinted = hint.snapshot if hint else 0
    if hinted:
        yield hinted
    yield from (count for count in _counts(store) if count != hinted)


def _counts(store: Store) -> Sequence[int]:
    """Of all snapshots, the newest first."""
    return sorted((count for count in map(parse_snapshot_key, store.list(SNAPSHOTS)) if count), reverse=True)


def _believable(store: Store, count: int, alarms: list[str]) -> Snapshot | None:
    body, last = _read(store, [snapshot_key(count), log_key(count - 1)])
    if body is None:
        return None
    try:
        snapshot = Snapshot.parse(body, count)
    except CorruptRecord as error:
        alarms.append(f"{error}; the snapshot is not used")
        return None
    if last is None or sha256_hex(last) != snapshot.head:
        alarms.append(f"{snapshot_key(count)} does not belong to this log: record {count - 1} is another one; the snapshot is not used")
        return None
    return snapshot


def _read(store: Store, keys: Sequence[str]) -> list[bytes | None]:
    """None for what is not there, or not for us to read: the log itself is read then, so it hurts nobody."""
    bodies = store.get_many(keys)
    for body in bodies:
        if isinstance(body, StoreUnavailable):
            raise body
    return [None if isinstance(body, StoreError) else body for body in bodies]


def _fields_of_lineage(lineage: Lineage) -> dict[str, Any]:
    return {
        "opened": _fields(lineage.opened),
        "attempt": _fields(lineage.attempt),
        "resumed": _fields(lineage.resumed),
        "num_attempts": lineage.num_attempts,
        "began_at": lineage.began_at,
        "commits": [fields_of(commit) for commit in lineage.commits],
        "abandoned": [fields_of(commit) for commit in lineage.abandoned],
        "ends": [{"attempt": end.attempt, "step": end.step} for end in lineage.ends],
        "quarantined": sorted(lineage.quarantined),
        "pinned": sorted(lineage.pinned),
        "verified": sorted(lineage.verified),
        "ever_committed": lineage.ever_committed,
        "outcome": _fields(lineage.outcome),
        "is_ended": lineage.is_ended,
        "skips": lineage.skips,
        "overrides": lineage.overrides,
        "rewound": _fields(lineage.rewound),
        "num_bad_steps": lineage.num_bad_steps,
        "tips": sorted(lineage.tips),
    }


def _fields(record: Record | None) -> dict[str, Any] | None:
    return None if record is None else fields_of(record)


def _lineage_of(fields: Mapping[str, Any], what: str) -> Lineage:
    return Lineage(
        opened=_record(fields, "opened", what, Opened),
        attempt=_record(fields, "attempt", what, Attempt),
        resumed=_record(fields, "resumed", what, Commit),
        num_attempts=_take(fields, "num_attempts", int, what),
        began_at=_take(fields, "began_at", str, what),
        commits=_commits(fields, "commits", what),
        abandoned=_commits(fields, "abandoned", what),
        ends=tuple(_end(end, what) for end in _take(fields, "ends", list, what)),
        quarantined=frozenset(_texts(fields, "quarantined", what)),
        pinned=frozenset(_texts(fields, "pinned", what)),
        verified=frozenset(_texts(fields, "verified", what)),
        ever_committed=_take(fields, "ever_committed", bool, what),
        outcome=_record(fields, "outcome", what, *OUTCOMES),
        is_ended=_take(fields, "is_ended", bool, what),
        skips=_texts(fields, "skips", what),
        overrides=_texts(fields, "overrides", what),
        rewound=_record(fields, "rewound", what, Rewind),
        num_bad_steps=_take(fields, "num_bad_steps", int, what),
        tips=frozenset(_texts(fields, "tips", what)),
    )


def _record(fields: Mapping[str, Any], name: str, what: str, *kinds: type[R]) -> R | None:
    return None if fields.get(name) is None else _of_kind(fields[name], f"{what}, {name}", *kinds)


def _commits(fields: Mapping[str, Any], name: str, what: str) -> tuple[Commit, ...]:
    return tuple(_of_kind(commit, f"{what}, {name}", Commit) for commit in _take(fields, name, list, what))


def _of_kind(fields: Any, where: str, *kinds: type[R]) -> R:
    record = record_of(fields, where)
    if not isinstance(record, kinds):
        raise CorruptRecord(f"{where} holds {record}")
    return record


def _end(fields: Any, what: str) -> End:
    return End(attempt=_take(fields, "attempt", int, what), step=_take(fields, "step", int, what))


def _texts(fields: Mapping[str, Any], name: str, what: str) -> tuple[str, ...]:
    return tuple(str(text) for text in _take(fields, name, list, what))


def _take(fields: Mapping[str, Any], name: str, kind: type[T], what: str) -> T:
    value = fields.get(name)
    if type(value) is not kind:
        raise CorruptRecord(f"{what}: {name} is {value!r}, not {kind.__name__}")
    return value
