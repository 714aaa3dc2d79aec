"""What `keepstep replay` says of a comparison, and how wide its tables are."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from keepstep.orchestrator import replaycommand
from keepstep.orchestrator.errors import InputError
from keepstep.orchestrator.replaycommand import Asked, fitting

HEADS = ("parameter", "norm", "mean", "gradient norm")
ROWS = [("blocks.10.attention.qkv.weight", "1.23e+04", "-1.11e-05", "1.5"), ("norm.weight", "3", "0", "0.25")]


def drawn(width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(fitting(HEADS, ROWS, ("parameter", "norm", "gradient norm"), width))
    return out.getvalue()


def said(**report: Any) -> str:
    same = {"loss": {"computed": None}, "first_difference": None, "checked": "bits of the loss", "rejected_then": "", "step": 5}
    lines: list[str] = []
    replaycommand._print_comparison(lines.append, same | report)
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("width", "there", "gone"),
    [
        (80, ("mean", "gradient"), ()),
        (58, ("norm", "gradient"), ("mean",)),
        (50, ("norm",), ("mean", "gradient")),
        (40, ("norm",), ("mean",)),
    ],
)
def test_a_narrow_terminal_gets_fewer_columns_and_whole_figures(width: int, there: tuple[str, ...], gone: tuple[str, ...]) -> None:
    shown = drawn(width)
    assert all(word in shown for word in (*there, "1.23e+04"))
    assert not any(word in shown for word in gone)
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width


def test_a_step_without_a_record_is_not_called_checked() -> None:
    assert said(steps_compared=3, step_compared=True) == "checked: bits of the loss, equal in all 3 steps"
    assert said(steps_compared=1, step_compared=True) == "checked: bits of the loss, equal"
    lost = (
        "NOT CHECKED: the record of step 5 was lost with its node, or never written. 3 steps on the way: bits of the loss, equal in all 3"
    )
    assert said(steps_compared=3, step_compared=False).startswith(lost)
    assert said(steps_compared=0, step_compared=False).startswith("NOT CHECKED: compared with nothing")


def test_a_folder_for_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="--out x: nothing would be written"):
        replaycommand.replay(Asked(root="r", step=1, out="x"))
