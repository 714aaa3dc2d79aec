"""The GPT."""

from __future__ import annotations

import pytest
import torch

from keepstep.trainer.config import ModelSection
from keepstep.trainer.models import Gpt, build_model, initial_value, num_parameters

CONFIG = ModelSection(layers=2, width=32, heads=4, context=16, dropout=0.5)


@pytest.fixture
def model() -> Gpt:
    made = build_model(CONFIG, 50)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, 0, CONFIG.layers) * (10 if parameter.ndim > 1 else 1))
    return made.eval()


def test_logits_have_one_row_per_position(model: Gpt) -> None:
    assert model(torch.zeros(3, 7, dtype=torch.int64)).shape == (3, 7, 50)


def test_no_position_sees_a_later_one(model: Gpt) -> None:
    ids = torch.arange(16).view(1, 16)
    changed = ids.clone()
    changed[0, 9:] = 49
    before, after = model(ids), model(changed)
    assert torch.equal(before[0, :9], after[0, :9])
    assert not torch.allclose(before[0, 9:], after[0, 9:])


def test_every_position_sees_all_before_it(model: Gpt) -> None:
    ids = torch.arange(16).view(1, 16)
    changed = ids.clone()
    changed[0, 0] = 49
    differs = (model(ids) - model(changed)).abs().amax(-1)[0]
    assert bool((differs > 0).all())


def test_the_parameters_are_counted_once_with_tied_embeddings(model: Gpt) -> None:
    width, block = 32, 12 * 32 * 32 + 2 * 32
    assert num_parameters(model) == 50 * width + 16 * width + 2 * block + width


def test_dropout_is_on_in_training_alone(model: Gpt) -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_initial_values_follow_from_seed_and_name_alone() -> None:
    shape = torch.Size((8, 4))
    torch.manual_seed(5)
    first = initial_value("a.weight", shape, 1, 2)
    torch.rand(3)
    assert torch.equal(first, initial_value("a.weight", shape, 1, 2))
    assert not torch.equal(first, initial_value("b.weight", shape, 1, 2))
    assert not torch.equal(first, initial_value("a.weight", shape, 2, 2))


def test_what_feeds_the_residual_stream_begins_smaller() -> None:
    shape = torch.Size((200, 200))
    assert float(initial_value("blocks.0.mlp.up.weight", shape, 0, 8).std()) == pytest.approx(0.02, rel=0.05)
    assert float(initial_value("blocks.0.mlp.out.weight", shape, 0, 8).std()) == pytest.approx(0.005, rel=0.05)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model.heads = 3 must divide model.width = 32"):
        build_model(ModelSection(width=32, heads=3), 10)
