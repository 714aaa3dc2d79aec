"""How a rank ended, from its exit code and from what it wrote about its error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keepstep.orchestrator.exits import Exit, explain, write_error

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


def test_an_error_that_was_cut_off_explains_nothing(tmp_path: Path) -> None:
    path = tmp_path / "error-0.json"
    path.write_text('{"kind": "exc')
    assert explain(-9, str(path)).why == "SIGKILL"
