"""People send a run back: a live one, and one that has succeeded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2e.live import NO_HANG, STEPS, LiveRun, gates, keepstep
from keepstep.storage.records import Attempt, Rewind
from keepstep.storage.runlog import RunLog
from keepstep.storage.steps import read_steps

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]
SKIP = "200:216"  # step 12 has consumed the samples before position 192


def rewind(run: LiveRun, *arguments: str) -> str:
    done = keepstep("rewind", run.root, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rates(run: LiveRun) -> dict[int, float]:
    """Step -> learning rate, as the history has it."""
    history = RunLog.open(run.store).lineage.history(read_steps(run.store))
    return {step.step: step.record["lr"] for step in history}


def checkpoints(run: LiveRun) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(keepstep("checkpoints", "list", run.root, "--json").stdout)
    return rows


def wait_for_commit(run: LiveRun, step: int) -> None:
    run.wait_at_gate()
    run.wait_until(lambda status: (status["last_commit"] or {}).get("step") == step)


def test_a_live_run_and_then_the_same_when_it_has_ended(start: Start, tmp_path: Path) -> None:
    """Live: back to step 12 and on without some samples, to the bits of a run that never had them. Ended: back to step 18, with another
    learning rate from there on; run.toml stays as it is."""
    reference = start(f'data.skip=["{SKIP}"]')
    run = start(NO_HANG, faults=gates(tmp_path, 10, 14))
    wait_for_commit(run, 6)  # while one is written, step 12 would not be saved
    run.open_gate()
    wait_for_commit(run, 12)
    told = rewind(run, "--to", "13", "--skip", SKIP)
    assert told.startswith("going back to step 12 (data/a000001/s000000012")
    assert run.wait() == 0, run.said()
    assert reference.wait() == 0, reference.said()
    run.check_what_always_holds()
    assert run.outcome() == reference.outcome()
    assert [event["kind"] for event in run.events() if event["kind"] in ("failure", "moved", "rewound")] == ["moved", "rewound"]
    before = rates(run)

    told = rewind(run, "--to", "20", "-o", "optimizer.lr=0.0005")
    assert told.startswith("rewound to step 18 (data/a000002/s000000018")
    assert f"leaving out the samples at {SKIP}, with optimizer.lr=0.0005" in told
    status = json.loads(keepstep("status", run.root, "--json").stdout)
    assert (status["step"], status["skips"], status["overrides"]) == (18, [SKIP], ["optimizer.lr=0.0005"])
    assert "`keepstep run` goes on" in status["why"]
    again = start(NO_HANG, root=run.root)
    assert again.wait() == 0, again.said()
    again.check_what_always_holds()
    after = rates(again)
    assert {step: after[step] for step in range(1, 19)} == {step: before[step] for step in range(1, 19)}
    assert all(after[step] == pytest.approx(before[step] * 0.0005 / 0.003) for step in range(19, STEPS + 1))
    records = RunLog.read_all(again.store).records
    assert [(record.step, record.skips) for record in records if isinstance(record, Rewind)] == [(12, (SKIP,)), (18, (SKIP,))]
    attempts = [(record.resume_step, record.skips, record.overrides) for record in records if isinstance(record, Attempt)]
    assert attempts == [(-1, (), ()), (12, (SKIP,), ()), (18, (SKIP,), ("optimizer.lr=0.0005",))]

    # The old history is open to inspection: its last checkpoint and its steps.
    (old,) = [row for row in checkpoints(again) if row["tip"]]
    assert (old["step"], old["attempt"], old["state"], old["pinned"]) == (STEPS, 2, "abandoned", True)
    assert [record["step"] for record in read_steps(again.store)[2]] == list(range(13, STEPS + 1))
    verified = json.loads(keepstep("checkpoints", "verify", again.root, "--json").stdout)
    assert old["directory"] in [row["directory"] for row in verified if row["verdict"] == "every byte is right"]


def test_coordinators_that_die_around_the_record_lose_no_rewind_and_make_none_twice(start: Start, tmp_path: Path) -> None:
    """One dies before the record of a bad step, its successor right after it, the next one before the record of the attempt."""
    deaths = ("coordinator.rewind.before", "coordinator.rewind.after", "coordinator.attempt.before:attempt=2")
    kills = (f"{point}:once={tmp_path / f'death-{i}'}" for i, point in enumerate(deaths))
    run = start("run.steps=10", faults=";".join(("trainer.sample:position=120", *kills)))
    assert run.wait() == 0, run.said()
    run.check_what_always_holds()
    assert all((tmp_path / f"death-{i}").exists() for i in range(len(deaths)))
    records = RunLog.read_all(run.store).records
    assert [(record.step, record.skips, record.term) for record in records if isinstance(record, Rewind)] == [(6, ("120:121",), 2)]
    assert [(record.resume_step, record.skips) for record in records if isinstance(record, Attempt)] == [(-1, ()), (6, ("120:121",))]
    assert {event["cause"] for event in run.events() if event["kind"] == "failure"} <= {"bad-step"}
