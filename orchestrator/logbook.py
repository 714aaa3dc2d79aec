"""The machine's requests as records of the run log, and the log's history as the machine's first event. One thread calls this.

A request that comes twice finds its record in the log and is answered with it; only what storage raised is not an answer.
"""

from __future__ import annotations

import secrets
import time
from typing import assert_never

from keepstep.storage.faults import fault_point
from keepstep.storage.manifest import Manifest
from keepstep.storage.records import Attempt, Commit, Failed, Finished, Quarantine
from keepstep.storage.runlog import RunLog

from . import events as ev
from .archive import utc_now
from .commits import InvalidCheckpoint, complete_newest


class Logbook:
    """Raises StoreError when storage is in the way, Fenced when a newer coordinator reigns."""

    def __init__(self, log: RunLog, term: int) -> None:
        self._log = log
        self._term = term

    def carry_out(self, request: ev.FindCheckpoint | ev.LogAttempt | ev.LogQuarantine | ev.LogEnd) -> ev.Event:
        match request:
            case ev.FindCheckpoint():
                return self._find()
            case ev.LogAttempt():
                return self._attempt(request)
            case ev.LogQuarantine():
                return ev.Logged(time.monotonic(), self._quarantine(request))
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
        self._log.refresh()
        if whole := complete_newest(self._log.store, self._log.lineage):
            self._append_commit(whole, whole.sha256())
        return ev.Found(
            time.monotonic(), newest_checkpoint(self._log), rolled_forward=whole is not None, quarantined=self._log.lineage.quarantined
        )

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
    return ev.Checkpoint(step=commit.step, directory=commit.directory, manifest_sha256=commit.manifest_sha256) if commit else None


def attempt_record(record: Attempt, log: RunLog) -> ev.AttemptRecord:
    commit = log.lineage.resumed  # it may have been retired since
    resume = None if commit is None else ev.Checkpoint(step=commit.step, directory=commit.directory, manifest_sha256=commit.manifest_sha256)
    return ev.AttemptRecord(
        attempt=record.attempt,
        gang=record.nodes,
        world_size=record.world_size,
        nonce=record.nonce,
        resume=resume,
        unconfirmed=record.unconfirmed,
        standing=record.standing,
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
        ended=lineage.outcome is not None,
    )
