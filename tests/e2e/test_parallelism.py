"""Styles of parallelism under real kills: two nodes of two ranks, with bits to lose in shards, replicas and groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2e.live import NO_HANG, STEPS, LiveRun, gates, poll_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]


@pytest.mark.parametrize(
    "style",
    [
        ('train.sharding="node"', "train.activation_checkpointing=true"),
        ("train.tensor_parallel=2", 'model.kind="llama"', "train.sharding=none"),
    ],
    ids=["node", "tensor"],
)
def test_a_killed_rank_and_a_killed_node_cost_no_bit(start: Start, tmp_path: Path, style: tuple[str, ...]) -> None:
    undisturbed = start(*style)
    assert undisturbed.wait() == 0, undisturbed.said()
    run = start(NO_HANG, *style, faults=gates(tmp_path, 8, 14))
    for victims in (last_rank, whole_node):
        run.kill(*victims(run.wait_at_gate()["nodes"][-1]))
        poll_until(lambda: run.stopped() == [], "the group of a killed rank is killed whole", run.said)
    assert run.wait() == 0, run.said()
    run.check_what_always_holds()
    assert run.outcome() == undisturbed.outcome()
    assert len(run.outcome().losses) == STEPS
    assert run.result()["attempts"] == 3


def last_rank(node: dict[str, Any]) -> tuple[int, ...]:
    return (node["ranks"][-1]["pid"],)


def whole_node(node: dict[str, Any]) -> tuple[int, ...]:
    return (node["pid"], *(rank["pid"] for rank in node["ranks"]))
