"""How a rank ended, from its exit code and from what it wrote about its error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keepstep.orchestrator.exits import Exit, explain, write_error
from keepstep.orchestrator.wire import RankReport

ERROR = {"kind": "exception", "why": "ValueError: bad batch", "damaged": ""}


@pytest.mark.parametrize(
    ("code", "error", "found"),
    [
        (0, None, Exit(0, "", "", "")),
        (-9, None, Exit(-9, "signal", "SIGKILL", "")),
        (3, None, Exit(3, "exit", "exit code 3", "")),
        (1, ERROR, Exit(1, "exception", "ValueError: bad batch", "")),
        (-9, ERROR, Exit(-9, "exception", "ValueError: bad batch", "")),
    ],
    ids=["well", "killed", "left", "raised", "raised, and was killed on its way out"],
)
def test_what_a_rank_wrote_about_its_error_explains_more_than_its_exit_code(
    tmp_path: Path, code: int, error: dict[str, str] | None, found: Exit
) -> None:
    path = tmp_path / "error-0.json"
    if error:
        path.write_text(json.dumps(error))
    assert explain(code, str(path)) == found


class Refused(ArithmeticError):
    kind, step, ranks, skips = "bad-step", 12, (2,), ("96:98",)


def test_a_refused_step_tells_what_to_leave_out(tmp_path: Path) -> None:
    path = tmp_path / "error-0.json"
    write_error(path, Refused("step 12: the loss of rank 2 is nan"))
    why = "Refused: step 12: the loss of rank 2 is nan"
    assert explain(1, str(path)) == Exit(1, "bad-step", why, "", bad_step=12, bad_ranks=(2,), skips=("96:98",))


def test_a_script_may_refuse_a_step_without_saying_which(tmp_path: Path) -> None:
    error = ArithmeticError("no")
    error.kind = "bad-step"  # type: ignore[attr-defined]
    path = tmp_path / "error-0.json"
    write_error(path, error)
    assert explain(1, str(path)) == Exit(1, "bad-step", "ArithmeticError: no", "")


@pytest.mark.parametrize(
    "attributes",
    [
        {"skips": None},
        {"skips": [(1, 2)]},
        {"skips": "1:2"},
        {"skips": ("2:1",)},
        {"skips": {"1:2"}},
        {"ranks": 0},
        {"ranks": ("0",)},
        {"ranks": None},
        {"step": None},
        {"step": 3.5},
        {"step": True},
        {"step": 10**5000},
    ],
)
def test_a_refused_step_that_nobody_can_read_is_an_exception(tmp_path: Path, attributes: dict[str, object]) -> None:
    error = Refused("no")
    for name, value in attributes.items():
        setattr(error, name, value)
    path = tmp_path / "error-0.json"
    write_error(path, error)
    assert explain(1, str(path)) == Exit(1, "exception", "Refused: no", "")


@pytest.mark.parametrize("kind", [5, None, object(), ["bad-step"]])
def test_a_kind_that_is_no_text_is_none(tmp_path: Path, kind: object) -> None:
    error = ArithmeticError("half \udc80 a pair")
    error.kind = kind  # type: ignore[attr-defined]
    path = tmp_path / "error-0.json"
    write_error(path, error)
    found = explain(1, str(path))
    assert found == Exit(1, "exception", "ArithmeticError: half ? a pair", "")
    report = RankReport(rank=0, local_rank=0, pid=1, state="exited", exit_code=1, kind=found.kind, why=found.why)
    assert RankReport.model_validate_json(report.model_dump_json()) == report


def test_what_another_version_wrote_is_read_with_care(tmp_path: Path) -> None:
    path = tmp_path / "error-0.json"
    path.write_text(json.dumps({"kind": "bad-step", "why": "w", "damaged": "", "bad_step": 3, "bad_ranks": [0], "skips": [4]}))
    assert explain(1, str(path)) == Exit(1, "exception", "w", "")


def test_an_error_that_was_cut_off_explains_nothing(tmp_path: Path) -> None:
    path = tmp_path / "error-0.json"
    path.write_text('{"kind": "exc')
    assert explain(-9, str(path)).why == "SIGKILL"
