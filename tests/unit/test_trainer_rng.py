"""Random streams: exactly back, or not at all."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch

from keepstep.trainer import rng


def draw() -> list[float]:
    return [random.random(), random.gauss(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(1)), float(torch.randn(1))]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    rng.seed_everything(1, 2, 3)


def test_streams_go_on_exactly_where_they_were() -> None:
    draw()  # leaves the second value of gauss and randn in the generators
    saved = json.loads(json.dumps(rng.capture()))
    expected = draw()
    rng.seed_everything(99)
    rng.restore(saved)
    assert draw() == expected


def test_capturing_changes_nothing() -> None:
    assert rng.capture() == rng.capture()


def test_ranks_and_steps_draw_different_numbers() -> None:
    drawn = []
    for facts in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]:
        rng.seed_everything(*facts)
        drawn.append(draw())
    assert len({number for numbers in drawn for number in numbers}) == 4 * len(drawn[0])


@pytest.mark.parametrize("part", sorted(rng.STREAMS))
def test_a_missing_part_refuses_to_load_and_changes_nothing(part: str) -> None:
    saved = rng.capture()
    expected = draw()
    rng.restore(saved)
    with pytest.raises(rng.RngMismatch, match=part):
        rng.restore({key: value for key, value in saved.items() if key != part})
    assert draw() == expected


def test_streams_of_other_devices_refuse_to_load() -> None:
    saved: dict[str, Any] = rng.capture() | {"cuda": ["AAAA"] * 9}
    with pytest.raises(rng.RngMismatch, match="9 CUDA devices"):
        rng.restore(saved)


def test_the_digest_tells_streams_apart() -> None:
    before = rng.digest(rng.capture())
    assert before == rng.digest(rng.capture())
    torch.rand(1)
    assert before != rng.digest(rng.capture())


def test_a_tracker_of_devices_that_are_not_here_refuses_to_load_and_changes_nothing() -> None:
    saved: dict[str, Any] = rng.capture() | {"dtensor": {"distributes": True}}
    expected = draw()
    rng.restore(rng.capture() | {name: value for name, value in saved.items() if name != "dtensor"})
    with pytest.raises(rng.RngMismatch, match="DTensors drew numbers on CUDA devices"):
        rng.restore(saved)
    assert draw() == expected


def test_every_stream_is_a_part_and_comes_out_of_a_state_again() -> None:
    parts = {part.name: part for part in rng.parts()}
    saved = {name: part.capture() for name, part in parts.items()}
    expected = draw()
    rng.restore(rng.streams_in(saved | {"step": 3}))
    assert draw() == expected
    assert [name for name, part in parts.items() if part.per_rank] == ["rng.python", "rng.numpy", "rng.torch", "rng.cuda"]
    assert not any(part.per_rank for part in rng.parts(per_rank=False))
