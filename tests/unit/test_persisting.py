"""What an agent makes of its persister's lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keepstep.orchestrator import persisting
from keepstep.orchestrator.persisting import PersisterProcess
from keepstep.orchestrator.wire import Directive


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(persisting.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def persister(tmp_path: Path) -> PersisterProcess:
    return PersisterProcess(tmp_path / "socket", "root", 30.0, lambda: None)


def line(kind: str, *, attempt: int = 1, step: int = 20, rank: int = 0, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "attempt": attempt, "step": step, "rank": rank, **more}


def persisted(**of: int) -> dict[str, Any]:
    return line("persisted", directory="d", index_sha256="x", num_bytes=1, **of)


def test_a_failed_save_is_trouble_until_the_rank_saves_again(persister: PersisterProcess) -> None:
    assert persister.trouble == ""
    persister.hear(line("begun"))
    persister.hear(line("failed", why="step 20 of rank 0 is not durable: no space"))
    persister.hear(persisted(rank=1))
    assert persister.trouble == "step 20 of rank 0 is not durable: no space"
    persister.hear(line("begun", step=40))
    persister.hear(persisted(step=40))
    assert persister.trouble == ""


def test_a_save_that_takes_too_long_is_trouble(persister: PersisterProcess, clock: list[float]) -> None:
    persister.hear(line("begun", rank=1))
    clock[0] += 20
    persister.hear(line("begun", rank=0))
    assert persister.trouble == ""
    clock[0] += 11
    assert persister.trouble == "step 20 of rank 1 has been on its way to storage for over 30 s"
    persister.hear(persisted(rank=1))
    assert persister.trouble == ""


def test_a_save_that_takes_too_long_says_whether_it_moves(persister: PersisterProcess, clock: list[float]) -> None:
    persister.hear(line("begun"))
    clock[0] += 25
    persister.hear(line("writing", bytes=3_000_000, of=8_000_000))
    clock[0] += 6
    late = "step 20 of rank 0 has been on its way to storage for over 30 s"
    assert persister.trouble == f"{late}: 3 of 8 MB are written or on their way, last heard of 6 s ago"
    persister.hear(persisted())
    persister.hear(line("begun", step=40))
    clock[0] += 31
    assert persister.trouble == late.replace("20", "40", 1), "what the save before it had written says nothing"


def test_troubles_of_an_older_attempt_are_forgotten(persister: PersisterProcess, clock: list[float]) -> None:
    """Ranks may move to another node; nobody would ever clear them here."""
    persister.hear(line("failed", rank=0, why="no space"))
    persister.hear(line("begun", rank=1))
    persister.hear(line("begun", attempt=2, rank=2))
    persister.hear(persisted(attempt=2, rank=2))
    clock[0] += 100
    assert persister.trouble == ""


def test_what_is_durable_is_reported_until_it_is_settled(persister: PersisterProcess) -> None:
    persister.hear(persisted(step=20))
    persister.hear(persisted(step=40))
    persister.settle(Directive(term=1, launch=None, committed_step=20))
    assert [part.step for part in persister.persisted] == [40]


def test_how_long_a_save_takes_is_that_of_the_slowest_rank_of_the_newest_attempt_that_saved(
    persister: PersisterProcess, clock: list[float]
) -> None:
    assert persister.save_s == 0
    for rank in (0, 1):
        persister.hear(line("begun", rank=rank))
    clock[0] += 2
    persister.hear(persisted(rank=0))
    clock[0] += 3
    persister.hear(persisted(rank=1))
    assert persister.save_s == 5
    persister.hear(line("begun", attempt=2, rank=2, step=40))
    assert persister.save_s == 5, "the best guess, until the new attempt has saved"
    clock[0] += 1
    persister.hear(persisted(attempt=2, rank=2, step=40))
    assert persister.save_s == 1


def test_a_save_that_failed_at_first_says_nothing_about_how_long_saves_take(persister: PersisterProcess, clock: list[float]) -> None:
    persister.hear(line("begun"))
    persister.hear(line("failed", why="no space"))
    clock[0] += 100
    persister.hear(persisted())
    assert persister.save_s == 0


def test_a_persister_is_idle_when_nothing_is_on_its_way_and_nothing_waits_for_its_commit(persister: PersisterProcess) -> None:
    assert persister.is_idle
    persister.hear(line("begun"))
    assert not persister.is_idle
    persister.hear(persisted())
    assert not persister.is_idle
    persister.settle(Directive(term=1, launch=None, committed_step=20))
    assert persister.is_idle
