"""Samples that would spoil a training are found, named and left out, and what is left is the training that never met them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from planted import plant

from e2e.live import LiveRun
from keepstep.storage.records import Rewind
from keepstep.storage.runlog import RunLog

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]
BATCH = 16  # samples of a step
# Step 9, fourth rank: its loss. Step 21, second rank: only its gradient.
LOSS, GRADIENT = 8 * BATCH + 13, 20 * BATCH + 5
NAN_LOSS = f"trainer.sample:position={LOSS}:module=blocks.0.attention"
NAN_GRADIENT = f"trainer.sample:position={GRADIENT}:module=blocks.1.mlp.up:way=gradient"


def rewinds_of(run: LiveRun) -> list[Rewind]:
    return [record for record in RunLog.read_all(run.store).records if isinstance(record, Rewind)]


def without(start: Start, *positions: int, overrides: tuple[str, ...] = ()) -> LiveRun:
    """A run that leaves them out from its first step on."""
    texts = ", ".join(f'"{position}:{position + 1}"' for position in positions)
    return start(f"data.skip=[{texts}]", *overrides)


def test_two_samples_that_make_nan_are_rewound_past_although_ranks_are_killed_meanwhile(start: Start, tmp_path: Path) -> None:
    """One rank dies in the autopsy of the first one, another as the rewound attempt begins."""
    killed = ("rank.autopsy:rank=2:step=9", "rank.begin:rank=1:step=6")
    kills = (f"{point}:once={tmp_path / f'kill-{i}'}" for i, point in enumerate(killed))
    reference = without(start, LOSS, GRADIENT)
    poisoned = start(faults=";".join((NAN_LOSS, NAN_GRADIENT, *kills)))
    assert poisoned.wait() == 0, poisoned.said()
    assert reference.wait() == 0, reference.said()
    poisoned.check_what_always_holds()
    assert poisoned.outcome() == reference.outcome()
    first, second = rewinds_of(poisoned)
    assert (first.step, first.bad_step, first.skips) == (6, 9, (f"{LOSS}:{LOSS + 1}",))
    # The sample that the first rewind left out moved all later ones up by a turn.
    assert (second.step, second.bad_step, second.skips) == (18, 21, (f"{LOSS}:{LOSS + 1}", f"{GRADIENT}:{GRADIENT + 1}"))
    assert f"step 9: the loss of rank 3 is nan; first in blocks.0.attention; samples {LOSS}:{LOSS + 1} ('" in first.why
    assert (
        f"step 21: the gradient of rank 1 is nan; first in the backward pass of blocks.1.mlp.up; samples {GRADIENT}:{GRADIENT + 1} ('"
        in second.why
    )
    assert poisoned.result()["attempts"] == 5


PLANTED = [24 * BATCH + i for i in (1, 2, 5, 6, 9, 10, 13, 15)]  # half of step 25


def test_samples_of_pure_chance_are_a_spike_and_rewound_past(start: Start, tmp_path: Path) -> None:
    """Really planted: random letters in a text that the model knows by heart by then."""
    text = tmp_path / "text"
    text.mkdir()
    plant(text, PLANTED, seed=7, context=32)
    overrides = (f"data.source={text}", "run.steps=30", "optimizer.lr=0.01", "train.spike.window=8", "train.spike.sigmas=6")
    reference = without(start, *PLANTED, overrides=overrides)
    poisoned = start(*overrides)
    assert poisoned.wait() == 0, poisoned.said()
    assert reference.wait() == 0, reference.said()
    poisoned.check_what_always_holds()
    assert poisoned.outcome() == reference.outcome()
    assert rewinds_of(reference) == []
    (rewind,) = rewinds_of(poisoned)
    assert (rewind.step, rewind.bad_step) == (24, 25)
    assert rewind.skips == ("385:387", "389:391", "393:395", "397:398", "399:400")
    assert rewind.why.startswith("step 25: the loss is 3.")
    assert "; samples 385:387, 389:391, 393:395 and 2 more of ranks 0, 1, 2 and 1 more ('" in rewind.why


def test_a_spent_budget_ends_the_run_and_its_sentence_says_so(start: Start) -> None:
    run = start("train.spike.budget=1", "run.steps=10", faults=f"trainer.sample:position={3 * BATCH};trainer.sample:position={7 * BATCH}")
    assert run.wait() == 4, run.said()
    (rewind,) = rewinds_of(run)
    assert rewind.skips == (f"{3 * BATCH}:{3 * BATCH + 1}",)
    why = run.result()["why"]
    assert "train.spike.budget" in why
    assert why.startswith("step 7: the loss of rank 3 is nan; first in model; samples 112:113 (")
