"""A hot standby: the next attempt begins in ranks that were there before the failure, with the bits of an undisturbed run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2e.live import NO_HANG, STEPS, LiveRun, Outcome, gates, poll_until
from keepstep.orchestrator.processes import is_alive

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]
Status = dict[str, Any]


def with_standby(run: LiveRun) -> Status:
    """The status at the next gate, once a standby waits on both nodes."""
    run.wait_at_gate()
    return run.wait_until(lambda status: [node["standby"].get("state") for node in status["nodes"]] == ["ready", "ready"])


def pids_of(status: Status) -> list[int]:
    return sorted(rank["pid"] for node in status["nodes"] for rank in node["ranks"])


def waiting(status: Status) -> list[int]:
    return sorted(pid for node in status["nodes"] for pid in node["standby"]["pids"])


def test_attempts_begin_in_ranks_that_wait(start: Start, undisturbed: Outcome, tmp_path: Path) -> None:
    """Twice in a standby, once without since a rank of it was killed; then an agent dies with all that it had started."""
    run = start(NO_HANG, "cluster.hot_standby=true", faults=gates(tmp_path, 8, 9, 14, 16))
    standby: list[int] = []
    for _ in range(2):
        before = with_standby(run)
        if standby:
            assert pids_of(before) == standby, "the ranks of this attempt had waited when the last one failed"
        standby = waiting(before)
        assert not set(standby) & set(pids_of(before))
        run.kill(pids_of(before)[-1])
        poll_until(lambda: run.stopped() == [], "the attempt is over", run.said)

    before = with_standby(run)
    assert pids_of(before) == standby
    standby = waiting(before)
    run.kill(standby[1])
    poll_until(lambda: not any(map(is_alive, standby)), "a standby that lost a rank is ended whole", run.said)
    assert all(map(is_alive, pids_of(before))), "the ranks that train do not notice"
    run.kill(pids_of(before)[0])
    poll_until(lambda: run.stopped() == [], "the attempt is over", run.said)

    before = with_standby(run)
    assert not set(standby) & set(pids_of(before))
    run.kill(before["nodes"][0]["pid"])
    poll_until(lambda: not any(map(is_alive, [*pids_of(before), *waiting(before)])), "both groups are ended on both nodes", run.said)

    assert run.wait() == 0, run.said()
    run.check_what_always_holds()
    assert run.outcome() == undisturbed
    assert len(undisturbed.losses) == STEPS
    kinds = [event["kind"] for event in run.events() if event["kind"].startswith("standby")]
    assert kinds.count("standby-lost") == 2
    hot = [event["why"] for event in run.events() if event["kind"] == "starting" and "in standby" in event["why"]]
    assert len(hot) == 2
