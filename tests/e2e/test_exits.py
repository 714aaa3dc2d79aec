"""Ranks that end in every way but the right one: each is named with what the kernel, Python or its own last words say of it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.live import LiveRun, Outcome, no_process_left
from keepstep.orchestrator import cgroups
from keepstep.orchestrator.breaking import NO_LIMIT

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]
ROOM_BYTES = 200_000_000  # what the eater may take

FAULTS = (
    "rank=2:action=eat:when={folder}/eat",
    "rank=1:step=13:action=raise:once={folder}/raised",
    "rank=2:step=15:action=exit:once={folder}/exited",
    "rank=3:step=17:action=leave:once={folder}/left",
    "rank=0:step=19:signal=SEGV:once={folder}/crashed",
)


@pytest.fixture
def group() -> Iterator[cgroups.Cgroup]:
    """For the whole run; requested before the run, so that it is removed after it."""
    if why := cgroups.missing():
        pytest.skip(why)
    made = cgroups.Cgroup(f"keepstep-test-{uuid.uuid4().hex[:8]}")
    made.make()
    yield made
    made.remove()


def test_every_way_to_end_is_named_and_costs_no_bit(group: cgroups.Cgroup, start: Start, undisturbed: Outcome, tmp_path: Path) -> None:
    run = start(faults=";".join(f"rank.step:{fault.format(folder=tmp_path)}" for fault in FAULTS))
    assert run.process
    group.enter(run.process.pid)
    run.wait_for_step(3)
    group.limit_memory(group.memory_bytes() + ROOM_BYTES)
    (tmp_path / "eat").touch()
    run.wait_until(lambda status: status["attempt"] >= 2)
    group.limit_memory(NO_LIMIT)
    assert run.wait() == 0, "\n".join(run.output[-60:]) + run.logs()
    run.check_what_always_holds()
    assert no_process_left(run)
    assert run.outcome() == undisturbed
    failures = run.result()["failures"]
    assert [failure["rank"] for failure in failures] == [2, 1, 2, 3, 0]
    eaten, raised, exited, left, crashed = (failure["why"] for failure in failures)
    assert "OOM killer" in eaten
    assert "limit is" in eaten
    assert "InjectedError: injected on purpose" in raised
    assert "exit code 3" in exited
    assert "exit code 0, before it had finished" in left
    assert "SIGSEGV" in crashed
    assert "InjectedError" in failures[1]["printed"][-1]
    assert failures[4]["printed"][0] == "Fatal Python error: Segmentation fault"
