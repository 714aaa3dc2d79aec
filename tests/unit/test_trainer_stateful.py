"""State of training scripts: back to the bit, types included, or a TypeError that says where."""

from __future__ import annotations

import collections
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from trainer_ranks import FolderStaging, commit, manifest_of, run_ranks, spec_of

from keepstep.storage.canonical import canonical_json
from keepstep.trainer.attach import Attached
from keepstep.trainer.checkpoint import Checkpointer
from keepstep.trainer.contract import Resume
from keepstep.trainer.matching import CheckpointMismatch
from keepstep.trainer.registry import PARTS, Part, Registry, StateMismatch
from keepstep.trainer.restore import resume
from keepstep.trainer.state import of_rank
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


def test_a_schedule_with_milestones_comes_back() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    schedule = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([parameter], lr=1.0), [3, 3, 7])
    back = through_a_checkpoint(schedule.state_dict())
    assert back == schedule.state_dict()
    assert type(back["milestones"]) is collections.Counter


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
        ({"seen": collections.defaultdict(int)}, r"it\['seen'\] is a defaultdict"),
        ({"weight": torch.nn.Parameter(torch.zeros(1))}, r"it\['weight'\] is a Parameter"),
        ({"a": np.ma.masked_array([1], [True])}, r"it\['a'\] is a MaskedArray"),
        ({"name": np.str_("x")}, r"it\['name'\] is a str_"),
        ({"a": {"b": torch.zeros(MAX_BYTES + 1, dtype=torch.uint8)}}, r"it\['a'\]\['b'\] has 1048577 bytes.*belongs among the tensors"),
    ],
    ids=["set", "generator", "objects", "defaultdict", "parameter", "masked", "str_", "large"],
)
def test_what_cannot_be_kept_is_named_by_its_place(value: Any, where: str) -> None:
    with pytest.raises(TypeError, match=where):
        to_json(value, "it")


def test_an_ordered_dict_keeps_its_order() -> None:
    assert list(through_a_checkpoint(collections.OrderedDict(b=1, a=2)).items()) == [("b", 1), ("a", 2)]


@pytest.mark.parametrize("value", [{"$what": 1}, {"$tensor": ["float32", [3], "AAAA"]}, {"$bytes": "x"}, {"$tuple": 3}])
def test_a_malformed_state_is_refused_before_anything_changes(value: Any) -> None:
    part = stateful("loader", Loader(0), per_rank=True, elsewhere=lambda states: "")
    first: list[Any] = []
    for world_size in (2, 3):
        mine = Registry(rank=0, world_size=world_size)
        mine.add(Part(name="first", capture=lambda: 0, restore=first.append), part)
        bad = {PARTS: {"first": 0, "loader": value}}
        with pytest.raises(StateMismatch, match="loader differs"):
            mine.restore([bad, bad])
    assert not first


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


def queue(rank: int, filled: bool) -> dict[str, Any]:
    """A tensor that is replicated, and one that each rank has of its own."""
    own = torch.full((3,), float(rank)) if filled else torch.full((3,), -1.0)
    return {"model": {"weight": torch.ones(2)}, "queue": of_rank(rank, {"items": own})}


def save_own(rank: int, world_size: int, root: str) -> None:
    dist.init_process_group("gloo")
    staging = FolderStaging(Path(root), attempt=1, rank=rank, world_size=world_size)
    assert Checkpointer(staging, rank=rank, attempt=1, nonce="nonce1").save(4, queue(rank, filled=True), {})


def load_own(rank: int, world_size: int, root: str, resume_: Resume, error: str) -> None:
    dist.init_process_group("gloo")
    me, tensors = Attached(spec_of(Path(root), rank, 2, resume_)), queue(rank, filled=False)
    me.__dict__["staging"] = None
    if error:
        with pytest.raises(CheckpointMismatch, match=error):
            resume(me, tensors)
        return
    assert resume(me, tensors).step == 4
    assert tensors["queue"][f"rank-{rank:05d}"]["items"].tolist() == [rank] * 3


@pytest.mark.slow
def test_a_tensor_of_each_rank_has_its_rank_in_its_name_and_loads_in_as_many_ranks_only(tmp_path: Path) -> None:
    run_ranks(2, save_own, str(tmp_path))
    (folder,) = tmp_path.glob("data/a000001/*")
    made = commit(tmp_path, str(folder.relative_to(tmp_path)))
    assert {entry.name for rank in manifest_of(tmp_path, made).ranks for entry in rank.tensors} == {
        "model.weight",
        "queue.rank-00000.items",
        "queue.rank-00001.items",
    }
    run_ranks(2, load_own, str(tmp_path), made, "")
    run_ranks(1, load_own, str(tmp_path), made, "1 not in this model: queue.rank-00001.items")


def save_shared(rank: int, world_size: int, root: str) -> None:
    dist.init_process_group("gloo")
    staging = FolderStaging(Path(root), attempt=1, rank=rank, world_size=world_size)
    with pytest.raises(ValueError, match=r"ranks 0 and 1 have different values of model\.statistics, .* keep each under state\.of_rank"):
        Checkpointer(staging, rank=rank, attempt=1, nonce="n").save(
            4, {"model": {"weight": torch.ones(2), "statistics": torch.full((2,), float(rank))}}, {}
        )


@pytest.mark.slow
def test_different_values_under_one_name_are_refused_before_one_of_them_is_kept(tmp_path: Path) -> None:
    run_ranks(2, save_shared, str(tmp_path))
