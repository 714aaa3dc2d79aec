"""Every architecture by the same rules, and each beside the library that people know it from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keepstep.trainer.config import ModelSection
from keepstep.trainer.models import KINDS, LanguageModel, Memory, build_model, initial_value, num_parameters
from keepstep.trainer.models.names import foreign_name, is_transposed

V, T = 50, 12
VARIANTS: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in KINDS},
    "gpt2": {"kind": "gpt", "bias": True, "activation": "gelu_tanh"},
    "llama, grouped queries": {"kind": "llama", "kv_heads": 2, "tied": False},
    "lstm, untied": {"kind": "lstm", "tied": False},
}
CAUSAL = [name for name, fields in VARIANTS.items() if fields["kind"] != "bert"]


def made(name: str, *, times: float = 8, **fields: Any) -> LanguageModel:
    """Weights far larger than at the start of a training: what depends on something shows."""
    config = ModelSection(**{"layers": 2, "width": 32, "heads": 4, "context": 16, "dropout": 0.0, **VARIANTS[name], **fields})
    model = build_model(config, V)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            vector = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(
                initial_value(model, key, parameter.shape, 0) * (times if parameter.ndim > 1 else 1) + vector * (parameter.ndim == 1)
            )
    return model.eval()


def some_ids(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", VARIANTS)
class TestEach:
    def test_logits_have_one_row_per_position(self, name: str) -> None:
        assert made(name)(some_ids(3, T)).shape == (3, T, V)

    @torch.no_grad()
    def test_every_position_sees_all_before_it_and_only_an_encoder_those_behind_it(self, name: str) -> None:
        model, ids = made(name), some_ids(1, T)
        before = model(ids)
        for changed in (0, T // 2, T - 1):
            other = ids.clone()
            other[0, changed] = (other[0, changed] + 1) % V
            differs = (model(other) != before).any(dim=-1)[0]
            assert differs[changed:].all()
            assert bool(differs[:changed].all()) if not model.is_causal else not differs[:changed].any()

    @torch.no_grad()
    def test_samples_do_not_see_each_other(self, name: str) -> None:
        model, ids = made(name).double(), some_ids(3, T)
        for row in range(3):
            torch.testing.assert_close(model(ids)[row], model(ids[row : row + 1])[0])

    @torch.no_grad()
    def test_dropout_is_on_in_training_alone(self, name: str) -> None:
        model, ids = made(name, dropout=0.3), some_ids(2, T)
        assert torch.equal(model(ids), model(ids))
        model.train()
        assert not torch.equal(model(ids), model(ids))

    def test_the_gradient_is_that_of_finite_differences(self, name: str) -> None:
        """In float64, along random directions through all parameters at once, and along that of the gradient itself."""
        model, ids, targets = made(name, layers=1, width=8, heads=4).double(), some_ids(2, 5), some_ids(2, 5, seed=3)
        loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        generator = torch.Generator().manual_seed(4)
        directions = [[torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in gradients] for _ in range(3)] + [list(gradients)]
        for direction in directions:
            expected = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
            found = (_moved(model, direction, 1e-5, ids, targets) - _moved(model, direction, -1e-5, ids, targets)) / 2e-5
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-8)

    def test_it_learns_one_batch_by_heart(self, name: str) -> None:
        model, generator = made(name, times=1), torch.Generator().manual_seed(3)
        ids = torch.randperm(V, generator=generator)[: 3 * (T + 1)].view(3, T + 1)  # no row begins like another
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        inputs, targets = (ids[:, :-1], ids[:, 1:]) if model.is_causal else (ids[:, :-1], ids[:, :-1])
        model.train()
        for _ in range(450):
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert float(loss.detach()) < 0.02

    def test_initial_values_follow_from_seed_and_name_alone(self, name: str) -> None:
        model = made(name)
        key, parameter = next((key, each) for key, each in model.named_parameters() if each.ndim > 1)
        torch.manual_seed(5)
        first = initial_value(model, key, parameter.shape, 1)
        torch.rand(3)
        assert torch.equal(first, initial_value(model, key, parameter.shape, 1))
        assert not torch.equal(first, initial_value(model, f"{key}x", parameter.shape, 1))
        assert not torch.equal(first, initial_value(model, key, parameter.shape, 2))


def _moved(model: nn.Module, direction: list[Tensor], by: float, ids: Tensor, targets: Tensor) -> float:
    """The loss with all parameters moved."""
    parameters = {key: each + by * d for (key, each), d in zip(model.named_parameters(), direction, strict=True)}
    with torch.no_grad():
        return float(F.cross_entropy(torch.func.functional_call(model, parameters, ids).flatten(0, 1), targets.flatten()))


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("cuts", [(T,), (1,) * T, (5, 1, 6), (1, 4, 7)])
@torch.no_grad()
def test_tokens_one_after_the_other_give_what_all_at_once_give(name: str, cuts: tuple[int, ...]) -> None:
    """In float64: weights as large as these make much of a last bit."""
    model, ids, memory = made(name).double(), some_ids(2, T), Memory()
    parts = [model(part, memory) for part in ids.split(list(cuts), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=1e-5, rtol=1e-5)
    assert memory.length == T


def test_the_parameters_are_counted_once_with_tied_embeddings() -> None:
    per_block = 4 * 32 * 32 + 8 * 32 * 32 + 2 * 32
    assert num_parameters(made("gpt")) == V * 32 + 16 * 32 + 2 * per_block + 32
    assert num_parameters(made("lstm, untied")) == 2 * V * 32 + 2 * (2 * 4 * 32 * 32 + 2 * 4 * 32)


class TestInitialValues:
    def test_what_feeds_the_residual_stream_begins_smaller(self) -> None:
        model, shape = made("gpt", layers=8), torch.Size((200, 200))
        assert float(initial_value(model, "blocks.0.mlp.up.weight", shape, 0).std()) == pytest.approx(0.02, rel=0.05)
        assert float(initial_value(model, "blocks.0.mlp.out.weight", shape, 0).std()) == pytest.approx(0.005, rel=0.05)

    def test_norms_begin_at_one_and_biases_at_nought(self) -> None:
        model = made("gpt2")
        values = {key: initial_value(model, key, each.shape, 0) for key, each in model.named_parameters() if each.ndim == 1}
        assert {key.rpartition(".")[2]: set(value.tolist()) for key, value in values.items() if "norm" in key} == {
            "weight": {1.0},
            "bias": {0.0},
        }
        assert all(set(value.tolist()) == {0.0} for key, value in values.items() if "norm" not in key)

    def test_an_lstm_begins_by_remembering(self) -> None:
        model = made("lstm")
        bias = initial_value(model, "blocks.0.from_input.bias", torch.Size((4 * 32,)), 0)
        assert bias.tolist() == [0.0] * 32 + [1.0] * 32 + [0.0] * 64


class TestRefusals:
    def test_heads_that_do_not_divide_the_width(self) -> None:
        with pytest.raises(ValueError, match=r"model.heads = 3 must divide model.width = 32"):
            build_model(ModelSection(width=32, heads=3), 10)

    def test_key_value_heads_that_do_not_divide_the_heads(self) -> None:
        with pytest.raises(ValueError, match=r"model.kv_heads = 3 must divide model.heads = 4"):
            build_model(ModelSection(kind="llama", kv_heads=3), 10)


@pytest.mark.parametrize(("kind", "module"), [("rnn", nn.RNN), ("lstm", nn.LSTM), ("gru", nn.GRU)])
@torch.no_grad()
def test_recurrent_layers_are_torchs(kind: str, module: Callable[..., nn.RNNBase]) -> None:
    model, ids = made(kind), some_ids(3, T)
    theirs = module(32, 32, num_layers=2, batch_first=True)
    for layer, block in enumerate(model.blocks):
        for part, name in ((block.from_input, "ih"), (block.from_state, "hh")):  # type: ignore[union-attr]
            getattr(theirs, f"weight_{name}_l{layer}").copy_(part.weight)  # type: ignore[union-attr]
            getattr(theirs, f"bias_{name}_l{layer}").copy_(part.bias)  # type: ignore[union-attr]
    torch.testing.assert_close(model(ids), F.linear(theirs(model.tokens(ids))[0], model.tokens.weight))


def foreign_weights(kind: str, model: LanguageModel) -> dict[str, Tensor]:
    """By transformers' names, in its shapes."""
    named = model.named_parameters()
    return {foreign_name(kind, name): value.T if is_transposed(kind, name) else value for name, value in named}


@torch.no_grad()
def test_gpt2_is_that_of_transformers() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model, ids = made("gpt2"), some_ids(3, T)
    config = GPT2Config(
        vocab_size=V,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    weights = foreign_weights("gpt", model) | {"lm_head.weight": model.tokens.weight}
    reference = GPT2LMHeadModel(config).eval()
    reference.load_state_dict(weights)
    torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_llama_is_that_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model, ids = made("llama, grouped queries", inside=80), some_ids(3, T)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    weights = foreign_weights("llama", model)
    reference = LlamaForCausalLM(config).eval()
    reference.load_state_dict(weights)
    torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-5, rtol=1e-5)
