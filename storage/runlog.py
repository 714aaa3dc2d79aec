"""The run log on a root: the only authority over what happened. Dense numbers, hash-chained, written by put_new alone, never deleted.

A writer must have read all records before its own number. So a coordinator of an older term either loses the race for the next
number and then meets the newer `opened`, or has read it already; in both cases it is fenced without any clock or lease.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from .errors import Fenced, StoreError
from .layout import log_key
from .logreader import LogReader
from .records import Entry, Opened, Record, decode, encode
from .snapshots import PERIOD, Hint, write_hint, write_snapshot
from .store import Store

R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    """A record that may or may not have been written: appending it again must not write it twice."""

    record: Record
    sequence: int
    uuid: str


class RunLog(LogReader):
    """A log that can be written, too. One object serves one coordinator, or one visitor."""

    def __init__(self, store: Store, *, period: int = PERIOD, sleep: Callable[[float], None] = time.sleep) -> None:
        super().__init__(store, period=period, sleep=sleep)
        self._pending: _Pending | None = None
        self._hinted = 0  # records that the hint which we wrote knows of

    def append(self, record: R) -> R:
        """Makes `record` the next one of the log.

        `pin`, `verified`, `retire` and `quarantine` may come from anybody who acts under the newest term, the command line for one.

        Raises:
            Fenced: a newer term was opened, or a record that cannot be read may have opened one; this coordinator's reign is over.
            ValueError: the record would be void (see `Folding.refusal`).
            StoreError: unknown whether it was written. Append the same record again: it will be there once.
        """
        with self._lock:
            if not self._is_open:
                self._read()
            while not self._is_written(record) and not self._append_next(record):
                self._read_taken()
            self._pending = None
            return record

    def open_term(self, *, run: str, identity: str, host: str, pid: int, url: str = "", at: str = "") -> Opened:
        """Begins to reign: appends `opened` with the next term.

        The next term is one above the newest that we could read. If some record could not be read, it may have been an `opened`, and
        its coordinator may be alive; so the new term is then the number of its own record plus 1. No record before can hold that term:
        by induction, the term of an `opened` is at most its number plus 1. So two coordinators never share a term, whatever either
        of them could read.

        Raises:
            Fenced: somebody else opened a term first.
            ValueError: the root holds another run.
        """
        with self._lock:
            self._read()
            before = self.lineage.opened
            while True:
                opened = Opened(term=self._next_term(), run=run, identity=identity, host=host, pid=pid, url=url, at=at)
                if self._append_next(opened):
                    self._pending = None
                    return opened
                self._read_taken()
                if self.lineage.opened is not None and self.lineage.opened != before:
                    raise Fenced(self.lineage.opened)

    def tidy(self) -> bool:
        """Writes the hint, and a snapshot when one is due, for the next reader. False where the store was in the way: nothing is lost."""
        with self._lock:
            try:
                self._write_snapshot()
                self._write_hint()
            except StoreError:
                return False  # hurts nobody but the next reader, who reads a little more
            return True

    def _next_term(self) -> int:
        return self.lineage.term + 1 if self.is_whole else max(self.lineage.term, self.count) + 1

    def _unread_successor(self) -> tuple[Opened, str]:
        """Nobody may act under a term that may be over: a commit could be lost, or a checkpoint deleted that somebody else counts on."""
        last = self.lineage.opened
        opened = Opened(term=self.count, run="", identity="", host="a record that cannot be read", pid=0)
        term = last.term if last else 0
        return (
            opened,
            f"the newest records after term {term} cannot be read ({self._num_unread}), a newer term may be among them; open another",
        )

    def _append_next(self, record: Record) -> bool:
        opened = self.lineage.opened
        if opened and (record.term < opened.term or (isinstance(record, Opened) and record.term == opened.term)):
            raise Fenced(opened)
        if self._num_unread and not isinstance(record, Opened):
            raise Fenced(*self._unread_successor())
        if why := self._folding.refusal(record):
            raise ValueError(f"this record would be void: {why}")
        pending = self._pend(record)
        body = encode(record, sequence=pending.sequence, uuid=pending.uuid, previous=self.head)
        if not self.store.put_new(log_key(pending.sequence), body):
            return False
        self._take([decode(body, sequence=pending.sequence)])
        return True

    def _pend(self, record: Record) -> _Pending:
        """The same UUID for the same record at the same number: after an ambiguous error the store tells whether it is ours."""
        pending, sequence = self._pending, self.count
        if pending is None or pending.record != record or pending.sequence != sequence:
            pending = _Pending(record=record, sequence=sequence, uuid=uuid.uuid4().hex)
        self._pending = pending
        return pending

    def _is_written(self, record: Record) -> bool:
        pending = self._pending
        if pending is None or pending.record != record or pending.sequence >= self.count:
            return False
        return self.entries[pending.sequence - self._base].uuid == pending.uuid

    def _is_ours(self, entry: Entry) -> bool:
        """Its writing was not acknowledged, and yet it is there."""
        return self._pending is not None and entry.uuid == self._pending.uuid

    def _read_taken(self) -> None:
        """Somebody else has the next number: what did they write?"""
        taken = self.count
        self._read()
        if self.count == taken:
            raise StoreError(f"{log_key(taken)} is taken in {self.store.name}, but cannot be read")

    def _write_snapshot(self) -> None:
        if self._snapshot is not None and self._snapshot.count > self._written:
            write_snapshot(self.store, self._snapshot)
            self._written = self._snapshot.count

    def _write_hint(self) -> None:
        if self.count > self._hinted:
            write_hint(self.store, Hint(records=self.count, head=self.head, snapshot=self._written))
            self._hinted = self.count
