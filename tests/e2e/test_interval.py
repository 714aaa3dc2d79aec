"""The interval between saves chooses itself: no bit depends on it, and a run that keeps crashing moves on all the same."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from e2e.live import NO_HANG, LiveRun, Outcome, gates, poll_until
from e2e.test_kills import Start, ends_like, last_rank
from keepstep.storage.records import Attempt, Commit
from keepstep.storage.runlog import RunLog

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def has_committed(run: LiveRun, attempt: int) -> bool:
    return any(isinstance(record, Commit) and record.attempt == attempt for record in RunLog.read_all(run.store).records)


def test_every_attempt_of_a_crash_loop_leaves_a_checkpoint_behind(start: Start, undisturbed: Outcome, tmp_path: Path) -> None:
    """Killed three times within a few steps. The undisturbed run saved every six steps: that changes nothing."""
    run = start(NO_HANG, "checkpoint.interval=auto", "cluster.strikes=9", faults=gates(tmp_path, 8, 9, 10))
    for attempt in (1, 2, 3):
        status = run.wait_at_gate()
        poll_until(partial(has_committed, run, attempt), "it has committed", run.said)
        run.kill(last_rank(status)["pid"])
        poll_until(lambda: run.stopped() == [], "the group of a killed rank is killed whole", run.said)
    ends_like(run, undisturbed)
    begun = [record for record in RunLog.read_all(run.store).records if isinstance(record, Attempt)]
    assert [record.attempt for record in begun] == [1, 2, 3, 4]
    steps = [record.resume_step for record in begun]
    assert steps == sorted(set(steps)), "each attempt went on from a later step"
