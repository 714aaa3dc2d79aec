"""A killed rank costs no bit, whatever the model is and whatever it learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.live import NO_HANG, LiveRun, gates

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]
FAMILIES = {
    "llama": ("model.kind=llama", "model.kv_heads=1", "model.tied=false"),
    "bert": ("model.kind=bert", "train.objective=masked"),
    "lstm": ("model.kind=lstm", "data.order=streams"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_killed_rank_costs_no_bit(start: Start, tmp_path: Path, family: str) -> None:
    calm = start(*FAMILIES[family])
    assert calm.wait() == 0, calm.said()
    run = start(NO_HANG, *FAMILIES[family], faults=gates(tmp_path, 10))
    run.kill(run.wait_at_gate()["nodes"][-1]["ranks"][-1]["pid"])
    assert run.wait() == 0, run.said()
    run.check_what_always_holds()
    assert run.result()["attempts"] == 2
    assert run.outcome() == calm.outcome()
