"""A root rots while nobody runs on it: the same command goes on from the newest checkpoint that is whole, and says what it found."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.live import LiveRun, Outcome, no_process_left
from keepstep.storage.layout import MANIFEST_NAME
from keepstep.storage.records import Attempt
from keepstep.storage.runlog import RunLog

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]


def flip_a_bit(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 0x04
    path.write_bytes(bytes(body))


def record_of_the_attempt(log: RunLog) -> int:
    return next(entry.sequence for entry in log.entries if isinstance(entry.record, Attempt))


def test_a_rotten_manifest_and_a_rotten_record_of_the_log(start: Start, undisturbed: Outcome, tmp_path: Path) -> None:
    root = tmp_path / "root"
    first = start(root=str(root))
    first.wait_until(lambda status: status["last_commit"] is not None and status["last_commit"]["step"] >= 12)
    first.kill_everything()
    log = RunLog.read_all(first.store)
    newest = log.lineage.newest_committed()
    assert newest
    flip_a_bit(root / newest.directory / MANIFEST_NAME)
    rotten = record_of_the_attempt(log)
    flip_a_bit(root / f"log/{rotten:010d}.json")
    command = [sys.executable, "-m", "keepstep.orchestrator.cli", "checkpoints", "verify", str(root)]
    damaged = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (damaged.returncode, MANIFEST_NAME in damaged.stdout) == (3, True), damaged

    again = start(root=str(root))
    assert again.wait() == 0, "\n".join(again.output) + again.logs()
    assert no_process_left(again)
    assert again.outcome().state_sha256 == undisturbed.state_sha256
    said = [event["why"] for event in again.events()]
    assert any(newest.directory in why and MANIFEST_NAME in why for why in said), "the damaged checkpoint is named"
    assert any(f"record {rotten}" in why for why in said), "so is the record"
