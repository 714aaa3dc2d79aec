"""The disk under a run's root fills up: training goes on, the run says so, and the next save works when there is room again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from smalldisk import small_disk

from e2e.live import STEPS, LiveRun, Outcome

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]


def test_a_disk_that_is_full_for_a_while_costs_no_bit(start: Start, undisturbed: Outcome, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", megabytes=32) as disk:
        run = start(root=str(disk.path / "root"))
        run.wait_until(lambda status: status["last_commit"] is not None)
        disk.fill()
        status = run.wait_until(lambda status: status["degraded"] is not None and status["step"] == STEPS)
        assert "o space left" in status["degraded"]["why"]
        assert status["attempt"] == 1, "training went on"
        disk.free()
        assert run.wait() == 0, "\n".join(run.output[-60:]) + run.logs()
        run.check_what_always_holds()
        assert run.outcome().state_sha256 == undisturbed.state_sha256
        assert run.result()["attempts"] == 1
