"""Reading the run log: from the newest snapshot that can be believed, in windows of parallel requests, doubting what does not decode."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, Self

from .errors import CorruptRecord, NotFound, StoreError
from .layout import LOG, log_key, parse_log_key
from .lineage import Folding, Lineage
from .records import Attempt, Entry, Opened, Record, corrupt_entry, decode
from .snapshots import MAX_ALARMS, PERIOD, Hint, Snapshot, find_shortcut
from .store import Store

WINDOW: Final = 16  # records that are asked for at once where nobody knows how many there are
CHUNK: Final = 4096  # where it is known
REREADS: Final = 2
REREAD_PAUSE_S: Final = 0.1


class LogReader:
    """The records of a root and what they mean. Thread-safe.

    Nothing is read before the first `refresh`.

    Attributes:
        entries: every record that was read here, in its place, corrupt ones included; those before a snapshot's end are not.
        head: SHA-256 of the bytes of the newest record, "" for an empty log.
        lineage: the meaning of all records, those under the snapshot too.
        alarms: corrupt, missing and void records, damaged snapshots: one sentence each, for people.
        is_whole: every record could be read and continues the one before it. While it is false, a commit may have been lost.
    """

    def __init__(self, store: Store, *, period: int = PERIOD, sleep: Callable[[float], None] = time.sleep) -> None:
        self.store = store
        self.entries: list[Entry] = []
        self.lineage = Lineage()
        self.alarms: list[str] = []
        self._folding = Folding(self.lineage)
        self._is_open = False
        self._listed = 0  # so many records exist, says a listing
        self._expected = 0  # so many may exist
        self._hint: Hint | None = None  # not compared with the log yet
        self._base = 0  # records under the snapshot that we began with
        self.head = ""
        self._num_corrupt = 0
        self._num_unread = 0  # corrupt ones since the newest record that counts: each may be an `opened`
        self._is_chained = True
        self._log_alarms: list[str] = []  # those that every reader of these records raises
        self._snapshot: Snapshot | None = None  # the newest that we know; it may not be written yet
        self._written = 0  # records under the newest snapshot that is written
        self._news: list[Record] = []  # read, and not returned by `refresh` yet
        self._period = period  # records from one snapshot to the next
        self._sleep = sleep
        self._lock = threading.RLock()

    @classmethod
    def open(cls, store: Store) -> Self:
        """Reads a log from its newest snapshot on; an empty root gives an empty log.

        Raises:
            StoreError: a record could not be read. (A record that is gone while newer ones exist is an alarm, not an error.)
        """
        log = cls(store)
        log.refresh()
        return log

    @classmethod
    def read_all(cls, store: Store) -> Self:
        """Reads every record and no snapshot: for audits. Raises StoreError."""
        log = cls(store)
        log._listed, log._is_open = log._list(), True
        log.refresh()
        return log

    @property
    def count(self) -> int:
        """Records so far: the number of the next one."""
        return self._base + len(self.entries)

    @property
    def is_whole(self) -> bool:
        return self._is_chained and not self._num_corrupt

    @property
    def records(self) -> tuple[Record, ...]:
        """Those of `entries` that can be read, void ones included."""
        return tuple(entry.record for entry in self.entries if entry.record is not None)

    def newest_attempt(self) -> Attempt | None:
        return self.lineage.newest_attempt()

    def newest_opened(self) -> Opened | None:
        return self.lineage.opened

    def refresh(self) -> tuple[Record, ...]:
        """Reads what others appended. Costs one request when there is nothing new.

        Returns:
            the records of others that no call returned before, also those that an `append` met or that came before an error.

        Raises:
            StoreError: a record could not be read; those before it were taken.
        """
        with self._lock:
            self._read()
            news, self._news = self._news, []
            return tuple(news)

    def _read(self) -> None:
        if not self._is_open:
            self._begin()
        self._read_forward()
        self._check_hint()

    def _begin(self) -> None:
        """At the newest snapshot, else at the first record."""
        shortcut = find_shortcut(self.store)
        if shortcut.snapshot:
            self._adopt(shortcut.snapshot)
        else:
            self._listed = self._list()
        self._hint = shortcut.hint
        self._expected = max(shortcut.hint.records if shortcut.hint else 0, self.count + WINDOW if shortcut.snapshot else 0)
        self.alarms.extend(shortcut.alarms)
        self._is_open = True

    def _adopt(self, snapshot: Snapshot) -> None:
        self._base, self.head = snapshot.count, snapshot.head
        self._num_corrupt, self._num_unread = snapshot.num_corrupt, snapshot.num_unread
        self._folding, self.lineage = Folding(snapshot.lineage, has_lost=snapshot.num_corrupt > 0), snapshot.lineage
        self._snapshot, self._written = snapshot, snapshot.count
        self._log_alarms = list(snapshot.alarms)
        self.alarms.extend(snapshot.alarms)

    def _list(self) -> int:
        """So many records exist at least."""
        return max((number for number in map(parse_log_key, self.store.list(LOG)) if number is not None), default=-1) + 1

    def _read_forward(self) -> None:
        """To the end: all at once while it is known how many there are, then in growing windows until one is not full."""
        size = 1
        while self._read_window(wanted := max(size, min(max(self._listed, self._expected) - self.count, CHUNK))) == wanted:
            size = min(2 * size, WINDOW)
        self._expected = 0

    def _read_window(self, size: int) -> int:
        """Takes what there is of the next `size` records; how many there are."""
        bodies = self.store.get_many([log_key(self.count + offset) for offset in range(size)])
        readable = list(itertools.takewhile(lambda body: isinstance(body, bytes | NotFound), bodies))
        there = readable[: self._num_there(readable)]
        entries = self._settle(there)
        self._take(entries)
        self._news += [entry.record for entry in entries if entry.record is not None and not self._is_ours(entry)]
        if len(readable) < size and isinstance(error := bodies[len(readable)], StoreError):
            raise error
        return len(there)

    def _is_ours(self, entry: Entry) -> bool:
        """Who only reads has none."""
        return False

    def _num_there(self, bodies: Sequence[bytes | StoreError]) -> int:
        """What is missing at the end of these is not written yet, unless the listing showed it or one after it."""
        written = (offset for offset, body in enumerate(bodies, 1) if isinstance(body, bytes) or self.count + offset <= self._listed)
        return max(written, default=0)

    def _settle(self, bodies: Sequence[bytes | StoreError]) -> list[Entry]:
        """The entries of these bytes. What is missing or cannot be decoded is read again before it is believed: a proxy may have lied,
        and two requests of one window may have crossed a write."""
        start = self.count
        entries = [_entry(body, number) for number, body in enumerate(bodies, start)]
        for _ in range(REREADS):
            doubtful = [entry.sequence for entry in entries if entry.record is None]
            if not doubtful:
                break
            self._sleep(REREAD_PAUSE_S)
            for number, body in zip(doubtful, self.store.get_many([log_key(number) for number in doubtful]), strict=True):
                entries[number - start] = _entry(body, number)
        return entries

    def _take(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._add(entry)
        self.lineage = self._folding.lineage() if entries else self.lineage

    def _add(self, entry: Entry) -> None:
        self._check_chain(entry)
        if entry.record is None:
            self._num_corrupt, self._num_unread = self._num_corrupt + 1, self._num_unread + 1
            self._folding.lose()
            self._alarm(f"{entry.why}; it is void, its number stays taken")
        elif why := self._folding.add(entry.record):
            self._alarm(f"record {entry.sequence} is void: {why}")
        else:
            self._num_unread = 0  # its writer could read them, and still reigned
        self.entries.append(entry)
        self.head = entry.sha256
        if self.count % self._period == 0:
            self._remember(entry)

    def _check_chain(self, entry: Entry) -> None:
        """Each record confirms the bytes of the one before it. Of two corrupt ones in a row, nobody confirms the first."""
        if entry.record is None:
            self._is_chained = self._is_chained and not (self.entries and self.entries[-1].record is None)
        elif entry.previous != self.head:
            self._is_chained = False
            self._alarm(f"record {entry.sequence} does not continue the bytes of record {entry.sequence - 1}: the past was changed")

    def _remember(self, last: Entry) -> None:
        """For the next snapshot. Only what the chain confirms: a snapshot must not make our own misreading last."""
        if self._is_chained and last.record is not None:
            self._snapshot = Snapshot(
                count=self.count,
                head=self.head,
                num_corrupt=self._num_corrupt,
                num_unread=self._num_unread,
                lineage=self._folding.lineage(),
                alarms=tuple(self._log_alarms[-MAX_ALARMS:]),
            )

    def _check_hint(self) -> None:
        hint, self._hint = self._hint, None
        if hint is None:
            return
        if hint.records > self.count:
            self._is_chained = False
            self.alarms.append(f"the log ends after {self.count} records, {hint.records} existed: the newest were deleted")
        elif hint.records > self._base and self.entries[hint.records - 1 - self._base].sha256 != hint.head:
            self.alarms.append(f"the hint does not belong to this log: record {hint.records - 1} is another one")

    def _alarm(self, why: str) -> None:
        self._log_alarms.append(why)
        self.alarms.append(why)


def _entry(body: bytes | StoreError, sequence: int) -> Entry:
    """Raises a StoreError that says nothing about the record."""
    if isinstance(body, NotFound):
        return corrupt_entry(b"", sequence=sequence, why=f"record {sequence} is gone although newer ones exist: somebody deleted it")
    if isinstance(body, StoreError):
        raise body
    try:
        return decode(body, sequence=sequence)
    except CorruptRecord as error:
        return corrupt_entry(body, sequence=sequence, why=str(error))
