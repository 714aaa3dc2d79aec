"""Perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from keepstep.trainer.config import ModelSection
from keepstep.trainer.evaluate import Evaluation, evaluate
from keepstep.trainer.models import build_model, initial_value
from keepstep.trainer.tokens import TokenArray

VOCABULARY = 11
TEXT = np.random.default_rng(0).integers(0, VOCABULARY, 150).astype(np.uint16)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    made = build_model(ModelSection(layers=1, width=16, heads=2, context=8, dropout=0.5), VOCABULARY)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, 0, 1) * (20 if parameter.ndim > 1 else 1))
    return made


@dataclass
class OneByOne:
    rank: int
    size: int
    rows: list[Sequence[float]]
    device = torch.device("cpu")

    def gather(self, row: Sequence[float]) -> Tensor:
        self.rows.append(row)
        return torch.tensor(self.rows if len(self.rows) == self.size else [[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)


def measured(model: nn.Module, world_size: int, max_tokens: int = 10**6, text: TokenArray = TEXT) -> Evaluation:
    """All ranks one after the other; the last one sees the rows of all."""
    rows: list[Sequence[float]] = []
    for rank in range(world_size):
        result = evaluate(model, text, context=8, max_tokens=max_tokens, company=OneByOne(rank, world_size, rows))
    return result


@torch.no_grad()
def by_hand(model: nn.Module, count: int) -> float:
    model.eval()
    total = 0.0
    for first in range(0, count, 8):
        last = min(first + 8, count)
        logits = model(torch.from_numpy(TEXT[first:last].astype(np.int64))[None])[0]
        log_p = logits.double().log_softmax(-1)
        total -= sum(float(log_p[i, int(TEXT[first + i + 1])]) for i in range(last - first))
    model.train()
    return total / count


@pytest.mark.parametrize("world_size", [1, 2, 3, 40])
def test_every_token_but_the_first_counts_once_on_any_number_of_ranks(model: nn.Module, world_size: int) -> None:
    result = measured(model, world_size)
    assert result.tokens == len(TEXT) - 1
    assert result.nats_per_token == pytest.approx(by_hand(model, len(TEXT) - 1), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nats_per_token))


def test_perplexity_does_not_depend_on_the_number_of_ranks(model: nn.Module) -> None:
    long = np.tile(TEXT, 9)  # five whole batches and a part of one
    assert len({measured(model, world_size, text=long) for world_size in (1, 2, 3, 4, 7)}) == 1


def test_max_tokens_limits_it(model: nn.Module) -> None:
    assert measured(model, 2, max_tokens=21).tokens == 21
    assert measured(model, 2, max_tokens=21).nats_per_token == pytest.approx(by_hand(model, 21), rel=1e-5)


def test_it_draws_no_random_number_and_leaves_the_mode(model: nn.Module) -> None:
    before = torch.get_rng_state()
    model.train()
    measured(model, 1)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_it_gives_a_sign_of_life_before_each_batch(model: nn.Module) -> None:
    signs: list[None] = []
    long = np.tile(TEXT, 4)
    evaluate(model, long, context=8, max_tokens=10**6, company=OneByOne(0, 1, []), alive=lambda: signs.append(None))
    assert len(signs) == math.ceil((len(long) - 1) / 8 / 32)
