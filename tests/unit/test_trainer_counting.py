"""What run.toml alone says of a model's size is what the model has, and does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from keepstep.trainer.config import ModelSection, OptimizerSection
from keepstep.trainer.counting import activation_bytes, gradient_bytes, model_size, state_bytes
from keepstep.trainer.models import build_model, initial_value, num_parameters
from keepstep.trainer.optim import ShardOptimizer

VOCABULARY = 67
SHAPES = [
    {"kind": "gpt"},
    {"kind": "gpt", "bias": True, "tied": False, "inside": 40},
    {"kind": "bert", "bias": True},
    {"kind": "llama"},
    {"kind": "llama", "kv_heads": 2, "tied": False, "bias": True},
    {"kind": "rnn"},
    {"kind": "lstm", "tied": False},
    {"kind": "gru"},
]


def section(**shape: Any) -> ModelSection:
    return ModelSection.model_validate({"layers": 3, "width": 32, "heads": 4, "context": 16, "dropout": 0.0} | shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parameters_and_blocks_are_those_of_the_model(shape: dict[str, Any]) -> None:
    config = section(**shape)
    model, size = build_model(config, VOCABULARY), model_size(config, VOCABULARY)
    assert size.parameters == num_parameters(model)
    assert {num_parameters(block) for block in model.blocks} == {size.block}
    assert gradient_bytes(size.parameters) == 4 * num_parameters(model)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape["kind"] in {"gpt", "llama", "bert"}], ids=str)
def test_operations_are_those_that_torch_counts(shape: dict[str, Any]) -> None:
    config = section(**shape)
    model = build_model(config, VOCABULARY)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(model, name, parameter.shape, 0))
    ids = torch.zeros(2, config.context, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # of the others on a CPU it does not know
        model(ids).sum().backward()
    assert model_size(config, VOCABULARY).flops_per_token * ids.numel() == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "rmsprop", "adagrad"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_checkpoint_holds_parameters_and_moments(kind: str, momentum: float) -> None:
    config = OptimizerSection.model_validate({"kind": kind, "momentum": momentum})
    model = build_model(section(kind="gpt"), VOCABULARY)
    moments = sum(
        tensor.numel() for state in ShardOptimizer(model, config).state().values() for name, tensor in state.items() if name != "step"
    )
    assert state_bytes(num_parameters(model), config) == 4 * (num_parameters(model) + moments)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_kept_for_the_backward_pass_is_estimated_within_a_third(shape: dict[str, Any]) -> None:
    """Compared with what autograd saves; tensors that share memory count once, parameters not at all."""
    config = section(**shape | {"width": 64, "context": 64})
    model = build_model(config, VOCABULARY)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(model, name, parameter.shape, 0))
    of_parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(4, config.context, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(ids)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    estimate = activation_bytes(config, VOCABULARY, 4, element_bytes=4, checkpointing=False)
    logits_bytes = 4 * logits.numel()
    assert loss.isfinite()
    assert estimate - 2 * logits_bytes == pytest.approx(sum(saved.values()), rel=0.34)


def test_checkpointing_keeps_what_goes_into_the_blocks() -> None:
    config = section(kind="llama", layers=32, width=4096, heads=32, context=2048)
    with_it, without = (activation_bytes(config, 32_000, 1, element_bytes=2, checkpointing=on) for on in (True, False))
    assert with_it < without / 4


def test_a_7b_llama_has_the_parameters_that_it_is_known_for() -> None:
    config = section(kind="llama", layers=32, width=4096, heads=32, inside=11008, context=4096, tied=False)
    assert model_size(config, 32_000).parameters == 6_738_415_616
