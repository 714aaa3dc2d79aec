"""Storage goes away in mid-run, for longer than a lease: training goes on, the run says DEGRADED, and nothing of it is left in the bits."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
from faultproxy import Answer, BlackHole, On, fault_proxy
from s3server import running_s3_server

from e2e.live import STEPS, LiveRun, Outcome

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.s3]

Start = Callable[..., LiveRun]
OUTAGE_S = 8.0  # as the coordinator counts it; over two leases
PATIENCE = ("storage.timeout_s=6",)  # a call that met a black hole is over soon after the store is back


def test_training_goes_on_without_storage(start: Start, undisturbed: Outcome) -> None:
    """First it swallows every request, then it refuses them."""
    with running_s3_server() as server, fault_proxy(server.endpoint_url) as proxy:
        environment = {**server.environment, "AWS_ENDPOINT_URL": proxy.endpoint_url}
        run = start(*PATIENCE, root=f"{server.url}/{uuid.uuid4().hex}", environment=environment, options=server.options)
        before = run.wait_until(lambda status: status["last_commit"] is not None)
        proxy.script(On(BlackHole(), "."))
        status = run.wait_until(lambda status: status["degraded"] is not None and status["degraded"]["since_s"] > OUTAGE_S)
        assert (status["attempt"], status["step"]) == (1, STEPS), "all that is left to do is the last checkpoint"
        assert status["last_commit"]["age_s"] > OUTAGE_S / 2
        assert pids(status) == pids(before)
        proxy.script(On(Answer.of(403, "AccessDenied"), "."))
        run.wait_until(lambda status: "correct the credentials" in status["degraded"]["why"])
        proxy.script()
        assert run.wait() == 0, "\n".join(run.output[-60:]) + run.logs()
        run.check_what_always_holds()
        assert run.outcome() == undisturbed
        assert run.result()["attempts"] == 1
        told = [(event["kind"], event["why"]) for event in run.events() if event["kind"] in ("degraded", "recovered")]
        assert [kind for kind, _ in told] == ["degraded", "recovered"], told
        kinds = [event["kind"] for event in run.events()]
        assert kinds.index("degraded") < kinds.index("recovered") < kinds.index("succeeded")


def pids(status: dict[str, Any]) -> list[int]:
    return [rank["pid"] for node in status["nodes"] for rank in node["ranks"]]
