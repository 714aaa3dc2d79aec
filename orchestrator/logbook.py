"""The machine's requests as records of the run log, and the log's history as the machine's first event. One thread calls this.

A request that comes twice finds its record in the log and is answered with it; only what storage raised is not an answer.
"""

from __future__ import annotations

import secrets
import time
from typing import assert_never

from keepstep.storage.errors import Fenced, StoreError
from keepstep.storage.faults import fault_point
from keepstep.storage.layout import ALONE, ALONE_ENDED, alone_key, log_key
from keepstep.storage.lineage import Lineage
from keepstep.storage.manifest import Manifest
from keepstep.storage.records import Attempt, Commit, Failed, Finished, Quarantine, Rewind
from keepstep.storage.runlog import RunLog

from . import events as ev
from .archive import utc_now
from .commits import InvalidCheckpoint, complete_newest


class Logbook:
    """Raises StoreError when storage is in the way, Fenced when a newer coordinator reigns."""

    def __init__(self, log: RunLog, term: int) -> None:
        self._log = log
        self._term = term

    def carry_out(
        self, request: ev.FindCheckpoint | ev.FindAlone | ev.LogAttempt | ev.LogQuarantine | ev.LogRewind | ev.LogEnd
    ) -> ev.Event:
        match request:
            case ev.FindCheckpoint():
                return self._find()
            case ev.FindAlone():
                return self._find_alone(request)
            case ev.LogAttempt():
                return self._attempt(request)
            case ev.LogQuarantine():
                return ev.Logged(time.monotonic(), self._quarantine(request))
            case ev.LogRewind():
                return self._rewind(request)
            case ev.LogEnd():
                return ev.Logged(time.monotonic(), self._end(request))
            case _:
                assert_never(request)

    def commit(self, manifest: Manifest) -> ev.Committed:
        """Makes the checkpoint exist."""
        self._log.refresh()
        sha256 = manifest.sha256()
        if self._log.lineage.commit_of(manifest.directory) is None:
            self._append_commit(manifest, sha256)
        return ev.Committed(
            at=time.monotonic(), attempt=manifest.attempt, step=manifest.step, directory=manifest.directory, manifest_sha256=sha256
        )

    def _append_commit(self, manifest: Manifest, sha256: str) -> None:
        record = Commit(
            term=self._term,
            attempt=manifest.attempt,
            step=manifest.step,
            directory=manifest.directory,
            manifest_sha256=sha256,
            world_size=manifest.world_size,
            best_step=manifest.best_step,
            at=utc_now(),
        )
        fault_point("coordinator.commit.before", step=record.step)
        try:
            self._log.append(record)
        except ValueError as error:  # void: a newer attempt was logged, or a newer step committed
            raise InvalidCheckpoint(str(error)) from error
        fault_point("coordinator.commit.after", step=record.step)

    def _find(self) -> ev.Found:
        """A predecessor may have died between the last part of a save and its commit record: that checkpoint counts."""
        rolled_forward = self._roll_forward()
        quarantined = self._log.lineage.quarantined
        return ev.Found(time.monotonic(), newest_checkpoint(self._log), rolled_forward=rolled_forward, quarantined=quarantined)

    def _find_alone(self, request: ev.FindAlone) -> ev.FoundAlone:
        """A successor sweeps what was said to us: it must not look as if nobody had said anything. Nor must a root that is not mounted."""
        store = self._log.store
        said = frozenset(store.list(ALONE))
        if not store.exists(log_key(0)):
            raise StoreError(f"{store.name} does not show its run log: is it mounted?")
        self._log.refresh()
        if (opened := self._log.newest_opened()) and opened.term > self._term:
            raise Fenced(opened)
        keys = {node: alone_key(self._term, attempt, node) for node, attempt in request.suspects}
        alone = frozenset(node for node, key in keys.items() if key in said)
        ended = frozenset(node for node in alone if store.get(keys[node]) == ALONE_ENDED)
        return ev.FoundAlone(time.monotonic(), request, alone, ended)

    def _roll_forward(self) -> bool:
        self._log.refresh()
        whole = complete_newest(self._log.store, self._log.lineage)
        for manifest in whole:
            self._append_commit(manifest, manifest.sha256())
        return bool(whole)

    def _attempt(self, request: ev.LogAttempt) -> ev.Logged | ev.AttemptVoid:
        """Asked twice, it is logged once: an earlier answer may have been lost after the record was written."""
        self._log.refresh()
        try:
            record = self._logged_attempt(request.attempt) or self._append_attempt(request)
        except ValueError as error:
            found = self._logged_attempt(request.attempt)
            if found is None:
                return ev.AttemptVoid(time.monotonic(), request.attempt, str(error))
            record = found
        return ev.Logged(time.monotonic(), attempt_record(record, self._log))

    def _logged_attempt(self, number: int) -> Attempt | None:
        newest = self._log.newest_attempt()
        return newest if newest and (newest.attempt, newest.term) == (number, self._term) else None

    def _append_attempt(self, request: ev.LogAttempt) -> Attempt:
        resume = request.resume
        fault_point("coordinator.attempt.before", attempt=request.attempt)
        appended = self._log.append(
            Attempt(
                term=self._term,
                attempt=request.attempt,
                nodes=request.gang,
                world_size=request.world_size,
                resume_step=resume.step if resume else -1,
                resume_directory=resume.directory if resume else "",
                nonce=secrets.token_hex(8),
                unconfirmed=request.unconfirmed,
                standing=request.standing,
                skips=request.skips,
                overrides=request.overrides,
                at=utc_now(),
            )
        )
        fault_point("coordinator.attempt.after", attempt=request.attempt)
        return appended

    def _quarantine(self, request: ev.LogQuarantine) -> ev.QuarantineRecord:
        """One that is gone meanwhile needs none."""
        self._log.refresh()
        lineage = self._log.lineage
        if lineage.commit_of(request.directory) and request.directory not in lineage.quarantined:
            self._log.append(Quarantine(term=self._term, directory=request.directory, why=request.why, at=utc_now()))
        return ev.QuarantineRecord(request.directory)

    def _rewind(self, request: ev.LogRewind) -> ev.Logged | ev.RewindVoid:
        """Asked twice, it is logged once."""
        self._roll_forward()
        try:
            record = self._logged_rewind(request) or self._append_rewind(request)
        except ValueError as error:
            found = self._logged_rewind(request)
            if found is None:
                return ev.RewindVoid(time.monotonic(), request, str(error))
            record = found
        return ev.Logged(time.monotonic(), self._rewound(record))

    def _append_rewind(self, request: ev.LogRewind) -> Rewind:
        """Raises ValueError where it leads nowhere, or somebody retires or quarantines its checkpoint at this moment."""
        if why := why_no_rewind(self._log.lineage, request):
            raise ValueError(why)
        fault_point("coordinator.rewind.before", step=request.to)
        record = self._log.append(rewind_record(self._log.lineage, request, self._term))
        fault_point("coordinator.rewind.after", step=request.to)
        return record

    def _logged_rewind(self, request: ev.LogRewind) -> Rewind | None:
        known = self._log.lineage.rewound
        asked = (self._term, request.skips, request.overrides, request.bad_step, request.why)
        return known if known and asked == (known.term, known.skips, known.overrides, known.bad_step, known.why) else None

    def _rewound(self, record: Rewind) -> ev.RewindRecord:
        commit = self._log.lineage.commit_of(record.directory)
        assert commit or not record.directory, "nobody retires what a run was rewound to"
        resume = _checkpoint(commit) if commit else None
        return ev.RewindRecord(resume=resume, skips=record.skips, overrides=record.overrides, bad_step=record.bad_step, why=record.why)

    def _end(self, request: ev.LogEnd) -> ev.EndRecord:
        if self._log.lineage.outcome is None:
            self._log.append(_outcome(request, self._term))
        return ev.EndRecord(outcome=request.outcome, step=request.step, why=request.why, requeue=request.requeue)


def _outcome(request: ev.LogEnd, term: int) -> Finished | Failed:
    if request.outcome == "failed":
        return Failed(term=term, why=request.why, requeue=request.requeue, at=utc_now())
    return Finished(term=term, step=request.step, outcome=request.outcome, why=request.why, at=utc_now())


def newest_checkpoint(log: RunLog) -> ev.Checkpoint | None:
    """The one place that chooses a checkpoint."""
    commit = log.lineage.newest_committed()
    return _checkpoint(commit) if commit else None


def _checkpoint(commit: Commit) -> ev.Checkpoint:
    return ev.Checkpoint(step=commit.step, directory=commit.directory, manifest_sha256=commit.manifest_sha256)


def why_no_rewind(lineage: Lineage, request: ev.LogRewind) -> str:
    """Why there is nothing to go back to; "" if there is, be it the beginning: people must say so, for a bad step nothing may be lost."""
    to_beginning = request.to <= 0 if request.bad_step < 0 else not lineage.ever_committed
    if to_beginning or lineage.newest_until(request.to):
        return ""
    usable = ", ".join(str(commit.step) for commit in lineage.commits if lineage.is_usable(commit)) or "none"
    return f"there is no usable checkpoint at or before step {request.to} in the history; there are: {usable}; step 0 is the beginning"


def rewind_record(lineage: Lineage, request: ev.LogRewind, term: int) -> Rewind:
    """Where there is something to go back to."""
    target = lineage.newest_until(request.to)
    return Rewind(
        term=term,
        directory=target.directory if target else "",
        step=target.step if target else -1,
        skips=request.skips,
        overrides=request.overrides,
        bad_step=request.bad_step,
        why=request.why,
        at=utc_now(),
    )


def attempt_record(record: Attempt, log: RunLog) -> ev.AttemptRecord:
    commit = log.lineage.resumed  # it may have been retired since
    resume = None if commit is None else _checkpoint(commit)
    return ev.AttemptRecord(
        attempt=record.attempt,
        gang=record.nodes,
        world_size=record.world_size,
        nonce=record.nonce,
        resume=resume,
        unconfirmed=record.unconfirmed,
        standing=record.standing,
        skips=record.skips,
        overrides=record.overrides,
    )


def opened_event(log: RunLog) -> ev.Opened:
    """What a new coordinator must know of the run so far; the log's newest record of that kind must be its own `opened`."""
    newest = log.newest_attempt()
    last = attempt_record(newest, log) if newest else None
    lineage, at = log.lineage, time.monotonic()
    attempts_below = 0 if log.is_whole else log.count  # each attempt took a record
    if last is None:
        return ev.Opened(at=at, term=lineage.term, attempts_below=attempts_below)
    return ev.Opened(
        at=at,
        term=lineage.term,
        last_attempt=last.attempt,
        last_gang=last.gang,
        last_world_size=last.world_size,
        last_nonce=last.nonce,
        last_resume=last.resume,
        last_unconfirmed=last.unconfirmed,
        last_standing=last.standing,
        newest_commit=newest_checkpoint(log),
        ever_committed=lineage.ever_committed,
        attempts_below=attempts_below,
        ended=lineage.is_ended,
        rewound=lineage.rewound is not None,
        forgiven=lineage.rewound is not None and lineage.rewound.bad_step < 0,
        skips=lineage.skips,
        overrides=lineage.overrides,
        rewinds=lineage.num_bad_steps,
    )
