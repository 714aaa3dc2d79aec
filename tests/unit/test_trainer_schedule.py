"""The learning rate of every schedule."""

from __future__ import annotations

import pytest

from keepstep.trainer.config import OptimizerSection
from keepstep.trainer.schedule import changes, learning_rate, schedule_of

CONFIG = OptimizerSection(lr=1.0, min_lr_ratio=0.1, warmup_steps=10)
FALLING = ("cosine", "linear", "wsd")


def rates(steps: int = 110, **fields: object) -> list[float]:
    config = OptimizerSection.model_validate({**CONFIG.model_dump(), **fields})
    return [learning_rate(config, step, steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", [*FALLING, "constant"])
def test_it_warms_up(schedule: str) -> None:
    assert rates(schedule=schedule)[:10] == [pytest.approx(step / 10) for step in range(1, 11)]


@pytest.mark.parametrize("schedule", FALLING)
def test_it_falls_to_its_end(schedule: str) -> None:
    found = rates(schedule=schedule)
    assert found[9:] == sorted(found[9:], reverse=True)
    assert found[-1] == pytest.approx(0.1)


def test_half_way_down() -> None:
    assert rates(schedule="cosine")[59] == pytest.approx(0.55)
    assert rates(schedule="linear")[59] == pytest.approx(0.55)
    assert rates(schedule="linear")[34] == pytest.approx(0.775)
    assert rates(schedule="cosine")[34] > 0.8


def test_wsd_stays_and_then_decays() -> None:
    found = rates(schedule="wsd", decay_share=0.2)
    assert list(found[9:90]) == pytest.approx([1.0] * 81, rel=1e-15)
    assert found[99] == pytest.approx(0.55)


def test_constant_stays() -> None:
    assert set(rates(schedule="constant")[9:]) == {1.0}


def test_one_cycle_rises_and_falls_without_warm_up() -> None:
    found = rates(steps=100, schedule="one-cycle")
    assert found[0] == pytest.approx(0.04, abs=0.01)
    assert found.index(max(found)) == 29
    assert found[29] == pytest.approx(1.0)
    assert found[:30] == sorted(found[:30])
    assert found[29:] == sorted(found[29:], reverse=True)
    assert found[-1] == pytest.approx(0.1)


def test_without_warm_up_the_first_step_is_near_the_peak() -> None:
    assert rates(steps=1000, warmup_steps=0)[0] == pytest.approx(1.0, abs=1e-4)


def test_a_changed_schedule_is_told_key_by_key() -> None:
    before, after = schedule_of(CONFIG, 100), schedule_of(CONFIG.model_copy(update={"lr": 0.5, "schedule": "wsd"}), 100)
    assert list(changes(before, after, "of the schedule")) == [
        "lr of the schedule was 1.0 and is 0.5 from here on",
        "schedule of the schedule was cosine and is wsd from here on",
    ]
    assert list(changes(before, before, "of the schedule")) == []
