"""What the coordinator does in the background: reads checkpoints back, retires old ones, clears away what nobody can use any more.

One thread for one reign. Nothing waits for it: a commit is as fast without it. It appends to the run log what it knows (`verified`,
`retire`) and tells the machine of damage; what it cannot do now, it does in a later round. It ends at once when the reign does.
"""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from keepstep.storage.disposal import UPLOAD_GRACE_S, dispose, find_leftovers
from keepstep.storage.errors import DamagedCheckpoint, Fenced, StoreError
from keepstep.storage.faults import fault_point
from keepstep.storage.layout import ALONE, log_key, parse_alone_key
from keepstep.storage.lineage import Lineage
from keepstep.storage.records import Commit, Retire, Verified
from keepstep.storage.retention import Retention, choose_retired
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store
from keepstep.storage.verify import Progress, verify_checkpoint
from keepstep.trainer.config import CheckpointSection

from .archive import utc_now

SWEEP_PERIOD_S: Final = 3600.0
LOOK_S: Final = 60.0  # so often at least: people and successors change the log, too
RETRY_S: Final = 30.0  # after storage was in the way
STOP_S: Final = 1.0  # how long the end of a reign waits for a call to the store to come back


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """How the janitor reaches its coordinator. Called in the janitor's thread."""

    damaged: Callable[[str, str], None]  # directory, what is wrong with it
    say: Callable[[str, str], None]  # kind and reason of an event for people
    broke: Callable[[BaseException], None]  # a bug of ours


class Stopped(Exception):
    """The reign is over; what was being done is left as it is."""


def retention_of(lineage: Lineage, section: CheckpointSection) -> Retention:
    """What the run's own config lets go."""
    return choose_retired(lineage, keep=section.keep, every=section.keep_every, trust_writes=not section.scrub)


class Janitor:
    """`start`, `nudge` after every commit, `stop`. A test calls `round` itself."""

    def __init__(
        self,
        store: Store,
        log: RunLog,
        section: CheckpointSection,
        hooks: Hooks,
        *,
        clock: Callable[[], float] = time.monotonic,
        rest: Callable[[float], bool] | None = None,
    ) -> None:
        """`rest(seconds)` waits so long, and is true as soon as the reign is over."""
        self._store = store
        self._log = log
        self._term = log.lineage.term
        self._section = section
        self._hooks = hooks
        self._clock = clock
        self._stopping = threading.Event()
        self._nudged = threading.Event()
        self._rest = rest or self._stopping.wait
        self._began_at = clock()
        self._read_at: dict[str, float] = {}  # directory -> when it was read back
        self._damaged: set[str] = set()  # reported
        self._swept_at = -math.inf
        self._is_in_trouble = False
        self._thread = threading.Thread(target=self._serve, name="janitor", daemon=True)

    @property
    def is_stopping(self) -> bool:
        return self._stopping.is_set()

    def start(self) -> None:
        self._thread.start()

    def nudge(self) -> None:
        """There is a new commit."""
        self._nudged.set()

    def stop(self) -> None:
        """Returns when the thread has ended, or after STOP_S: it may hang in a call to the store, and then does nothing after it."""
        self._stopping.set()
        self._nudged.set()
        if self._thread.is_alive():
            self._thread.join(STOP_S)

    def _serve(self) -> None:
        try:
            while True:
                self._nudged.clear()
                self._check()  # after the clearing: `stop` sets its own flag first
                self._nudged.wait(self.round())
        except (Stopped, Fenced):
            return  # the coordinator learns of its successor by its own reading
        except Exception as error:  # noqa: BLE001  (a thread's entry: a bug ends the reign instead of vanishing)
            self._hooks.broke(error)

    def round(self) -> float:
        """Does what is due, and reads at most one checkpoint back: then there may be a newer one. Seconds until more is due.

        Storage that is in the way says nothing about any checkpoint, and a chore that it stops keeps no other from being done.

        Raises:
            Stopped: the reign is over.
            Fenced: a newer coordinator reigns.
        """
        troubles = [why for chore in (self._scrub_next, self._retire, self._sweep_if_due) if (why := _trouble(chore))]
        if troubles and not self._is_in_trouble:
            self._say("storage", f"reading back and clearing away wait: {troubles[0]}")
        self._is_in_trouble = bool(troubles)
        due_s = min(self._next_scrub()[1], self._swept_at + SWEEP_PERIOD_S - self._clock(), LOOK_S)
        return max(due_s, RETRY_S if troubles else 0.0)

    # --- scrub ------------------------------------------------------------------------------------------------------

    def _next_scrub(self) -> tuple[Commit | None, float]:
        """The checkpoint to read back next and in how many seconds: the newest unverified one, else the one that waited longest."""
        lineage = self._log.lineage
        if not self._section.scrub:
            return None, math.inf
        known = [commit for commit in lineage.live if commit.directory not in lineage.quarantined | self._damaged]
        unverified = [commit for commit in known if commit.directory not in lineage.verified]
        if unverified:
            return unverified[-1], 0.0
        commit = min(known, key=self._last_read_at, default=None)
        return commit, (self._last_read_at(commit) + self._section.scrub_period_s - self._clock()) if commit else math.inf

    def _last_read_at(self, commit: Commit) -> float:
        """By our own clock; what an earlier term read counts as read when ours began."""
        return self._read_at.get(commit.directory, self._began_at)

    def _scrub_next(self) -> None:
        commit, wait_s = self._next_scrub()
        if commit and wait_s <= 0:
            self._scrub(commit)

    def _scrub(self, commit: Commit) -> None:
        if damage := self._damage_of(commit):
            self._report(commit, damage)
            return
        self._read_at[commit.directory] = self._clock()
        if commit.directory not in self._log.lineage.verified:
            self._append(Verified(term=self._term, directory=commit.directory, at=utc_now()))

    def _damage_of(self, commit: Commit) -> str:
        """What is wrong with its bytes; "" if nothing is. What looks wrong is read again: it may have been damaged on its way to us."""
        store = _unhurried(self._store)
        why = ""
        for _ in range(2):
            store.drop_cache(commit.directory)
            try:
                verify_checkpoint(store, commit.directory, commit.manifest_sha256, self._pace())
            except DamagedCheckpoint as error:
                why = f"{error.file}: {error.why}"
            else:
                return ""
        if not store.exists(log_key(0)):
            raise StoreError(f"{store.name} shows neither {commit.directory} nor its run log: is it mounted?")
        return why

    def _pace(self) -> Progress:
        """Keeps to checkpoint.scrub_mb_per_s. Raises Stopped in whoever calls it."""
        began, bytes_per_s = self._clock(), self._section.scrub_mb_per_s * 1e6

        def pace(done: int, _: int) -> None:
            ahead_s = done / bytes_per_s - (self._clock() - began) if bytes_per_s else 0.0
            if self._rest(max(0.0, ahead_s)):
                raise Stopped

        return pace

    def _report(self, commit: Commit, damage: str) -> None:
        """Unless somebody retired it while we read: then it is no wonder that files are missing."""
        self._log.refresh()
        self._check()
        lineage = self._log.lineage
        if lineage.commit_of(commit.directory) and commit.directory not in lineage.quarantined:
            self._damaged.add(commit.directory)
            self._hooks.damaged(commit.directory, damage)

    # --- retire -----------------------------------------------------------------------------------------------------

    def _retire(self) -> None:
        """Record first, deletion afterwards: nobody resumes from what is about to go."""
        lineage = self._log.lineage
        if any(lineage.commit_of(directory) for directory in self._damaged - lineage.quarantined):
            return  # its quarantine is on the way to the log, and changes what must stay
        chosen = retention_of(lineage, self._section)
        record = Retire(term=self._term, directories=chosen.retire, why=chosen.why, at=utc_now())
        if not chosen.retire or not self._append(record):
            return
        fault_point("coordinator.retire.after")
        self._say("retired", f"{', '.join(chosen.retire)}: {chosen.why}")
        try:
            self._dispose(chosen.retire)
        except StoreError:
            self._swept_at = -math.inf  # what is left of them is garbage: with the next round
            raise

    def _append(self, record: Verified | Retire) -> bool:
        """False when it would be void: somebody retired, pinned or quarantined meanwhile. The next round sees that."""
        self._check()
        try:
            self._log.append(record)
        except ValueError:
            return False
        return True

    # --- sweep ------------------------------------------------------------------------------------------------------

    def _sweep_if_due(self) -> None:
        if self._clock() - self._swept_at < SWEEP_PERIOD_S:
            return
        left = find_leftovers(self._store, self._log.lineage, is_log_whole=self._log.is_whole)
        self._dispose(left.garbage)
        for key in self._store.list(ALONE):
            if (term := parse_alone_key(key)) is not None and term < self._term:  # was said to somebody who rules no more
                self._store.delete(key)
        num_halves = self._store.sweep(UPLOAD_GRACE_S)
        self._swept_at = self._clock()
        if left.garbage or num_halves:
            self._say("swept", f"{len(left.garbage)} directories that nobody can commit and {num_halves} half-written objects")

    def _dispose(self, directories: tuple[str, ...]) -> None:
        for directory in directories:
            self._check()
            dispose(self._store, directory)

    def _check(self) -> None:
        if self.is_stopping:
            raise Stopped

    def _say(self, kind: str, why: str) -> None:
        self._check()
        self._hooks.say(kind, why)


def _trouble(chore: Callable[[], None]) -> str:
    """What storage had against it; "" if it is done."""
    try:
        chore()
    except StoreError as error:
        return str(error)
    return ""


def _unhurried(store: Store) -> Store:
    """The same store, read by one thread, block after block: so the pace holds, and training keeps the other connections."""
    alone = copy.copy(store)
    alone.parallel_reads = 1
    return alone
