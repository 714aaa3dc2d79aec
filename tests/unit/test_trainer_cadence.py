"""When a checkpoint is due."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from keepstep.trainer import loop
from keepstep.trainer.best import Best
from keepstep.trainer.cadence import Auto, Cadence, EverySeconds, EverySteps, Interval, parse_interval
from keepstep.trainer.contract import Pacing
from keepstep.trainer.run import SaveRequests

UNDECIDED = Pacing()


def cadence(interval: Interval, step: int = 0) -> Cadence:
    return Cadence(interval=interval, saved_step=0, saved_at=100.0).began(step, 100.0)


def saves(every: Cadence, told: Pacing, last: int, busy: int = 0) -> list[int]:
    """The steps after which it saves, where each save is being written during the next `busy` steps."""
    found: list[int] = []
    for step in range(every.began_step + 1, last + 1):
        if every.is_due(step, 0.0, told) and not (found and step <= found[-1] + busy):
            found.append(step)
            every = every.saved(step, 0.0)
    return found


def test_steps_fall_due_on_multiples_whatever_was_postponed() -> None:
    every = cadence(EverySteps(10))
    assert [step for step in range(1, 25) if every.is_due(step, 0.0, UNDECIDED)] == list(range(10, 25))
    late = every.saved(13, 0.0)
    assert [step for step in range(14, 25) if late.is_due(step, 0.0, UNDECIDED)] == [20, 21, 22, 23, 24]


def test_seconds_fall_due_after_the_last_save() -> None:
    every = cadence(EverySeconds(30.0))
    assert not every.is_due(1, 129.0, UNDECIDED)
    assert every.is_due(2, 130.0, UNDECIDED)
    assert not every.saved(2, 131.0).is_due(3, 160.0, UNDECIDED)


class TestAuto:
    def test_it_counts_from_where_the_attempt_began_and_from_each_save(self) -> None:
        assert saves(cadence(Auto(), 103), Pacing(20, soon=False), 170) == [123, 143, 163]

    def test_soon_is_at_once_and_then_ever_more_rarely(self) -> None:
        assert saves(cadence(Auto(), 100), Pacing(20, soon=True), 180) == [101, 102, 104, 108, 116, 132, 152, 172]

    def test_undecided_it_saves_when_it_has_gone_twice_as_far(self) -> None:
        assert saves(cadence(Auto(), 100), UNDECIDED, 200) == [101, 102, 104, 108, 116, 132, 164]

    def test_a_new_word_holds_at_once(self) -> None:
        every = cadence(Auto()).saved(50, 0.0)
        assert not every.is_due(60, 0.0, Pacing(20, soon=False))
        assert every.is_due(60, 0.0, Pacing(10, soon=False))

    def test_what_is_postponed_is_still_due(self) -> None:
        assert saves(cadence(Auto()), Pacing(4, soon=True), 30, busy=6) == [1, 8, 15, 22, 29]

    def test_a_crash_loop_loses_no_more_than_half_of_what_it_lived(self) -> None:
        for lived in range(1, 300):
            assert saves(cadence(Auto()), Pacing(1000, soon=True), lived)[-1] * 2 > lived


@pytest.mark.parametrize(("text", "interval"), [(20, EverySteps(20)), ("2.5s", EverySeconds(2.5)), ("auto", Auto())])
def test_intervals_are_steps_seconds_or_auto(text: int | str, interval: Interval) -> None:
    assert parse_interval(text) == interval


@pytest.mark.parametrize("text", [0, -1, "0s", "20", "s", "soon", "-3s"])
def test_anything_else_is_refused(text: int | str) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.interval"):
        parse_interval(text)


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
    config = SimpleNamespace(
        run=SimpleNamespace(steps=5),
        train=SimpleNamespace(loader_workers=0, compile=False),
        evaluate=SimpleNamespace(interval=2, patience=0, generate=0),
    )
    ready = SimpleNamespace(get_ready=lambda tensors: None)
    me, world = SimpleNamespace(report=lambda phase, step, within_s=0.0: None), SimpleNamespace(rank=0)
    run = SimpleNamespace(config=config, me=me, world=world, checkpointer=ready, tensors={}, step=0, share=None, best=Best(), is_over=False)

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
