"""Early stopping in the loop: what is evaluated, saved and ended when, and that no restart changes it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trainer_ranks import TINY, commit, train_ranks

from keepstep.trainer import loop
from keepstep.trainer.best import Best

INTERVAL = 2
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 12


class Loop:
    """The training loop, its steps made up.

    Args:
        losses: of the evaluations, as they come.
        saves: steps at which a save is due by itself.
        stop: step at which ranks are told to leave.
    """

    def __init__(self, *losses: float, steps: int = 20, patience: int = 2, saves: tuple[int, ...] = (), stop: int = 0) -> None:
        self.losses, self.steps, self.saves, self.stop = list(losses), steps, saves, stop
        self.step, self.best, self.happened = 0, Best(), list[str]()
        self.evaluate = SimpleNamespace(interval=INTERVAL, patience=patience, generate=0)
        self.config = SimpleNamespace(
            run=SimpleNamespace(steps=steps), train=SimpleNamespace(loader_workers=0, compile=False), evaluate=self.evaluate
        )
        self.me, self.world = SimpleNamespace(report=lambda phase, step, within_s=0.0: None), SimpleNamespace(rank=0)
        self.checkpointer, self.tensors, self.share = SimpleNamespace(get_ready=lambda tensors: None), dict[str, Any](), None

    @property
    def is_over(self) -> bool:
        return self.step >= self.steps or self.best.is_over(self.evaluate.patience)

    def advance(self, run: Any, parts: Any) -> SimpleNamespace:
        self.step += 1
        return SimpleNamespace(stop=self.step == self.stop, save=self.step in self.saves)

    def evaluate_run(self, run: Any) -> bool:
        self.best = self.best.after(self.step, self.losses.pop(0), 0.0)
        return self.tell("evaluate") or self.best.step == self.step

    def tell(self, what: str) -> None:
        self.happened.append(f"{what} {self.step}")


def played(monkeypatch: pytest.MonkeyPatch, it: Loop) -> list[str]:
    monkeypatch.setattr(loop, "advance", it.advance)
    monkeypatch.setattr(loop, "batches", lambda share, steps, *rest: nullcontext(iter(steps)))
    monkeypatch.setattr(loop, "record_surroundings", lambda run: None)
    monkeypatch.setattr(loop, "evaluate_run", it.evaluate_run)
    for name in ("save", "save_best", "finish"):
        monkeypatch.setattr(loop, name, lambda run, name=name: it.tell(name))
    loop.train(it)  # type: ignore[arg-type]
    return it.happened


def test_the_best_one_is_saved_at_its_own_step_and_the_last_one_by_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    happened = played(monkeypatch, Loop(3.0, 2.0, 2.5, 2.1, saves=(4, 5, 8)))
    assert happened == ["evaluate 2", "save_best 2", "evaluate 4", "save_best 4", "save 5", "evaluate 6", "evaluate 8", "finish 8"]


def test_without_patience_nothing_is_saved_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    happened = played(monkeypatch, Loop(3.0, 2.0, 2.5, steps=6, patience=0, saves=(4,)))
    assert happened == ["evaluate 2", "evaluate 4", "save 4", "finish 6"], "the last step's evaluation is the end's"


@pytest.mark.parametrize(("patience", "last"), [(2, ["evaluate 4", "finish 4"]), (0, ["finish 4"])])
def test_told_to_leave_at_a_step_that_counts_it_is_evaluated_first(monkeypatch: pytest.MonkeyPatch, patience: int, last: list[str]) -> None:
    happened = played(monkeypatch, Loop(3.0, 2.0, patience=patience, stop=4))
    assert [what for what in happened if what.endswith(" 4")] == last


def test_a_step_that_was_evaluated_before_a_restart_is_not_evaluated_again(monkeypatch: pytest.MonkeyPatch) -> None:
    it = Loop(2.0, steps=6)
    it.step, it.best = 2, Best(step=2, nats=3.0, seen=2)
    assert played(monkeypatch, it) == ["evaluate 4", "save_best 4", "finish 6"]


class Saver:
    """A checkpointer that is busy for a while."""

    can_save, stall_s = True, 0.0

    def __init__(self, looks: int) -> None:
        self.looks, self.happened = looks, list[str]()

    @property
    def busy(self) -> bool:
        self.looks -= 1
        return self.looks >= 0

    def wait(self, seconds: float) -> None:
        self.happened.append("wait")

    def begin_save(self, step: int, tensors: Any, state: Any, *, patience_s: float) -> bool:
        self.happened.append("save patiently" if patience_s else "save")
        return True


@pytest.mark.parametrize(("looks", "happened"), [(0, []), (2, ["wait"] * 2), (10**6, ["wait"] * 600)])
def test_a_best_one_waits_for_the_save_before_it_but_not_for_ever(looks: int, happened: list[str]) -> None:
    saver = Saver(looks)
    ignored = SimpleNamespace(report=lambda phase, step, within_s=0.0: None, saved=lambda *what: None, served=lambda: None)
    run = SimpleNamespace(
        checkpointer=saver,
        world=SimpleNamespace(gather=lambda row: torch.tensor([row])),
        rank_state=lambda: SimpleNamespace(to_json=dict),
        **dict.fromkeys(("me", "cadence", "costs", "save_requests"), ignored),
        **dict.fromkeys(("step", "tensors")),
    )
    loop.save_best(run)  # type: ignore[arg-type]
    assert saver.happened == [*happened, "save patiently"]


def ended(root: Path, config: dict[str, Any], attempt: int, step: int) -> dict[str, Any]:
    (folder,) = root.glob(f"data/a{attempt:06d}/s{step:09d}-*")
    result: dict[str, Any] = json.loads((folder / "rank-00000.json").read_text())["state"]["result"]
    return result


@pytest.mark.slow
def test_a_run_that_had_to_leave_ends_early_as_if_it_had_not(tmp_path: Path) -> None:
    """It is told to leave at the step of the best evaluation, and again at one that was not better."""
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / f"text/{i}.txt").write_text(f"Chapter {i}. {TEXT}")
    own: dict[str, Any] = {
        "run": {"seed": 3, "steps": 30},
        "data": {"source": str(tmp_path / "text")},
        "evaluate": {"interval": 4, "patience": 2, "min_delta": 5.0},
        "checkpoint": {"interval": 7},
    }
    results = []
    for name, stops in (("straight", ()), ("stopped", (4, 8))):
        root = tmp_path / name
        root.mkdir()
        config = {key: {**TINY.get(key, {}), **own.get(key, {})} for key in TINY | own}
        config["run"] |= {"root": str(root)}
        resume = None
        for attempt, stop in enumerate((*stops, 0), start=1):
            train_ranks(root, config, world_size=1, attempt=attempt, resume=resume, stop_at=stop)
            if stop:
                (folder,) = root.glob(f"data/a{attempt:06d}/s{stop:09d}-*")
                assert json.loads((folder / "rank-00000.json").read_text())["state"]["best_step"] == 4
                resume = commit(root, str(folder.relative_to(root)))
        results.append(ended(root, config, attempt, 12))
    straight, stopped = results
    assert straight == stopped
    assert (straight["step"], straight["best_step"]) == (12, 4)
    assert straight["stopped_early"].startswith("none of the last 2 evaluations was better than that of step 4 (")
