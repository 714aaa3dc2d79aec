"""`keepstep evaluate`: which checkpoint, and what is shown; the last lines of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keepstep.orchestrator import tools
from keepstep.orchestrator.errors import InputError
from keepstep.orchestrator.screen import summary
from keepstep.storage.layout import checkpoint_directory
from keepstep.storage.records import Attempt, Commit, Quarantine
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store
from keepstep.trainer import evaluate
from keepstep.trainer.trained import commit_of_step

CLASSES = {
    "spam": {"precision": 0.75, "recall": 0.6, "f1": 2 / 3, "predicted": 4, "rows": 5},
    "[bold]ham": {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "predicted": 2, "rows": 1},
}
ENDED: dict[str, Any] = {
    "outcome": "succeeded",
    "step": 16,
    "why": "it ended",
    "attempts": 1,
    "failures": [],
    "lost_steps": 0,
    "goodput": 1.0,
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `evaluate_root` was asked for."""
    calls: list[Any] = []

    def evaluate_root(root: str, **what: Any) -> dict[str, Any]:
        calls.append(what)
        return {"step": 8, "perplexity": 12.34567, "tokens": 99, "bleu_signature": "nrefs:1", "classes": CLASSES}

    monkeypatch.setattr(evaluate, "evaluate_root", evaluate_root)
    monkeypatch.setattr(tools, "open_as_stored", lambda root: None)
    return calls


def shown(capsys: pytest.CaptureFixture[str], *, step: str = "", as_json: bool = False) -> str:
    tools.evaluate_checkpoint("root", step=step, generate=3, partial=[], as_json=as_json)
    return capsys.readouterr().out


@pytest.mark.parametrize(("step", "wanted"), [("", None), ("best", "best"), ("120", 120)])
def test_the_checkpoint_is_the_newest_one_of_a_step_or_the_best(
    asked: list[Any], capsys: pytest.CaptureFixture[str], step: str, wanted: int | str | None
) -> None:
    shown(capsys, step=step)
    assert asked == [{"step": wanted, "partial": [], "generate": 3}]


@pytest.mark.parametrize("step", ["-1", "1.5", "newest"])
def test_another_word_is_refused(asked: list[Any], step: str) -> None:
    with pytest.raises(InputError, match="number of a committed step, or best"):
        tools.evaluate_checkpoint("root", step=step, generate=0, partial=[], as_json=False)
    assert asked == []


def test_figures_stand_below_each_other_and_classes_in_a_table(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys).splitlines()
    assert lines[:4] == ["step: 8", "perplexity: 12.3457", "tokens: 99", "bleu_signature: nrefs:1"]
    (spam,) = (line for line in lines if "spam" in line)
    assert [cell.strip() for cell in spam.split("│") if cell.strip()] == ["spam", "5", "0.7500", "0.6000", "0.6667"]
    assert any("[bold]ham" in line for line in lines)


def test_json_holds_all_of_it(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(shown(capsys, as_json=True))["classes"] == CLASSES


def log_of(root: Path, best_steps: dict[int, int]) -> RunLog:
    """A run with a commit at each step, and the best step as of it."""
    log = RunLog.open(Store.open(root))
    log.open_term(run="r", identity="i", host="h", pid=1)
    log.append(Attempt(term=1, attempt=1, nodes=("n#1",), world_size=1, nonce="n"))
    for step, best_step in best_steps.items():
        directory = checkpoint_directory(1, step, "n")
        log.append(Commit(term=1, attempt=1, step=step, directory=directory, manifest_sha256="0", world_size=1, best_step=best_step))
    return log


def test_the_best_one_is_that_of_the_newest_checkpoint(tmp_path: Path) -> None:
    log = log_of(tmp_path, {4: 4, 8: 8, 12: 8, 16: 8})
    assert [commit_of_step(log.store, wanted).step for wanted in ("best", None, 12)] == [8, 16, 12]
    for step in (16, 12, 8):
        log.append(Quarantine(term=1, directory=checkpoint_directory(1, step, "n"), why="damaged"))
    assert commit_of_step(log.store, "best").step == 4, "as the newest one that is left has it"


def test_of_a_best_one_that_was_never_committed_the_one_before_it_is_taken(tmp_path: Path) -> None:
    assert commit_of_step(log_of(tmp_path, {4: 4, 8: 6, 12: 10}).store, "best").step == 4


@pytest.mark.parametrize("best_steps", [{4: -1}, {4: 2, 8: 6}])
def test_where_no_best_one_is_there_it_is_told(tmp_path: Path, best_steps: dict[int, int]) -> None:
    with pytest.raises(ValueError, match=r"evaluate\.patience"):
        commit_of_step(log_of(tmp_path, best_steps).store, "best")


def test_a_run_that_ended_early_says_why_and_which_step_was_the_best() -> None:
    result = ENDED | {"perplexity": 12.345, "accuracy": 0.25, "f1": None, "best_step": 10, "stopped_early": "none of the last 3 was better"}
    lines = summary(result, 0, 1.0, "runs/x")
    assert "held-out perplexity 12.35, accuracy 0.2500" in lines
    assert "stopped early: none of the last 3 was better" in lines
    assert "best at step 10; its checkpoint stays (--step best)" in lines


def test_a_run_without_figures_says_nothing_of_them() -> None:
    assert not [line for line in summary(ENDED, 0, 1.0, "runs/x") if "held-out" in line or "best" in line]
