"""Gangs of 4 -> 2 -> 3 -> 4 ranks with kills in between: each sample counts once, and with exact reduction no bit tells."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2e.live import NO_HANG, LiveRun, gates, keepstep, poll_until
from keepstep.storage.records import Attempt
from keepstep.storage.runlog import RunLog
from keepstep.storage.steps import read_steps
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.data import feed_for
from keepstep.trainer.ledger import check_ledger
from keepstep.trainer.samples import samples_of
from keepstep.trainer.tokens import open_tokens

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]
STEPS = 48
ELASTIC = (
    "cluster.nodes=4",
    "cluster.ranks_per_node=1",
    "cluster.min_nodes=1",
    "cluster.wait_for_nodes_s=300",
    "cluster.strikes=100",
    f"run.steps={STEPS}",
)


def working(status: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes whose ranks run; others stand by, and may still tell of ranks that have exited."""
    return [node for node in status["nodes"] if any(rank["phase"] != "exited" for rank in node["ranks"])]


def change_sizes(start: Start, folder: Path, *overrides: str) -> LiveRun:
    """4 -> 2 -> 3 -> 4: at each gate another number of nodes is ordered, and a rank is killed, so that steps are lost, too."""
    run = start(NO_HANG, *ELASTIC, *overrides, faults=gates(folder, 10, 20, 30, 40))
    for world_size, next_size in ((4, 2), (2, 3), (3, 4), (4, 4)):
        status = run.wait_at_gate()
        assert status["world_size"] == world_size
        if next_size != world_size:
            assert keepstep("resize", str(next_size), run.root).returncode == 0
        run.kill(working(status)[-1]["ranks"][0]["pid"])
        poll_until(lambda: run.stopped() == [], "the group of a killed rank is killed whole", run.said)
    assert run.wait() == 0, run.said()
    run.check_what_always_holds()
    attempts = [record for record in RunLog.read_all(run.store).records if isinstance(record, Attempt)]
    assert [(attempt.world_size, attempt.resume_step) for attempt in attempts] == [(4, -1), (2, 6), (3, 18), (4, 24), (4, 36)]
    return run


def prove_ledger(run: LiveRun) -> None:
    """Each sample of the beginning of the canonical order was consumed once."""
    config = TrainerConfig.model_validate(tomllib.loads(run.store.get("run.toml").decode()))
    samples = samples_of(open_tokens(run.store), config)
    history = RunLog.open(run.store).lineage.history(read_steps(run.store))
    ledger = check_ledger([step.record for step in history], samples, feed_for(samples.sizes, config))
    assert ledger.problems == ()
    assert ledger.samples == STEPS * config.train.batch_tokens // config.model.context


def test_every_sample_counts_once_and_only_rounding_tells_the_sizes(start: Start, tmp_path: Path) -> None:
    no_dropout = "model.dropout=0"  # whose masks follow from the rank at another size
    run = change_sizes(start, tmp_path, no_dropout)
    prove_ledger(run)
    fixed = start(f"run.steps={STEPS}", no_dropout)
    assert fixed.wait() == 0, fixed.said()
    losses, expected = ([float.fromhex(loss) for loss in of.outcome().losses] for of in (run, fixed))
    assert losses == pytest.approx(expected, rel=1e-5)


def test_with_exact_reduction_no_bit_tells_the_sizes(start: Start, tmp_path: Path) -> None:
    """Compared with a run on two ranks that nobody disturbs; dropout is on."""
    run = change_sizes(start, tmp_path, "cluster.exact_reduction=true")
    prove_ledger(run)
    fixed = start(f"run.steps={STEPS}", "cluster.nodes=1", "cluster.exact_reduction=true", "cluster.logical_ranks=4")
    assert fixed.wait() == 0, fixed.said()
    assert run.outcome() == fixed.outcome()
    assert run.result()["perplexity"] == fixed.result()["perplexity"]


MANY_STEPS, KILLS = 300, 10
OFTEN = {"rank": 5, "agent": 2, "node": 1, "coordinator": 2}  # how often each is killed, in the mean


def has_reached(run: LiveRun, step: int) -> bool:
    assert run.process
    status = run.status()
    return run.process.poll() is not None or (status is not None and status["step"] >= step)


@pytest.mark.timeout(900)  # eleven starts, six hundred steps: longer than what a test may take that hangs
def test_ten_kills_by_chance_in_three_hundred_steps_cost_no_bit(start: Start, tmp_path: Path) -> None:
    """Ranks, agents, whole nodes and coordinators, one in each tenth of the run, as a seeded generator draws."""
    tiny = ("model.layers=1", "train.batch_tokens=64", f"run.steps={MANY_STEPS}", "checkpoint.interval=20")
    two = (*tiny, "cluster.ranks_per_node=1", "cluster.max_failures=100", "cluster.strikes=100")
    undisturbed = start(*two)
    chance = random.Random(4)
    steps = [chance.randrange(first, first + MANY_STEPS // KILLS) for first in range(1, MANY_STEPS - 1, MANY_STEPS // KILLS)]
    for step in range(0, MANY_STEPS, MANY_STEPS // KILLS):  # a busy machine may need its patience for each part
        poll_until(lambda step=step: has_reached(undisturbed, step), f"step {step}", undisturbed.said)
    assert undisturbed.wait() == 0, undisturbed.said()
    run = start(NO_HANG, *two, faults=gates(tmp_path, *steps))
    for what in chance.choices(list(OFTEN), list(OFTEN.values()), k=KILLS):
        status = run.wait_at_gate()
        node = chance.choice(working(status))
        ranks = [rank["pid"] for rank in node["ranks"]]
        stopped = set(run.stopped())
        victims = {"rank": ranks, "agent": [node["pid"]], "node": [node["pid"], *ranks], "coordinator": [status["coordinator"]["pid"]]}
        run.kill(*victims[what])
        if what == "coordinator":
            run.open_gate()
        poll_until(lambda stopped=stopped: not stopped & set(run.stopped()), "the ranks of that gate stand there no more", run.said)
    assert run.wait() == 0, run.said()
    run.check_what_always_holds()
    assert run.outcome() == undisturbed.outcome()
