"""Who is dead is known from the kernel: no lease is waited for, and the bits are those of an undisturbed run."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.live import Outcome
from e2e.parts import PartedRun

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PROOF = "the kernel closed its tether, all its processes are dead"
ENDLESS_LEASE = ("cluster.spares=1", "cluster.lease_s=200", "cluster.drop_grace_s=200", "cluster.stall_s=300", "cluster.hang_s=100")


def test_a_killed_node_is_replaced_by_the_spare_without_waiting_for_its_lease(
    config_file: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    """Its lease and grace would outlast the test."""
    run = PartedRun(config_file, str(tmp_path / "root"), ENDLESS_LEASE, scratch=tmp_path)
    try:
        run.prepare().coordinator("coordinator")
        for name in ("node0", "node1", "node2"):
            run.agent(name)
        status = run.wait_for_step(7)
        lost = next(node for node in status["nodes"] if node["ranks"] and node["ranks"][-1]["rank"] == 3)
        run.kill(lost["pid"], *(rank["pid"] for rank in lost["ranks"]))
        assert run.wait() == 0, run.said()
        run.check_what_always_holds()
        assert run.outcome() == undisturbed
        (failure,) = run.result()["failures"]
        assert (failure["node"], failure["why"]) == (lost["id"], f"lost {lost['id']}: {PROOF}")
        assert "fenced-off" not in {event["kind"] for event in run.events()}
    finally:
        run.end()
