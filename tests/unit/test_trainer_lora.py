"""Low-rank adaptation and freezing: what is trained, what the model computes, and what merging leaves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from keepstep.trainer.config import LoraSection, ModelSection, OptimizerSection, TrainSection
from keepstep.trainer.models import LanguageModel, build_model, initial_value, is_lora, merge
from keepstep.trainer.models.lora import linear_layers
from keepstep.trainer.optim import ShardOptimizer

V, T = 40, 8
LORA = LoraSection(rank=3, alpha=6.0)


def made(train: TrainSection | None = None, *, outputs: int = 0, times: float = 4, **fields: Any) -> LanguageModel:
    """With initial values that are larger than at the start of a training, so that what depends on something shows."""
    config = ModelSection(**{"layers": 2, "width": 32, "heads": 4, "context": T, "dropout": 0.0, **fields})
    model = build_model(config, V, outputs=outputs, train=train)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(model, name, parameter.shape, 0) * (times if parameter.ndim > 1 else 1))
    return model.eval()


def some_ids(*shape: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(2))


def trained_names(model: LanguageModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def randomise(model: LanguageModel, seed: int = 5) -> None:
    """B is no longer 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_lora(name):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def step(model: LanguageModel, *, steps: int = 3) -> None:
    optimizer = ShardOptimizer(model, OptimizerSection(lr=0.01))
    model.train()
    for _ in range(steps):
        ids = some_ids(3, T)
        torch.autograd.backward(F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        optimizer.take_gradients()
        assert optimizer.gradient_square() > 0
        optimizer.update(lr=0.01, scale=1.0)
    model.eval()


@pytest.mark.parametrize("kind", ["gpt", "llama", "bert"])
class TestAdaptation:
    @torch.no_grad()
    def test_before_the_first_step_the_outputs_are_those_of_the_model_to_the_bit(self, kind: str) -> None:
        adapted, plain, ids = made(TrainSection(lora=LORA), kind=kind), made(kind=kind), some_ids(2, T)
        assert torch.equal(adapted(ids), plain(ids))

    def test_training_changes_a_and_b_alone(self, kind: str) -> None:
        model = made(TrainSection(lora=LORA), kind=kind)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        step(model)
        changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert changed == {name for name in before if is_lora(name)} == trained_names(model)

    @torch.no_grad()
    def test_merged_it_computes_the_same_and_has_the_names_of_the_model(self, kind: str) -> None:
        model, ids = made(TrainSection(lora=LORA), kind=kind), some_ids(2, T)
        randomise(model)
        expected = model(ids)
        assert not torch.allclose(expected, made(kind=kind)(ids), atol=0.01)
        merge(model)
        torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in made(kind=kind).named_parameters()]
        assert not model.adapters

    def test_the_gradients_are_those_of_the_product(self, kind: str) -> None:
        """d/dA and d/dB from the gradient of the whole weight, by the chain rule, in float64."""
        train = TrainSection(lora=LORA)
        model, ids = made(train, kind=kind).double(), some_ids(2, T)
        randomise(model)
        whole = copy.deepcopy(made(kind=kind)).double()
        with torch.no_grad():
            for name, adapter in model.adapters.items():
                layer = adapter.layer
                added = layer.get_parameter("lora_b") @ layer.get_parameter("lora_a") * 2.0
                whole.get_parameter(f"{name}.weight").copy_(layer.get_parameter("weight") + added)
        for each in (model, whole):
            torch.autograd.backward(F.cross_entropy(each(ids).flatten(0, 1), ids.flatten()))
        for name, adapter in model.adapters.items():
            a, b = adapter.layer.get_parameter("lora_a"), adapter.layer.get_parameter("lora_b")
            gradient = whole.get_parameter(f"{name}.weight").grad
            assert gradient is not None
            torch.testing.assert_close(a.grad, 2.0 * b.detach().T @ gradient)
            torch.testing.assert_close(b.grad, 2.0 * gradient @ a.detach().T)


@given(
    rank=st.integers(1, 8), inputs=st.integers(1, 9), outputs=st.integers(1, 9), alpha=st.floats(0.5, 32), seed=st.integers(0, 2**31 - 1)
)
def test_the_initial_values_are_those_of_the_authors_code(rank: int, inputs: int, outputs: int, alpha: float, seed: int) -> None:
    """A as nn.Linear begins (kaiming_uniform_ with a = sqrt(5)): within 1 / sqrt(inputs); B = 0."""
    model = made(TrainSection(lora=LORA))
    a = initial_value(model, "blocks.0.mlp.up.lora_a", torch.Size((rank, inputs)), seed)
    assert (a.abs() <= inputs**-0.5).all()
    assert (a != 0).any()
    assert not initial_value(model, "blocks.0.mlp.up.lora_b", torch.Size((outputs, rank)), seed).any()


def test_dropout_is_of_what_the_adaptation_is_given_and_in_training_alone() -> None:
    model, ids = made(TrainSection(lora=LoraSection(rank=3, dropout=0.5))), some_ids(2, T)
    randomise(model)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


class TestPeft:
    """Beside peft's own layers, with the same values."""

    @pytest.mark.parametrize("kind", ["gpt", "llama"])
    @torch.no_grad()
    def test_the_outputs_are_those_of_peft(self, kind: str) -> None:
        import peft

        model, ids = made(TrainSection(lora=LORA), kind=kind), some_ids(2, T)
        randomise(model)
        names = list(model.adapters)
        theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=6.0, target_modules=names), copy.deepcopy(made(kind=kind)))
        for name, adapter in model.adapters.items():
            layer = theirs.get_submodule(name)
            layer.lora_A["default"].weight.copy_(adapter.layer.get_parameter("lora_a"))
            layer.lora_B["default"].weight.copy_(adapter.layer.get_parameter("lora_b"))
        torch.testing.assert_close(model(ids), theirs(ids))


class TestWhatIsAdapted:
    def test_the_default_names_the_linear_layers_of_gpt_and_llama(self) -> None:
        assert set(made(TrainSection(lora=LORA)).adapters) == set(linear_layers(made()))
        llama = made(TrainSection(lora=LORA), kind="llama")
        assert {name.rpartition(".")[2] for name in llama.adapters} >= {"q", "out", "up", "gate"}

    def test_patterns_choose(self) -> None:
        model = made(TrainSection(lora=LoraSection(rank=2, layers=("blocks.1.*.out",))))
        assert set(model.adapters) == {"blocks.1.attention.out", "blocks.1.mlp.out"}
        assert model.adapters["blocks.1.mlp.out"].layer.get_parameter("lora_a").shape == (2, 128)

    def test_a_pattern_that_matches_no_layer_is_refused_with_the_layers_there_are(self) -> None:
        with pytest.raises(ValueError, match=r'train.lora.layers: "\*.query" matches no linear layer; they are blocks.0.attention.qkv, '):
            made(TrainSection(lora=LoraSection(rank=2, layers=("*.qkv", "*.query"))))

    def test_the_output_layer_and_the_embedding_are_none_of_them(self) -> None:
        with pytest.raises(ValueError, match='"head" matches no linear layer'):
            made(TrainSection(lora=LoraSection(rank=2, layers=("head",))), tied=False)

    @pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
    def test_recurrent_models_have_none(self, kind: str) -> None:
        with pytest.raises(ValueError, match=f'train.lora.rank = 3: model.kind = "{kind}" has no linear layers that can be adapted'):
            made(TrainSection(lora=LORA), kind=kind)


class TestWhatIsTrained:
    def test_an_output_layer_of_classes_is_trained_beside_the_adaptation(self) -> None:
        model = made(TrainSection(lora=LORA, objective="classes"), outputs=3)
        assert {name for name in trained_names(model) if not is_lora(name)} == {"head.weight"}
        assert model(some_ids(2, T)).shape == (2, T, 3)

    def test_what_begins_with_random_values_is_trained_beside_the_adaptation(self) -> None:
        model = made(TrainSection(lora=LORA, start="x", start_without=("tokens.*",)))
        assert {name for name in trained_names(model) if not is_lora(name)} == {"tokens.weight"}

    def test_what_is_frozen_keeps_its_bits_and_has_no_moments(self) -> None:
        model = made(TrainSection(freeze=("tokens.*", "blocks.0.*")))
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        step(model)
        frozen = {name for name in before if name.startswith(("tokens.", "blocks.0."))}
        assert {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])} == frozen
        assert set(ShardOptimizer(model, OptimizerSection()).state()) == before.keys() - frozen

    def test_a_pattern_that_matches_nothing_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r'train.freeze: "block.\*" matches no parameter; they are tokens.weight, positions.weight, '):
            made(TrainSection(freeze=("tokens.*", "block.*")))

    def test_something_must_be_left_to_train(self) -> None:
        with pytest.raises(ValueError, match=r"train.freeze = \['\*'\] freezes every parameter: nothing is left to train"):
            made(TrainSection(freeze=("*",)))


def test_an_output_layer_of_classes_is_untied_whatever_the_model_is() -> None:
    for kind in ("gpt", "llama", "bert", "lstm"):
        for tied in (True, False):
            model = made(kind=kind, tied=tied, outputs=2)
            assert model.get_parameter(model.output_name).shape == (2, 32)
            assert model(some_ids(3, T)).shape == (3, T, 2)
