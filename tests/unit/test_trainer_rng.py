"""Random streams: exactly back, or not at all."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch

from keepstep.trainer import rng
from keepstep.trainer.registry import PARTS, Part, Registry, StateMismatch


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


DEVICE = torch.arange(16, dtype=torch.uint8)  # the state of a CUDA device's generator


@pytest.mark.parametrize(
    ("there", "here", "sentence"),
    [
        (DEVICE, None, "it holds the stream of a CUDA device, and this process has none"),
        (None, DEVICE, "it was saved by a process without CUDA, and this one computes on a CUDA device"),
        (DEVICE[:8], DEVICE, "has 8 bytes, here they have 16"),
    ],
)
def test_a_stream_of_a_device_goes_on_only_on_a_device(
    monkeypatch: pytest.MonkeyPatch, there: torch.Tensor | None, here: torch.Tensor | None, sentence: str
) -> None:
    monkeypatch.setattr(rng, "_cuda_state", lambda: there)
    saved = rng.capture()
    monkeypatch.setattr(rng, "_cuda_state", lambda: here)
    with pytest.raises(rng.RngMismatch, match=sentence):
        rng.restore(saved)


def test_a_rank_keeps_the_stream_of_its_own_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """So 2 nodes of 4 devices go on as 1 of 8."""
    devices = [DEVICE + number for number in range(4)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: devices[device])
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: devices)
    saved = json.loads(json.dumps(rng.capture()))

    devices = [torch.zeros_like(DEVICE) for _ in range(8)]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 6)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: devices[device].copy_(state))
    rng.restore(saved)
    assert [int(device[0]) for device in devices] == [0] * 6 + [2, 0]


def registry(rank: int, world_size: int, parts: list[Part]) -> Registry:
    made = Registry(rank=rank, world_size=world_size)
    made.add(*parts)
    return made


@pytest.mark.parametrize("saved_by", [2, 3])
def test_streams_that_follow_from_the_step_are_made_anew_whatever_ranks_of_another_way_had(
    monkeypatch: pytest.MonkeyPatch, saved_by: int
) -> None:
    """A run that becomes exact, on other devices, at the same and at another number of ranks."""
    states = []
    monkeypatch.setattr(rng, "_cuda_state", lambda: DEVICE)
    for rank in range(saved_by):
        rng.seed_everything(5, 7, rank)
        states.append(registry(rank, saved_by, rng.parts(lambda: "")).state())
    monkeypatch.setattr(rng, "_cuda_state", lambda: None)
    drawn = []
    for rank in range(3):
        registry(rank, 3, rng.derived_parts(lambda: rng.seed_everything(5, 7))).restore(states)
        drawn.append(draw())
    rng.seed_everything(5, 7)
    assert drawn == [draw()] * 3 == [drawn[0]] * 3


MALFORMED: dict[str, list[Any]] = {
    "python": [None, {}, {"version": 3, "words": "AAAA", "gauss": None}, {"version": 9, "words": "", "gauss": None}],
    "numpy": [7, {}, {"name": "MT19937", "keys": "AAAAAA==", "position": 3, "has_gauss": 0, "cached": "0x0p+0"}],
    "torch": [None, 3, "AAAA", "no base64"],
    "dtensor": [7, {}, {"distributes": 3}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in MALFORMED.items() for value in values])
def test_a_malformed_stream_is_refused_before_anything_changes(name: str, value: Any) -> None:
    changed: list[int] = []
    mine = registry(0, 1, [Part(name="first", capture=lambda: 0, restore=changed.append), *rng.parts()])
    state = mine.state()
    state[PARTS][f"rng.{name}"] = value
    with pytest.raises(StateMismatch, match=rf"rng\.{name} differs"):
        mine.restore([state])
    assert not changed


def test_a_position_beside_numpys_numbers_is_refused() -> None:
    saved = rng.capture()
    with pytest.raises(rng.RngMismatch, match="number 700 of 624"):
        rng.restore(saved | {"numpy": saved["numpy"] | {"position": 700}})


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
