"""The promise: whatever is killed, whenever, the run ends with the bits of an undisturbed one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2e.live import NO_HANG, STEPS, LiveRun, Outcome, gates, keepstep, poll_until
from keepstep.storage.runlog import RunLog

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


def test_ranks_an_agent_a_node_and_the_coordinator_are_killed_in_one_run(start: Start, undisturbed: Outcome, tmp_path: Path) -> None:
    """Each has a record of its own: two ranks without a commit between them, an agent, a whole node; the coordinator has none."""
    run = start(NO_HANG, faults=gates(tmp_path, 8, 9, 13, 14, 20))
    ranks = []
    for _ in range(2):
        ranks.append(last_rank(run.wait_at_gate()))
        run.kill(ranks[-1]["pid"])
        poll_until(lambda: run.stopped() == [], "the group of a killed rank is killed whole", run.said)
    agent = run.wait_at_gate()["nodes"][0]
    run.kill(agent["pid"])
    poll_until(lambda: run.stopped() == [], "ranks die with their agent", run.said)
    node = run.wait_at_gate()["nodes"][1]
    run.kill(node["pid"], *(rank["pid"] for rank in node["ranks"]))
    poll_until(lambda: run.stopped() == [], "the ranks of the other node are stopped", run.said)
    run.kill(run.wait_at_gate()["coordinator"]["pid"])
    run.open_gate()
    ends_like(run, undisturbed)
    *of_ranks, of_agent, of_node = run.result()["failures"]
    assert [(failure["rank"], failure["attempt"]) for failure in of_ranks] == [(ranks[0]["rank"], 1), (ranks[1]["rank"], 2)]
    assert all("SIGKILL" in failure["why"] for failure in of_ranks)
    assert (of_agent["node"], of_node["node"]) == (agent["id"], node["id"])
    result = run.result()
    assert result["attempts"] == 5, "the ranks trained on without a coordinator"
    assert sum(result["seconds"].values()) == pytest.approx(result["wall_s"], rel=0.001)
    assert all(result["seconds"][name] > 0 for name in ("productive", "redone", "stop", "start", "restore", "finish"))
    assert (result["recovery"]["attempt"], result["seconds"]["away"]) == (5, 0)
    spans = [span["name"] for span in result["recovery"]["spans"]]
    assert spans == ["detect", "stop", "wait", "choose", "fence", "launch", "join", "build", "restore", "step"]


def test_the_same_command_continues_after_a_stop_and_after_everything_was_killed(
    start: Start, undisturbed: Outcome, tmp_path: Path
) -> None:
    """First a person stops it, then its platform is killed, then every process at once."""
    root, faults = str(tmp_path / "root"), gates(tmp_path, 4, 11, 16)
    first = start(NO_HANG, root=root, faults=faults)
    first.wait_at_gate()
    assert keepstep("stop", root).returncode == 0
    first.open_gate()
    assert first.wait() == 75, first.said()
    stopped = first.result()
    assert (stopped["outcome"], stopped["lost_steps"]) == ("stopped", 0)
    second = start(NO_HANG, root=root, faults=faults)
    second.wait_at_gate()
    attempt = RunLog.open(second.store).newest_attempt()
    assert attempt
    assert 4 <= attempt.resume_step == stopped["step"] < 11, "nothing is computed again after a stop"
    assert second.process
    second.kill(second.process.pid)
    second.check_what_always_holds()
    third = start(NO_HANG, root=root, faults=faults)
    third.wait_at_gate()
    third.kill_everything()
    third.check_what_always_holds()
    ends_like(start(NO_HANG, root=root, faults=faults), undisturbed)


# Every one of them kills the process that passes the point, once.
POINTS = (
    *("rank.stage.before:rank=1", "rank.stage.after:rank=2"),
    *("persister.shards.before:rank=1", "persister.shards.middle:rank=2", "persister.shards.after:rank=3", "persister.index.after:rank=0"),
    *("coordinator.manifest.before", "coordinator.manifest.after"),
    *("coordinator.commit.before", "coordinator.commit.after", f"coordinator.commit.after:step={STEPS}"),
)


def test_kills_while_saving_cost_no_bit(start: Start, undisturbed: Outcome, tmp_path: Path) -> None:
    """While copying, writing the shards, the rank index and the manifest, and appending the commit record.

    The ranks wait after step 20 until the coordinators have met their faults: ranks that went on would leave them no commit but the last.
    """
    markers = [tmp_path / f"fired-{i}" for i in range(len(POINTS))]
    faults = (f"{point}:once={marker}" for point, marker in zip(POINTS, markers, strict=True))
    run = start(NO_HANG, faults=";".join([*faults, gates(tmp_path, 20)]))
    poll_until(lambda: all(marker.exists() for marker in markers[:-1]), "all faults but that of the last commit are met", run.said)
    run.wait_at_gate()
    run.open_gate()
    ends_like(run, undisturbed)
    assert [point for point, marker in zip(POINTS, markers, strict=True) if not marker.exists()] == [], "these faults were never reached"
