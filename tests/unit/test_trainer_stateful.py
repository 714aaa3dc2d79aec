"""State of training scripts: back to the bit, types included, or a TypeError that says where."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keepstep.storage.canonical import canonical_json
from keepstep.trainer.registry import PARTS, Registry, StateMismatch
from keepstep.trainer.stateful import MAX_BYTES, from_json, param_groups, stateful, to_json

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8)
KEYS = st.text(max_size=4) | st.integers() | st.sampled_from(["$tensor", "$"]) | st.tuples(st.integers(), st.text(max_size=2))
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(KEYS, inner, max_size=4)  # type: ignore[arg-type]
    ),
    max_leaves=12,
)


def through_a_checkpoint(value: Any) -> Any:
    return from_json(json.loads(canonical_json(to_json(value, "it"))))


def same(a: Any, b: Any) -> bool:
    """Equal in type and value, floats by their bits; dictionaries in their order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@given(VALUES)
def test_plain_values_come_back_with_their_types_and_order(value: Any) -> None:
    assert same(through_a_checkpoint(value), value)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6, dtype=torch.int64).view(2, 3),
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.empty(0, 3),
        torch.tensor([True, False]),
    ],
    ids=["int64", "bf16 scalar", "empty", "bool"],
)
def test_tensors_come_back(tensor: torch.Tensor) -> None:
    back = through_a_checkpoint({"state": [tensor]})["state"][0]
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(back, tensor)
    back.fill_(0)  # it is the receiver's own


def test_arrays_and_their_scalars_come_back() -> None:
    array = np.arange(4, dtype=">f4").reshape(2, 2)
    back = through_a_checkpoint({"a": array, "s": np.uint64(2**64 - 1)})
    assert back["a"].dtype == array.dtype
    assert np.array_equal(back["a"], array)
    assert type(back["s"]) is np.uint64
    assert back["s"] == 2**64 - 1


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"queue": [1, {3}]}, r"it\['queue'\]\[1\] is a set"),
        ({"gen": torch.Generator()}, r"it\['gen'\] is a Generator"),
        ({"a": np.array(["x"], dtype=object)}, r"it\['a'\] is a ndarray"),
        ({"a": {"b": torch.zeros(MAX_BYTES + 1, dtype=torch.uint8)}}, r"it\['a'\]\['b'\] has 1048577 bytes.*belongs among the tensors"),
    ],
    ids=["set", "generator", "objects", "large"],
)
def test_what_cannot_be_kept_is_named_by_its_place(value: Any, where: str) -> None:
    with pytest.raises(TypeError, match=where):
        to_json(value, "it")


class Loader:
    """As torchdata's: it yields the numbers of its rank, shuffled by a generator of its own, and can say where it is."""

    def __init__(self, rank: int) -> None:
        self.generator = torch.Generator().manual_seed(rank)
        self.drawn = 0

    def draw(self) -> int:
        self.drawn += 1
        return int(torch.randint(1000, (1,), generator=self.generator))

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]
        self.generator.set_state(state["generator"])


def of_ranks(*loaders: Loader) -> list[dict[str, Any]]:
    return [{PARTS: {"loader": stateful("loader", loader).capture()}} for loader in loaders]


def registry(loader: Loader, *, rank: int, world_size: int, **options: Any) -> Registry:
    made = Registry(rank=rank, world_size=world_size)
    made.add(stateful("loader", loader, per_rank=True, **options))
    return made


def test_a_loader_of_each_rank_goes_on_where_it_was() -> None:
    loaders = [Loader(0), Loader(1)]
    for loader in loaders:
        loader.draw()
    saved = of_ranks(*loaders)
    expected = [[loader.draw() for _ in range(3)] for loader in loaders]
    resumed = [Loader(7), Loader(8)]
    for rank, loader in enumerate(resumed):
        registry(loader, rank=rank, world_size=2).restore(saved)
    assert [[loader.draw() for _ in range(3)] for loader in resumed] == expected


def test_another_number_of_ranks_is_refused_unless_the_script_says_what_to_do() -> None:
    saved, loader = of_ranks(Loader(0), Loader(1)), Loader(3)
    with pytest.raises(StateMismatch, match="loader differs: every rank has its own"):
        registry(loader, rank=0, world_size=1).restore(saved)

    def merged(states: Sequence[dict[str, Any]]) -> str:
        loader.drawn = sum(state["drawn"] for state in states) + 100
        return "the loader goes on behind both"

    registry(loader, rank=0, world_size=1, elsewhere=merged).restore(saved)
    assert loader.drawn == 100


def optimizer(lr: float) -> torch.optim.Optimizer:
    weight = torch.nn.Parameter(torch.ones(2))
    return torch.optim.AdamW([{"params": [weight]}, {"params": [], "weight_decay": lr / 2}], lr=lr, betas=(lr, 0.9))


def test_a_group_without_parameters_keeps_its_hyper_parameters() -> None:
    trained, fresh = optimizer(0.5), optimizer(0.1)
    trained.param_groups[1]["lr"] = 0.25
    mine = Registry(rank=0, world_size=1)
    mine.add(param_groups(fresh))
    mine.restore([{PARTS: {"optimizer": json.loads(canonical_json(param_groups(trained).capture()))}}])
    told = [{key: value for key, value in group.items() if key != "params"} for group in fresh.param_groups]
    assert told == [{key: value for key, value in group.items() if key != "params"} for group in trained.param_groups]
    assert (told[1]["lr"], told[1]["weight_decay"], told[1]["betas"]) == (0.25, 0.25, (0.5, 0.9))
    assert fresh.param_groups[0]["params"]


def test_another_number_of_groups_is_refused() -> None:
    mine = Registry(rank=0, world_size=1)
    mine.add(param_groups(optimizer(0.1)))
    with pytest.raises(StateMismatch, match="optimizer differs: it had 0 groups of parameters, here are 2"):
        mine.restore([{PARTS: {"optimizer": []}}])
