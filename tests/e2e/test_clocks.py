"""The wall clock of one machine is a year off: nothing compares clocks, so nothing changes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.live import NO_HANG, Outcome, gates, poll_until
from e2e.parts import PartedRun
from keepstep.storage.records import Quarantine, Retire
from keepstep.storage.runlog import RunLog

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

LIBRARIES = ("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1", "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1")
KEEP = 2


@pytest.fixture
def library() -> str:
    """libfaketime (Debian: faketime). Skips where it is not installed; fails on CI, where it must be."""
    found = next((path for path in LIBRARIES if Path(path).exists()), "")
    if not found and os.environ.get("CI"):
        pytest.fail("libfaketime is missing: `make install` installs it")
    if not found:
        pytest.skip("libfaketime is missing: apt-get install faketime")
    return found


def clock(library: str, offset: str) -> dict[str, str]:
    """An environment whose wall clock is off. Times of files stay true, as on a file server."""
    return {"LD_PRELOAD": library, "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}


@pytest.fixture
def run(config_file: Path, tmp_path: Path, short_folder: Path) -> Iterator[PartedRun]:
    run = PartedRun(config_file, str(tmp_path / "root"), overrides=(f"checkpoint.keep={KEEP}", NO_HANG), scratch=short_folder).prepare()
    yield run
    run.end()


def test_clocks_that_are_a_year_off(run: PartedRun, undisturbed: Outcome, library: str, tmp_path: Path) -> None:
    """One node is right. The other is a year behind and, after its death, a year ahead; its coordinators the other way round."""
    ahead, behind = clock(library, "+365d"), clock(library, "-365d")
    gate = {"KEEPSTEP_FAULTS": gates(tmp_path, 8, 15)}
    run.coordinator("ahead", ahead)
    run.agent("node0", gate)
    agent = run.agent("node1", behind)
    run.kill(run.wait_at_gate()["nodes"][0]["ranks"][0]["pid"])
    poll_until(lambda: run.stopped() == [], "the gang of a killed rank dies", run.said)
    run.kill(run.wait_at_gate()["coordinator"]["pid"], agent.process.pid)
    agent.wait()
    coordinator = run.coordinator("behind", behind)
    run.agent("node1", ahead)
    assert coordinator.wait() == 0, run.said()
    run.check_what_always_holds()
    assert run.outcome() == undisturbed
    log = RunLog.read_all(run.store)
    assert [record for record in log.records if isinstance(record, Quarantine)] == []
    assert len(log.lineage.live) >= KEEP
    assert not any(set(record.directories) & {commit.directory for commit in log.lineage.live} for record in retired(log))


def retired(log: RunLog) -> list[Retire]:
    return [record for record in log.records if isinstance(record, Retire)]
