"""float16: the scale of the loss, and steps that nobody applies."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import trainer_ranks
from hypothesis import given
from hypothesis import strategies as st
from trainer_ranks import TINY, commit, run_ranks

from keepstep.trainer import scaler
from keepstep.trainer.contract import Resume
from keepstep.trainer.scaler import CEILING, FLOOR, INITIAL, LossScaler

STEPS = 8
TOO_HIGH = 2.0**22  # the first steps of the tiny model overflow at it, later ones do not


def fp16(**state: Any) -> LossScaler:
    made = LossScaler.of("fp16")
    for name, value in state.items():
        setattr(made, name, value)
    return made


@given(st.lists(st.booleans(), max_size=200), st.integers(1, 5))
def test_the_scale_is_a_power_of_two_within_its_bounds_whatever_happens(overflows: list[bool], growth_steps: int) -> None:
    it = fp16(growth_steps=growth_steps)
    for overflowed in overflows:
        it.stepped(overflowed=overflowed)
        assert FLOOR <= it.scale <= CEILING
        assert math.frexp(it.scale)[0] == 0.5
        assert 0 <= it.applied < growth_steps


def test_an_overflow_halves_it_and_enough_applied_steps_double_it() -> None:
    it, scales = fp16(growth_steps=3), []
    for overflowed in (True, False, False, True, False, False, False, False):
        it.stepped(overflowed=overflowed)
        scales.append(it.scale / INITIAL)
    assert scales == [0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.5, 0.5]


def test_only_gradients_that_a_smaller_scale_could_help_are_an_overflow() -> None:
    assert fp16().overflows(2.0, math.nan)
    assert not fp16().overflows(2.0, 3.0)
    assert not fp16().overflows(math.inf, math.nan)  # a bad step, and the guard's
    assert not fp16(scale=FLOOR).overflows(2.0, math.nan)
    assert not LossScaler.of("fp32").overflows(2.0, math.nan)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_have_none(precision: str) -> None:
    it = LossScaler.of(precision)
    it.stepped(overflowed=False)
    assert (it.scale, it.part().capture()) == (1.0, None)


def test_another_precision_than_before_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="keepstep.trainer"):
        fp16().part().restore(None)
        LossScaler.of("fp32").part().restore({"scale": 8.0, "applied": 1})
    assert caplog.messages == [
        "the loss was not scaled before, it is multiplied with 65536 from here on",
        "the loss was multiplied with 8 before, it is not scaled from here on",
    ]


def train_from(rank: int, world_size: int, config: dict[str, Any], attempt: int, resume: Resume | None) -> None:
    scaler.INITIAL = TOO_HIGH  # type: ignore[misc]
    trainer_ranks._train(rank, world_size, config["run"]["root"], config, attempt, resume, 0, "")


def records_in(root: Path) -> dict[int, dict[str, Any]]:
    records = map(json.loads, (root / "records.jsonl").read_text().splitlines())
    return {record["step"]: record for record in records if "step" in record}


def state_of(root: Path, attempt: int, rank: int) -> dict[str, Any]:
    (path,) = root.glob(f"data/a{attempt:06d}/s{STEPS:09d}-*/rank-{rank:05d}.json")
    state: dict[str, Any] = json.loads(path.read_text())["state"]
    return state


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True], ids=["fsdp", "exact"])
def test_a_step_that_overflows_is_applied_by_nobody_and_a_restart_changes_nothing(tmp_path: Path, exact: bool) -> None:
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / f"text/{i}.txt").write_text(f"Book {i}. " + "It was the best of times, it was the worst of times. " * 30)
    config = TINY | {
        "data": TINY["data"] | {"source": str(tmp_path / "text")},
        "train": TINY["train"] | {"precision": "fp16"},
        "run": {"root": str(tmp_path), "steps": STEPS},
        "checkpoint": {"interval": 2},
        "cluster": {"exact_reduction": exact, "logical_ranks": 2 if exact else 0},
    }
    run_ranks(2, train_from, config, 1, None)
    straight = records_in(tmp_path)
    overflowed = [step for step, record in straight.items() if record["grad_norm"] is None]
    assert overflowed == list(range(1, len(overflowed) + 1))
    assert 2 < len(overflowed) < STEPS - 1
    scales = [straight[step]["loss_scale"] for step in sorted(straight)]
    last = len(overflowed)
    assert scales == [TOO_HIGH / 2 ** min(step, last) for step in range(STEPS)]
    norms = [straight[step]["param_norm"] for step in sorted(straight)]
    assert len(set(norms[: last + 1])) == 1  # step n's norm is that before its update
    assert len(set(norms[last:])) == STEPS - last
    ends = [state_of(tmp_path, 1, rank) for rank in range(2)]
    assert [end["parts"]["scaler"] for end in ends] == [{"scale": scales[-1], "applied": STEPS - last}] * 2

    (folder,) = tmp_path.glob("data/a000001/s000000002-*")  # in the middle of the overflows
    (tmp_path / "records.jsonl").unlink()
    run_ranks(2, train_from, config, 2, commit(tmp_path, str(folder.relative_to(tmp_path))))
    resumed = records_in(tmp_path)
    for record in (*straight.values(), *resumed.values()):
        del record["seconds"], record["tokens_per_s"], record["trained_s"]
    assert resumed == {step: record for step, record in straight.items() if step > 2}
    assert [state_of(tmp_path, 2, rank) for rank in range(2)] == ends
