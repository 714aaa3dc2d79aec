"""Several coordinators on one root: one history, the losers leave with a reason, and the run ends with the bits of an undisturbed one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.live import NO_HANG, LiveRun, Outcome, command_of, gates, poll_until
from e2e.parts import Part, PartedRun
from keepstep.storage.records import Opened
from keepstep.storage.runlog import RunLog

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

EXIT_REQUEUE = 75
Start = Callable[..., LiveRun]


@pytest.fixture
def run(config_file: Path, tmp_path: Path, short_folder: Path) -> Iterator[PartedRun]:
    run = PartedRun(config_file, str(tmp_path / "root"), (NO_HANG,), scratch=short_folder)
    yield run
    run.end()


def lost(part: Part) -> bool:
    return part.process.poll() == EXIT_REQUEUE


def assert_one_history(run: LiveRun, coordinators: int) -> None:
    """Terms only grow, no record of a fenced term counts, and every coordinator opened a term of its own at most once."""
    log = RunLog.read_all(run.store)
    assert log.alarms == []
    terms = [record.term for record in log.records]
    assert terms == sorted(terms), "somebody wrote after a newer term was opened"
    opened = [record for record in log.records if isinstance(record, Opened)]
    assert len({record.pid for record in opened}) == len(opened) <= coordinators


def test_three_coordinators_at_once_and_a_fourth_later(run: PartedRun, undisturbed: Outcome, tmp_path: Path) -> None:
    run.prepare()
    rivals = [run.coordinator(f"coordinator{number}") for number in range(3)]
    for name in ("node0", "node1"):
        run.agent(name, {"KEEPSTEP_FAULTS": f"rank.step:rank=1:step=8:signal=STOP:once={tmp_path / 'stopped'}"})
    poll_until(lambda: sum(map(lost, rivals)) == 2, "two of three have left")
    (winner,) = (part for part in rivals if not lost(part))
    poll_until(lambda: bool(run.stopped()), "a rank stands still, so that the run waits for the fourth")
    last = run.coordinator("coordinator3")
    assert winner.wait() == EXIT_REQUEUE, run.said()
    run.open_gate()
    assert last.wait() == 0, run.said()
    for loser in rivals:
        assert any(line.startswith("keepstep: ") and "was opened by" in line for line in loser.output), loser.output
    run.check_what_always_holds()
    assert_one_history(run, coordinators=4)
    assert run.outcome() == undisturbed
    assert (run.result()["attempts"], run.result()["lost_steps"]) == (1, 0), "the ranks trained on"


# Slow steps leave time for five coordinators; at step 18 all ranks wait until the last of them is there.
SLOW = "rank.step:rank=0:action=pause:seconds=0.3"


def rank_pids(status: dict[str, Any]) -> list[int]:
    """By rank."""
    return [
        rank["pid"] for rank in sorted((rank for node in status["nodes"] for rank in node["ranks"]), key=lambda rank: int(rank["rank"]))
    ]


def test_five_coordinators_are_killed_in_one_run_and_nobody_waits_for_the_sixth(start: Start, undisturbed: Outcome, tmp_path: Path) -> None:
    """In mid-step, in the middle of a commit, twice at once (the second while it starts), and in the middle of a restart decision."""
    markers = [tmp_path / "commit", tmp_path / "attempt"]
    points = f"coordinator.commit.before:once={markers[0]};coordinator.attempt.after:attempt=2:once={markers[1]}"
    run = start(NO_HANG, faults=f"{SLOW};{points};{gates(tmp_path, 18)}")
    before = run.wait_for_step(2)
    run.kill(before["coordinator"]["pid"])
    second = run.wait_until(lambda status: status["coordinator"]["term"] == 2 and status["phase"] == "TRAINING")
    assert second["step"] > before["step"], "the ranks stepped on without a coordinator"
    third = run.wait_until(lambda status: status["coordinator"]["term"] == 3 and status["phase"] == "TRAINING")
    assert markers[0].exists(), "the second coordinator died in the middle of a commit"
    run.kill(third["coordinator"]["pid"])
    poll_until(lambda: newborn(run, third) is not None, "the fourth coordinator starts", run.said)
    run.kill(newborn(run, third) or 0)
    fifth = run.wait_until(lambda status: status["coordinator"]["term"] > 3 and status["phase"] == "TRAINING")
    assert rank_pids(before) == rank_pids(second) == rank_pids(third) == rank_pids(fifth)
    run.kill(rank_pids(run.wait_at_gate())[-1])
    assert run.wait() == 0, run.said()
    run.check_what_always_holds()
    assert markers[1].exists(), "the fifth died when it had just logged the new attempt"
    assert run.outcome() == undisturbed
    assert run.result()["attempts"] == 2


def newborn(run: LiveRun, dead: dict[str, Any]) -> int | None:
    """The pid of a coordinator after this one, in whatever state it is."""
    old = dead["coordinator"]["pid"]
    return next((pid for pid in run.marked() if pid != old and "cli coordinator" in command_of(pid)), None)


def test_two_coordinators_of_different_runs_on_an_empty_root(run: PartedRun) -> None:
    """Whoever comes second is told in one sentence, and the root stays the first one's."""
    first = run.coordinator("first")
    poll_until(lambda: bool(run.store.list("log")), "a term is open")
    run.overrides = (NO_HANG, "run.seed=9")
    second = run.coordinator("second")
    assert second.wait() == 2
    assert "holds another run" in "\n".join(second.output)
    assert first.process.poll() is None
