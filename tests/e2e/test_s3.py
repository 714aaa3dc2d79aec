"""The same promise on an object store: a real S3 server, real kills."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3server import S3Server, running_s3_server

from e2e.live import NO_HANG, LiveRun, Outcome, gates, poll_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.s3]

Start = Callable[..., LiveRun]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with running_s3_server() as server:
        yield server


@pytest.fixture
def on_s3(start: Start, server: S3Server) -> Start:
    def begin(*overrides: str, **kwargs: object) -> LiveRun:
        root = f"{server.url}/{uuid.uuid4().hex}"
        return start(*overrides, root=root, environment=server.environment, options=server.options, **kwargs)

    return begin


def test_a_killed_rank_a_killed_node_and_kills_during_saves(on_s3: Start, undisturbed: Outcome, tmp_path: Path) -> None:
    """contract/test_kill_runs.py has a hundred more on this store, without ranks."""
    points = {"persister.shards.after:rank=1:attempt=3": tmp_path / "shards", "coordinator.commit.before": tmp_path / "commit"}
    faults = ";".join(f"{point}:once={marker}" for point, marker in points.items())
    run = on_s3(NO_HANG, faults=f"{faults};{gates(tmp_path, 8, 14)}")
    run.kill(run.wait_at_gate()["nodes"][-1]["ranks"][-1]["pid"])
    poll_until(lambda: run.stopped() == [], "the group of a killed rank is killed whole", run.said)
    node = run.wait_at_gate()["nodes"][0]
    run.kill(node["pid"], *(rank["pid"] for rank in node["ranks"]))
    assert run.wait() == 0, run.said()
    run.check_what_always_holds()
    assert run.outcome() == undisturbed
    assert run.result()["attempts"] == 4, run.said()
    assert all(marker.exists() for marker in points.values())
