"""A training that gets no better ends by itself, at the same step whatever was killed, and its best checkpoint stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2e.live import NO_HANG, LiveRun, gates, keepstep, poll_until
from keepstep.storage.runlog import RunLog

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]
# The loss falls in every evaluation, but soon by less than that.
PATIENT = (NO_HANG, "evaluate.interval=2", "evaluate.patience=3", "evaluate.min_delta=1.0", "checkpoint.interval=5", "checkpoint.keep=1")
NAMES = ("step", "why", "outcome", "best_step", "stopped_early", "held_out_nats", "accuracy", "bits_per_byte")


def ended(run: LiveRun) -> dict[str, Any]:
    assert run.wait() == 0, run.said()
    run.check_what_always_holds()
    return {name: run.result()[name] for name in NAMES}


def best_step(run: LiveRun) -> int:
    best = RunLog.open(run.store).lineage.best()
    assert best
    return best.step


def test_a_run_that_is_killed_stops_early_where_an_undisturbed_one_does(start: Start, tmp_path: Path) -> None:
    undisturbed = start(*PATIENT)
    expected = ended(undisturbed)
    best, last = expected["best_step"], expected["step"]
    assert expected["outcome"] == "succeeded"
    assert 0 < best < best + 6 == last < 24, "three evaluations, every two steps"
    assert f"none of the last 3 evaluations was better than that of step {best}" in expected["stopped_early"]
    assert best_step(undisturbed) == best

    broken = start(*PATIENT, faults=gates(tmp_path, best + 3))
    broken.kill(broken.wait_at_gate()["nodes"][-1]["ranks"][-1]["pid"])
    poll_until(lambda: broken.stopped() == [], "the group of a killed rank is killed whole", broken.said)
    assert ended(broken) == expected
    assert broken.outcome() == undisturbed.outcome()
    assert broken.result()["attempts"] == 2
    assert best_step(broken) == best

    shown = keepstep("evaluate", broken.root, "--step", "best", "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["step"] == best
    again = start(*PATIENT, root=broken.root)
    assert ended(again) == expected, "there is nothing left to train"
