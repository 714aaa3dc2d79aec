"""What goes on beside the training of a real run: reading back, retiring, people who pin and clear away."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.live import LiveRun, poll_until
from keepstep.orchestrator import checkpoints
from keepstep.storage.lineage import Lineage
from keepstep.storage.runlog import RunLog

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]


def lineage_of(run: LiveRun) -> Lineage:
    return RunLog.open(run.store).lineage


def spoil_newest_verified(run: LiveRun) -> str:
    """Its directory."""
    lineage = lineage_of(run)
    directory = [commit.directory for commit in lineage.commits if commit.directory in lineage.verified][-1]
    shard = Path(run.root) / directory / "__1_0.distcp"
    body = bytearray(shard.read_bytes())
    body[len(body) // 2] ^= 0x10
    shard.write_bytes(bytes(body))
    return directory


def test_damage_in_a_live_run_is_found_and_quarantined_while_people_pin_and_clear_away(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start("run.steps=60", "checkpoint.scrub_period_s=0.2", "checkpoint.keep=3")
    poll_until(lambda: len(lineage_of(run).verified) == 2, "two checkpoints are verified")
    pinned = lineage_of(run).commits[0]
    checkpoints.pin(run.root, step=pinned.step, pinned=True)
    damaged = spoil_newest_verified(run)
    poll_until(lambda: damaged in lineage_of(run).quarantined, "the damage is found")
    assert checkpoints.collect_garbage(run.root, dry_run=False, as_json=False) == 0
    assert run.wait() == 0, "\n".join(run.output) + run.logs()
    run.check_what_always_holds()
    (told,) = [event["why"] for event in run.events() if event["kind"] == "quarantined"]
    assert told.startswith(f"{damaged} is damaged: __1_0.distcp: block 0")

    live = lineage_of(run).live
    assert pinned in live
    capsys.readouterr()
    checkpoints.verify(run.root, step=-1, quarantine=False, as_json=True)
    right = {row["directory"] for row in json.loads(capsys.readouterr().out) if row["verdict"] == checkpoints.RIGHT}
    assert right == {commit.directory for commit in live} - {damaged}
    checkpoints.collect_garbage(run.root, dry_run=False, as_json=True)
    gone = {row["directory"] for row in json.loads(capsys.readouterr().out)["goes"]}
    stored = {path.relative_to(run.root).as_posix() for path in Path(run.root).glob("data/*/s*")}
    assert stored == {commit.directory for commit in lineage_of(run).live}
    assert len(stored - {pinned.directory, damaged}) == 3, gone
