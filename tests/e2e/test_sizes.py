"""Gangs that shrink and grow: on people's orders, and because hosts go away and come back. Each sample counts once all the same."""

from __future__ import annotations

import contextlib
import os
import signal
import urllib.request
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from e2e.live import LiveRun
from keepstep.orchestrator.processes import strays
from keepstep.orchestrator.scratch import default_scratch
from keepstep.storage.runlog import RunLog
from keepstep.storage.steps import read_steps

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]
STEPS = 240


def order(run: LiveRun, path: str) -> None:
    url, token = run._look_up()
    request = urllib.request.Request(url + path, method="POST", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        assert answer.status == 200


def trains_on(run: LiveRun, world_size: int, *, attempt: int) -> dict[str, Any]:
    return run.wait_until(lambda s: s["phase"] == "TRAINING" and s["world_size"] == world_size and s["attempt"] >= attempt)


def test_the_gang_shrinks_and_grows_and_each_sample_counts_once(start: Start) -> None:
    run = start(f"run.steps={STEPS}", "checkpoint.interval=8", "cluster.min_nodes=1", "cluster.wait_for_nodes_s=8")
    trains_on(run, 4, attempt=1)
    order(run, "/v1/resize?nodes=1")
    trains_on(run, 2, attempt=2)
    order(run, "/v1/resize?nodes=2")
    status = trains_on(run, 4, attempt=3)

    node = status["nodes"][-1]
    host = [node["pid"], *strays(default_scratch(run.root, node["id"].partition("#")[0]))]
    for pid in host:  # the whole host is suspended, longer than its lease
        os.kill(pid, signal.SIGSTOP)
    trains_on(run, 2, attempt=4)
    for pid in host:
        with contextlib.suppress(ProcessLookupError):  # it had ended before it was stopped, and its parent took notice of that later
            os.kill(pid, signal.SIGCONT)
    trains_on(run, 4, attempt=5)

    assert run.wait() == 0, "\n".join(run.output[-60:]) + run.logs()
    run.check_what_always_holds()
    history = RunLog.open(run.store).lineage.history(read_steps(run.store))
    assert [step.step for step in history] == list(range(1, STEPS + 1))
    spans = [step.record["samples"] for step in history]
    assert all(after[0] == before[1] for before, after in pairwise(spans)), "samples were skipped or repeated"
    (failure,) = run.result()["failures"]
    assert failure["node"] == node["id"]
    assert [event["why"] for event in run.events() if event["kind"] == "resize-asked"] == [
        "a full gang has 1 nodes from now on, not 2",
        "a full gang has 2 nodes from now on, not 1",
    ]
