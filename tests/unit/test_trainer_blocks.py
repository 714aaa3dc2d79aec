"""Blocks whose activations are computed again, and blocks that are compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from trainer_ranks import TINY, run_ranks, spec_of

from keepstep.trainer.attach import Attached
from keepstep.trainer.blocks import check_compiler, equip, in_recomputation, opaque
from keepstep.trainer.config import ModelSection, TrainerConfig
from keepstep.trainer.models import LanguageModel, Memory, build_model
from keepstep.trainer.parallel import initialise
from keepstep.trainer.traceback import activation_statistics

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own, where it compiles

VOCABULARY = 50
KINDS = ("gpt", "bert", "llama", "rnn", "lstm", "gru")


def model_of(kind: str, **settings: Any) -> LanguageModel:
    config = ModelSection.model_validate({"kind": kind, "layers": 3, "width": 32, "context": 16, "dropout": 0.3} | settings)
    model = build_model(config, VOCABULARY)
    initialise(model, seed=1)
    return model


def step(model: LanguageModel) -> tuple[Tensor, dict[str, Tensor | None], Tensor]:
    """(loss, gradients, state of the random stream afterwards)."""
    torch.manual_seed(5)
    ids_BT = torch.randint(VOCABULARY, (4, 16))
    loss = F.cross_entropy(model(ids_BT).flatten(0, 1), ids_BT.roll(-1, 1).flatten())
    torch.autograd.backward(loss)
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}, torch.get_rng_state()


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_changes_no_bit(kind: str) -> None:
    """With dropout: loss, every gradient, and where the random stream stands."""
    loss, gradients, stream = step(model_of(kind))
    model = model_of(kind)
    equip(model, recompute=True, compiled=False)
    again = step(model)
    assert torch.equal(again[0], loss)
    assert torch.equal(again[2], stream)
    assert again[1].keys() == gradients.keys()
    for name, gradient in again[1].items():
        assert gradient is not None
        assert torch.equal(gradient, gradients[name]), name  # type: ignore[arg-type]


def saved_bytes(model: LanguageModel) -> int:
    """What the forward pass keeps for the backward pass, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # so that no other tensor gets its address
        return tensor

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.zeros((4, 16), dtype=torch.long))
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_recomputing_keeps_nothing_of_a_block_but_what_goes_into_it(kind: str) -> None:
    per_block = []
    for recompute in (False, True):
        models = [model_of(kind, layers=layers) for layers in (1, 3)]
        for model in models:
            equip(model, recompute=recompute, compiled=False)
        one, three = map(saved_bytes, models)
        per_block.append((three - one) / 2)
    residual = 4 * 16 * 32 * 4  # (B, T, C) float32
    assert per_block[1] == residual
    assert per_block[0] > 15 * residual


def test_a_block_that_remembers_is_not_called_twice() -> None:
    """The second call would begin with the state that the first one ended with."""
    model = model_of("lstm")
    equip(model, recompute=True, compiled=False)
    memory = Memory()
    ids_BT = torch.zeros((2, 8), dtype=torch.long)
    torch.autograd.backward(model(ids_BT, memory).sum())
    assert memory.length == 8


def test_names_are_those_of_the_plain_model() -> None:
    model = model_of("gpt")
    modules, parameters = [name for name, _ in model.named_modules()], list(model.state_dict())
    equip(model, recompute=True, compiled=True)
    assert [name for name, _ in model.named_modules()] == modules
    assert list(model.state_dict()) == parameters
    assert opaque(model) == ("blocks.0.", "blocks.1.", "blocks.2.")


def test_hooks_see_each_module_once_though_it_is_called_twice() -> None:
    seen = []
    for recompute in (False, True):
        model = model_of("gpt")
        equip(model, recompute=recompute, compiled=False)
        with activation_statistics(model, every=True, gradients=True) as found:
            step(model)
        seen.append(found())
    assert seen[0] == seen[1]
    assert not in_recomputation()


def test_without_gradients_blocks_are_called_as_they_are() -> None:
    model = model_of("gpt").eval()
    equip(model, recompute=True, compiled=True)
    ids_BT = torch.zeros((2, 8), dtype=torch.long)
    with torch.no_grad():
        expected = model_of("gpt").eval()(ids_BT)
        assert torch.equal(model(ids_BT), expected), "nothing is compiled for an evaluation"


@pytest.mark.slow
def test_a_node_without_a_compiler_is_told_what_to_install() -> None:
    command = [sys.executable, "-c", "from keepstep.trainer.blocks import check_compiler; check_compiler()"]
    said = subprocess.run(command, env={**os.environ, "CXX": "no-such-compiler"}, capture_output=True, text=True, check=False)
    assert said.returncode == 1
    missing = 'train.compile = true needs a C++ compiler, and "no-such-compiler" (CXX) is not there: install it on every node, or set'
    assert missing in said.stderr


def test_a_node_without_the_headers_of_python_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    with pytest.raises(ValueError, match=r"needs the headers of Python, and /nowhere/Python.h is not there"):
        check_compiler()


STEPS = 3


def train_compiled(rank: int, world_size: int, root: str, config: Mapping[str, Any], out: str) -> None:
    from torch._dynamo.utils import counters

    from keepstep.trainer.loop import advance
    from keepstep.trainer.parallel import join
    from keepstep.trainer.run import open_run

    parsed = TrainerConfig.model_validate(config)
    me = Attached(spec_of(Path(root), rank, 1, None))
    me.__dict__["staging"] = None
    run = open_run(parsed, me, join(me, train=parsed.train))
    losses = [advance(run, run.share[step]).loss for step in range(1, STEPS + 1)]
    if rank == 0:
        told = {"losses": losses, "inductor": dict(counters["inductor"]), "graph_breaks": sum(counters["graph_break"].values())}
        Path(root, out).write_text(json.dumps(told))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.txt").write_text(f"Chapter {i}. " + "It was a bright cold day in April, and the clocks were striking. " * 30)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("train", [{}, {"tensor_parallel": 2, "activation_checkpointing": True}], ids=["full", "tensor"])
def test_compiled_blocks_train_as_plain_ones_and_a_second_process_compiles_nothing(
    text: Path, tmp_path: Path, train: dict[str, Any]
) -> None:
    """With dropout, on two ranks; layers are looked at in step 1, which must not become part of what is compiled."""
    told = []
    for out, compiled in (("eager.json", False), ("first.json", True), ("second.json", True)):
        config = TINY | {
            "run": {"root": str(tmp_path), "seed": 3, "steps": STEPS},
            "data": TINY["data"] | {"source": str(text)},
            "train": TINY["train"] | train | {"compile": compiled},
        }
        run_ranks(2, train_compiled, str(tmp_path), config, out)
        told.append(json.loads((tmp_path / out).read_text()))
    eager, first, second = told
    assert first["losses"] == pytest.approx(eager["losses"], rel=1e-5)
    assert second["losses"] == first["losses"], "to the bit"
    assert first["graph_breaks"] == 0
    assert first["inductor"]["fxgraph_cache_miss"] > 0
    assert "fxgraph_cache_miss" not in second["inductor"]
    assert second["inductor"]["fxgraph_cache_hit"] > 0
    assert any((tmp_path / "scratch" / "compiled").iterdir())
