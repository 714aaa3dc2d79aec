"""The promise: whatever is killed, whenever, the run ends with the bits of an undisturbed one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2e.live import STEPS, LiveRun, Outcome

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]


def ends_like(run: LiveRun, undisturbed: Outcome) -> None:
    code = run.wait()
    assert code == 0, "\n".join(run.output[-60:]) + run.logs()
    run.check_what_always_holds()
    assert run.outcome() == undisturbed
    assert len(undisturbed.losses) == STEPS


def last_rank(status: dict[str, Any]) -> dict[str, Any]:
    rank: dict[str, Any] = status["nodes"][-1]["ranks"][-1]
    return rank


def test_a_killed_rank_is_named_and_costs_no_bit(start: Start, undisturbed: Outcome) -> None:
    run = start()
    status = run.wait_for_step(8)
    victim = last_rank(status)
    run.kill(victim["pid"])
    ends_like(run, undisturbed)
    (failure,) = run.result()["failures"]
    assert (failure["rank"], failure["attempt"]) == (victim["rank"], 1)
    assert "SIGKILL" in failure["why"]


def test_a_killed_agent_takes_its_ranks_along_and_costs_no_bit(start: Start, undisturbed: Outcome) -> None:
    run = start()
    status = run.wait_for_step(8)
    node = status["nodes"][0]
    run.kill(node["pid"])
    ends_like(run, undisturbed)
    assert [failure["node"] for failure in run.result()["failures"]] == [node["id"]]


def test_a_killed_node_comes_back_under_a_new_incarnation(start: Start, undisturbed: Outcome) -> None:
    run = start()
    status = run.wait_for_step(8)
    node = status["nodes"][1]
    run.kill(node["pid"], *(rank["pid"] for rank in node["ranks"]))
    ends_like(run, undisturbed)
    assert [failure["node"] for failure in run.result()["failures"]] == [node["id"]]


def test_a_killed_coordinator_is_succeeded_while_the_ranks_train_on(start: Start, undisturbed: Outcome) -> None:
    run = start()
    status = run.wait_for_step(8)
    run.kill(status["coordinator"]["pid"])
    ends_like(run, undisturbed)
    result = run.result()
    assert (result["attempts"], result["failures"], result["lost_steps"]) == (1, [], 0)


def test_the_same_command_continues_after_everything_was_killed(start: Start, undisturbed: Outcome, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    first = start(root=root)
    first.wait_for_step(8)
    first.kill_everything()
    first.check_what_always_holds()
    second = start(root=root)
    ends_like(second, undisturbed)


def test_two_kills_in_a_row(start: Start, undisturbed: Outcome) -> None:
    run = start()
    run.kill(last_rank(run.wait_for_step(7))["pid"])
    run.kill(last_rank(run.wait_for_step(7, attempt=2))["pid"])
    ends_like(run, undisturbed)
    assert run.result()["attempts"] == 3


def test_a_killed_platform_takes_everything_along_and_the_same_command_continues(
    start: Start, undisturbed: Outcome, tmp_path: Path
) -> None:
    root = str(tmp_path / "root")
    first = start(root=root)
    first.wait_for_step(8)
    assert first.process
    first.kill(first.process.pid)
    first.check_what_always_holds()
    ends_like(start(root=root), undisturbed)


# Each run meets its faults one after the other; every one of them kills the process that passes the point.
POINTS = {
    "copying": ("rank.stage.before:rank=1", "rank.stage.after:rank=2"),
    "writing the shards": (
        "persister.shards.before:rank=1",
        "persister.shards.middle:rank=2",
        "persister.shards.after:rank=3",
    ),
    "writing the rank index and the manifest": (
        "persister.index.after:rank=0",
        "coordinator.manifest.before",
        "coordinator.manifest.after",
    ),
    "appending the commit record": ("coordinator.commit.before", "coordinator.commit.after", f"coordinator.commit.after:step={STEPS}"),
}


@pytest.mark.parametrize("points", POINTS.values(), ids=[name.replace(" ", "-") for name in POINTS])
def test_kills_while_saving_cost_no_bit(start: Start, undisturbed: Outcome, tmp_path: Path, points: tuple[str, ...]) -> None:
    markers = [tmp_path / f"fired-{i}" for i in range(len(points))]
    run = start(faults=";".join(f"{point}:once={marker}" for point, marker in zip(points, markers, strict=True)))
    ends_like(run, undisturbed)
    assert [point for point, marker in zip(points, markers, strict=True) if not marker.exists()] == [], "these faults were never reached"
