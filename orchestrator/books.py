"""The ledger of a run, kept up to date: what predecessors wrote is read once, what this term says is folded in as it comes.

Everything here is called from one thread, beside the loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from keepstep.storage.errors import StoreError
from keepstep.storage.lineage import Lineage
from keepstep.storage.steps import trained_s
from keepstep.storage.store import Store

from .archive import EventFile, read_events
from .ledger import Ledger, Share, Trained, even_share, fold, lost_steps, ratio, settled, totals
from .timing import Timing


class Shares:
    """Which part of an attempt's training counts when only its steps up to `last` do: its step records know. Asked once each."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[tuple[int, int, int], float] = {}

    def __call__(self, attempt: int, trained: Trained, last: int) -> float:
        if last <= trained.resume_step:
            return 0.0
        key = (attempt, trained.step, last)
        if key not in self._known:
            try:
                found = trained_s(self._store, attempt, last)
            except StoreError:
                return even_share(attempt, trained, last)  # asked again next time
            self._known[key] = found[0] / found[1] if found and found[1] > 0 else even_share(attempt, trained, last)
        return self._known[key]


class Books:
    """Writes a term's events, and keeps the ledger of the whole run beside them."""

    def __init__(self, store: Store, run: str, term: int) -> None:
        self._store, self._term = store, term
        self._file = EventFile(store, run)
        self._ledger: Ledger | None = None  # None: nobody could read yet what predecessors wrote
        self._unread: list[Mapping[str, Any]] = []  # events of this term that wait for that
        self._shares = Shares(store)

    def append(self, event: Mapping[str, Any]) -> None:
        self._unread.append(event)
        self._catch_up()
        self._file.append(event)

    def flush(self) -> None:
        self._file.flush()

    def document(self, lineage: Lineage, timing: Timing | None, at: float) -> dict[str, Any]:
        """Of `status`, at this instant of our clock."""
        self._catch_up()
        if self._ledger is None:
            return no_books()
        return document(settled(self._ledger, timing, at), lineage, self._shares)

    def _catch_up(self) -> None:
        if self._ledger is None:
            try:
                earlier = [event for event in read_events(self._store) if event.get("term", self._term) < self._term]
            except StoreError:
                return  # the next event or question tries again
            self._ledger = reduce(fold, earlier, Ledger())
        self._ledger = reduce(fold, self._unread, self._ledger)
        self._unread.clear()


def read_books(store: Store, lineage: Lineage) -> dict[str, Any]:
    """The same from what is in storage alone, up to the newest event. Raises StoreError."""
    ledger = reduce(fold, read_events(store), Ledger())
    return document(settled(ledger, None, ledger.upto - ledger.offset), lineage, Shares(store))


def no_books() -> dict[str, Any]:
    return document(Ledger(), Lineage(), even_share)


def document(ledger: Ledger, lineage: Lineage, share: Share) -> dict[str, Any]:
    """`goodput` and `recovery` of the status. The seconds sum to `wall_s`; ratio = productive / (wall_s - away)."""
    kept = kept_steps(lineage)
    seconds = totals(ledger, kept, share)
    goodput = {
        "ratio": round(ratio(seconds), 4),
        "wall_s": round(ledger.wall_s, 3),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "lost_steps": lost_steps(ledger, kept),
    }
    return {"goodput": goodput, "recovery": ledger.recovery}


def kept_steps(lineage: Lineage) -> dict[int, int | None]:
    """Attempt -> the last of its steps that belongs to the history; None: all of them, as far as anybody knows."""
    kept: dict[int, int | None] = {}
    for segment in lineage.segments():
        kept[segment.attempt] = segment.last if segment.last is None else max(segment.last, kept.get(segment.attempt) or 0)
    return kept
