"""The run log on a root: the only authority over what happened. Dense numbers, hash-chained, written by put_new alone, never deleted.

A writer must have read all records before its own number. So a coordinator of an older term either loses the race for the next
number and then meets the newer `opened`, or has read it already; in both cases it is fenced without any clock or lease.
"""

from __future__ import annotations

import threading
import uuid
from dataclasses import dataclass
from typing import TypeVar

from .errors import CorruptRecord, Fenced, NotFound, StoreError
from .layout import LOG, log_key, parse_log_key
from .lineage import Lineage, fold, refusal
from .records import Attempt, Entry, Opened, Record, corrupt_entry, decode, encode
from .store import Store

R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    """A record that may or may not have been written: appending it again must not write it twice."""

    record: Record
    sequence: int
    uuid: str


class RunLog:
    """All records of a root and what they mean. Thread-safe; one object serves one reader or one coordinator.

    Attributes:
        entries: every record in its place, corrupt ones included.
        lineage: their meaning.
        alarms: corrupt, missing and void records, one sentence each, for people.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.entries: list[Entry] = []
        self.lineage = Lineage()
        self.alarms: list[str] = []
        self._pending: _Pending | None = None
        self._lock = threading.RLock()

    @staticmethod
    def open(store: Store) -> RunLog:
        """Reads the whole log, many records at once; an empty root gives an empty log.

        Raises:
            StoreError: a record could not be read. (A record that is gone while newer ones exist is an alarm, not an error.)
        """
        log = RunLog(store)
        numbers = [number for number in map(parse_log_key, store.list(LOG)) if number is not None]
        bodies = store.get_many([log_key(number) for number in range(max(numbers, default=-1) + 1)])
        for body in bodies:
            log._take(body)
        log.refresh()
        return log

    @property
    def records(self) -> tuple[Record, ...]:
        """Those that can be read, void ones included."""
        return tuple(entry.record for entry in self.entries if entry.record is not None)

    def newest_attempt(self) -> Attempt | None:
        return self.lineage.newest_attempt()

    def newest_opened(self) -> Opened | None:
        return self.lineage.opened

    def refresh(self) -> tuple[Record, ...]:
        """Reads what others appended since; the new records. Costs one request when there is nothing new."""
        with self._lock:
            known = len(self.entries)
            while (body := self._read_next()) is not None:
                self._take(body)
            return tuple(entry.record for entry in self.entries[known:] if entry.record is not None)

    def append(self, record: R) -> R:
        """Makes `record` the next one of the log.

        Raises:
            Fenced: a newer term was opened; this coordinator's reign is over.
            ValueError: the record would be void (see `lineage.refusal`).
            StoreError: unknown whether it was written. Append the same record again: it will be there once.
        """
        with self._lock:
            while not self._is_written(record) and not self._append_next(record):
                if not self.refresh():
                    raise StoreError(f"{log_key(len(self.entries))} is taken in {self.store.name}, but cannot be read")
            self._pending = None
            return record

    def open_term(self, *, run: str, identity: str, host: str, pid: int, url: str = "", at: str = "") -> Opened:
        """Begins to reign: appends `opened` with the next term.

        Raises:
            Fenced: somebody else opened that term first.
            ValueError: the root holds another run.
        """
        with self._lock:
            self.refresh()
            term = self.lineage.term + 1
            return self.append(Opened(term=term, run=run, identity=identity, host=host, pid=pid, url=url, at=at))

    def _append_next(self, record: Record) -> bool:
        opened = self.lineage.opened
        if opened and (record.term < opened.term or (isinstance(record, Opened) and record.term == opened.term)):
            raise Fenced(opened)
        if why := refusal(self.lineage, record):
            raise ValueError(f"this record would be void: {why}")
        pending = self._pend(record)
        previous = self.entries[-1].sha256 if self.entries else ""
        body = encode(record, sequence=pending.sequence, uuid=pending.uuid, previous=previous)
        if not self.store.put_new(log_key(pending.sequence), body):
            return False
        self._take(body)
        return True

    def _pend(self, record: Record) -> _Pending:
        """The same UUID for the same record at the same number: after an ambiguous error the store tells whether it is ours."""
        pending, sequence = self._pending, len(self.entries)
        if pending is None or pending.record != record or pending.sequence != sequence:
            pending = _Pending(record=record, sequence=sequence, uuid=uuid.uuid4().hex)
        self._pending = pending
        return pending

    def _is_written(self, record: Record) -> bool:
        pending = self._pending
        is_read = pending is not None and pending.record == record and pending.sequence < len(self.entries)
        return is_read and pending is not None and self.entries[pending.sequence].uuid == pending.uuid

    def _read_next(self) -> bytes | None:
        try:
            return self.store.get(log_key(len(self.entries)))
        except NotFound:
            return None

    def _take(self, body: bytes | StoreError) -> None:
        """Gives the next number to these bytes."""
        if isinstance(body, StoreError) and not isinstance(body, NotFound):
            raise body
        sequence = len(self.entries)
        entry = self._decode(body, sequence) if isinstance(body, bytes) else self._missing(sequence)
        if entry.record is not None:
            self._check_chain(entry)
            if why := refusal(self.lineage, entry.record):
                self.alarms.append(f"record {sequence} is void: {why}")
            self.lineage = fold(self.lineage, entry.record)
        self.entries.append(entry)

    def _decode(self, body: bytes, sequence: int) -> Entry:
        try:
            return decode(body, sequence=sequence)
        except CorruptRecord as error:
            self.alarms.append(f"{error}; it is void, its number stays taken")
            return corrupt_entry(body, sequence=sequence)

    def _missing(self, sequence: int) -> Entry:
        self.alarms.append(f"record {sequence} is gone although newer ones exist: somebody deleted it")
        return corrupt_entry(b"", sequence=sequence)

    def _check_chain(self, entry: Entry) -> None:
        before = self.entries[-1] if self.entries else None
        if entry.previous != (before.sha256 if before else ""):
            self.alarms.append(f"record {entry.sequence} does not continue the bytes of record {entry.sequence - 1}: the past was changed")
