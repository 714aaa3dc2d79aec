"""When a checkpoint is due."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from keepstep.trainer import loop
from keepstep.trainer.cadence import Auto, Cadence, EverySeconds, EverySteps, Interval, parse_interval
from keepstep.trainer.run import SaveRequests


def cadence(interval: Interval) -> Cadence:
    return Cadence(interval=interval, saved_step=0, saved_at=100.0)


def test_steps_fall_due_on_multiples_whatever_was_postponed() -> None:
    every = cadence(EverySteps(10))
    assert [step for step in range(1, 25) if every.is_due(step, 0.0)] == list(range(10, 25))
    late = every.saved(13, 0.0, 0.0)
    assert [step for step in range(14, 25) if late.is_due(step, 0.0)] == [20, 21, 22, 23, 24]


def test_seconds_fall_due_after_the_last_save() -> None:
    every = cadence(EverySeconds(30.0))
    assert not every.is_due(1, 129.0)
    assert every.is_due(2, 130.0)
    assert not every.saved(2, 131.0, 0.0).is_due(3, 160.0)


def test_auto_follows_young() -> None:
    assert Auto(attempt=1).seconds(stall_s=0.02) == pytest.approx((2 * 0.02 * 3600) ** 0.5)
    assert Auto(attempt=4).seconds(stall_s=0.02) == pytest.approx((2 * 0.02 * 900) ** 0.5)
    assert Auto(attempt=1).seconds(stall_s=1e9) == 600
    assert Auto(attempt=1).seconds(stall_s=0) == 1
    measured = cadence(Auto(attempt=1)).saved(5, 200.0, 0.125)
    assert not measured.is_due(6, 229.0)
    assert measured.is_due(7, 230.0)


@pytest.mark.parametrize(("text", "interval"), [(20, EverySteps(20)), ("2.5s", EverySeconds(2.5)), ("auto", Auto(3))])
def test_intervals_are_steps_seconds_or_auto(text: int | str, interval: Interval) -> None:
    assert parse_interval(text, attempt=3) == interval


@pytest.mark.parametrize("text", [0, -1, "0s", "20", "s", "soon", "-3s"])
def test_anything_else_is_refused(text: int | str) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.interval"):
        parse_interval(text, attempt=1)


def test_one_showing_of_a_save_request_is_one_save() -> None:
    requests = SaveRequests()
    owed = []
    for is_shown, can_save in [(False, True), (True, False), (True, True), (True, True), (False, True), (True, True)]:
        owed.append(requests.is_new(is_shown))
        if owed[-1] and can_save:
            requests.served()
    assert owed == [False, True, True, False, False, True]


def test_what_is_due_together_is_evaluated_before_it_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes on from that checkpoint begins behind the evaluation: after the save it would be lost with any rank."""
    happened: list[str] = []
    config = SimpleNamespace(run=SimpleNamespace(steps=5), train=SimpleNamespace(loader_workers=0), evaluate=SimpleNamespace(interval=2))
    ready = SimpleNamespace(get_ready=lambda tensors: None)
    me, world = SimpleNamespace(report=lambda phase, step: None), SimpleNamespace(rank=0)
    run = SimpleNamespace(config=config, me=me, world=world, checkpointer=ready, tensors={}, step=0, share=None)

    def advance(run: Any, parts: Any) -> SimpleNamespace:
        run.step += 1
        return SimpleNamespace(stop=False, save=run.step in (1, 4))

    monkeypatch.setattr(loop, "advance", advance)
    monkeypatch.setattr(loop, "batches", lambda share, steps, *rest: nullcontext(iter(steps)))
    for name in ("record_surroundings", "finish"):
        monkeypatch.setattr(loop, name, lambda run: None)
    monkeypatch.setattr(loop, "save", lambda run: happened.append(f"save {run.step}"))
    monkeypatch.setattr(loop, "evaluate_run", lambda run: happened.append(f"evaluate {run.step}"))
    loop.train(run)  # type: ignore[arg-type]
    assert happened == ["save 1", "evaluate 2", "evaluate 4", "save 4"]
