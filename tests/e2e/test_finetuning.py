"""A run that begins with what another one learnt keeps the promise: whatever is killed, the last bits are those of an undisturbed one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.live import NO_HANG, LiveRun, gates, poll_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]


def test_an_adaptation_that_is_killed_before_and_after_its_first_commit_ends_with_the_same_bits(
    start: Start, undisturbed_run: LiveRun, tmp_path: Path
) -> None:
    overrides = (NO_HANG, "run.steps=12", f"train.start={undisturbed_run.root}", "train.lora.rank=2", 'train.freeze=["*.out.lora_a"]')
    whole = start(*overrides)
    assert whole.wait() == 0, whole.said()
    killed = start(*overrides, faults=gates(tmp_path, 3, 8))
    for _ in range(2):
        killed.kill(killed.wait_at_gate()["nodes"][0]["ranks"][-1]["pid"])
        poll_until(lambda: killed.stopped() == [], "the group of a killed rank is killed whole", killed.said)
    assert killed.wait() == 0, killed.said()
    killed.check_what_always_holds()
    assert killed.outcome() == whole.outcome()
    assert [failure["kind"] for failure in killed.result()["failures"]] == ["signal", "signal"]
    began = [json.loads(Path(run.root, "start.json").read_text()) for run in (whole, killed)]
    assert began[0] == began[1]
    assert began[0]["step"] == 24
