"""Evaluation: every target once, the same bits on any number of ranks, and the figures of other libraries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from keepstep.trainer.config import ModelSection
from keepstep.trainer.evaluate import batches, evaluate
from keepstep.trainer.figures import Evaluation
from keepstep.trainer.heldout import Documents, HeldOut, MaskedWindows, Windows
from keepstep.trainer.models import build_model, initial_value
from keepstep.trainer.order import Positions
from keepstep.trainer.samples import IGNORED, ClassSamples, Mask, Rows
from keepstep.trainer.tokenizer import ByteTokenizer
from keepstep.trainer.tokens import Extent, TokenArray

VOCABULARY = 11
CONTEXT = 8
TEXT = np.random.default_rng(0).integers(0, VOCABULARY, 150).astype(np.uint16)
LABELS = ("bad", "fair", "good", "never")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    made = build_model(ModelSection(layers=1, width=16, heads=2, context=CONTEXT, dropout=0.5), VOCABULARY)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(initial_value(made, name, parameter.shape, 0) * (20 if parameter.ndim > 1 else 1))
    return made


@dataclass
class OneByOne:
    """Ranks that follow each other: the last one sees the rows of all."""

    rank: int
    size: int
    rows: list[Sequence[float]] = field(default_factory=list)
    device = torch.device("cpu")

    def gather(self, row: Sequence[float]) -> Tensor:
        self.rows.append(row)
        return torch.tensor(self.rows if len(self.rows) == self.size else [[0.0] * len(row)], dtype=torch.float64)


def windows(text: TokenArray = TEXT, max_tokens: int = 10**6) -> Windows:
    return Windows(text, ByteTokenizer, CONTEXT, max_tokens)


def measured(model: nn.Module, world_size: int, held_out: HeldOut | None = None) -> Evaluation:
    rows: list[Sequence[float]] = []
    for rank in range(world_size):
        company = OneByOne(rank, world_size, rows)
        result = evaluate(model, held_out or windows(), vocabulary=VOCABULARY, top_k=3, company=company)
    return result


@torch.no_grad()
def logits_by_hand(model: nn.Module, count: int = len(TEXT) - 1) -> tuple[Tensor, Tensor]:
    """(logits of each prediction, what came), window by window."""
    model.eval()
    logits = [model(torch.from_numpy(TEXT[i : min(i + CONTEXT, count)].astype(np.int64))[None])[0] for i in range(0, count, CONTEXT)]
    model.train()
    return torch.cat(logits), torch.from_numpy(TEXT[1 : count + 1].astype(np.int64))


def documents_of_classes() -> Documents:
    """70 short documents, each of one of three classes."""
    chance = np.random.default_rng(1)
    lengths = chance.integers(2, CONTEXT + 1, 70)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.uint64)
    tokens = chance.integers(0, VOCABULARY, int(lengths.sum())).astype(np.uint16)
    marks = chance.integers(0, 3, 70).astype(np.uint32)
    samples = ClassSamples(tokens, starts, [Extent(documents=70, tokens=len(tokens))], CONTEXT, marks)
    return Documents(samples, np.arange(70, dtype=np.uint64), LABELS)


def masked() -> MaskedWindows:
    return MaskedWindows(np.tile(TEXT, 3), Mask(7, 0.15, token=10, vocabulary=VOCABULARY, end_of_text=9), CONTEXT, 10**6)


class Classifier(nn.Module):
    """Four columns, from what stands in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, len(LABELS))
        with torch.no_grad():
            self.table.weight.normal_(generator=torch.Generator().manual_seed(3))
            self.table.weight[:, 3] -= 100  # nothing is taken for the last class

    def forward(self, ids_BT: Tensor) -> Tensor:
        logits_BTV: Tensor = (self.table(ids_BT.clamp(min=0)) * (ids_BT >= 0)[:, :, None]).cumsum(1)
        return logits_BTV


@pytest.mark.parametrize("world_size", [1, 2, 3, 40])
def test_every_token_but_the_first_counts_once_on_any_number_of_ranks(model: nn.Module, world_size: int) -> None:
    result = measured(model, world_size)
    logits, targets = logits_by_hand(model)
    assert result.tokens == len(TEXT) - 1
    assert result.nats_per_token == pytest.approx(float(nn.functional.cross_entropy(logits.double(), targets)), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nats_per_token))


@pytest.mark.parametrize("kind", ["next-token", "masked", "classes"])
def test_no_bit_of_any_figure_depends_on_the_number_of_ranks(model: nn.Module, kind: str) -> None:
    """The last batch is smaller than the others, and ranks have unequally many, some of them none."""
    held_out = {"next-token": lambda: windows(np.tile(TEXT, 9)), "masked": masked, "classes": documents_of_classes}[kind]()
    assert held_out.num_rows % 32
    computes = Classifier() if kind == "classes" else model
    alone, *others = (measured(computes, world_size, held_out) for world_size in (1, 2, 3, 4, 7))
    assert alone.tokens > 50
    assert all(other == alone for other in others)


def test_max_tokens_limits_it(model: nn.Module) -> None:
    result = measured(model, 2, windows(max_tokens=21))
    logits, targets = logits_by_hand(model, 21)
    assert result.tokens == 21
    assert result.nats_per_token == pytest.approx(float(nn.functional.cross_entropy(logits.double(), targets)), rel=1e-5)


@pytest.mark.slow
def test_perplexity_and_accuracy_are_those_of_torchmetrics(model: nn.Module) -> None:
    from torchmetrics.functional.classification import multiclass_accuracy
    from torchmetrics.functional.text import perplexity

    result = measured(model, 2)
    logits, targets = logits_by_hand(model)
    assert result.perplexity == pytest.approx(float(perplexity(logits[None].double(), targets[None])), rel=1e-5)
    first, among = (float(multiclass_accuracy(logits, targets, VOCABULARY, average="micro", top_k=k)) for k in (1, 3))
    assert (result.accuracy, result.top_k_accuracy) == (pytest.approx(first), pytest.approx(among))
    assert 0 < result.accuracy < result.top_k_accuracy < 1


@pytest.mark.slow
def test_precision_recall_and_f1_are_those_of_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score, multiclass_precision, multiclass_recall

    model, held_out = Classifier(), documents_of_classes()
    result, rows = measured(model, 2, held_out), held_out.rows(range(70))
    asked = rows.targets != IGNORED
    logits, targets = model(torch.from_numpy(rows.inputs)).detach()[torch.from_numpy(asked)], torch.from_numpy(rows.targets[asked])
    theirs = {"precision": multiclass_precision, "recall": multiclass_recall, "f1": multiclass_f1_score}
    for name, figure in theirs.items():
        assert result.figures()[name] == pytest.approx(float(figure(logits, targets, len(LABELS), average="macro")))
        each = [found[name] for found in result.by_class().values()]
        assert each == pytest.approx(figure(logits, targets, len(LABELS), average="none").tolist())
        assert result.accuracy == pytest.approx(float(figure(logits, targets, len(LABELS), average="micro")))
    assert result.accuracy == pytest.approx(float(multiclass_accuracy(logits, targets, len(LABELS), average="micro")))
    assert result.by_class()["never"] == {"precision": 0, "recall": 0, "f1": 0, "predicted": 0, "rows": 0}


class Same(HeldOut):
    """One row whose targets are given."""

    context, num_rows = 2, 1

    def __init__(self, *targets: int) -> None:
        self._targets = np.array([targets])

    def _rows(self, numbers: Positions) -> Rows:
        return Rows(np.zeros_like(self._targets), self._targets)


class Fixed(nn.Module):
    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.logits.expand(*ids_BT.shape, len(self.logits))


def test_of_equally_likely_tokens_the_first_one_is_the_likeliest() -> None:
    result = evaluate(Fixed(1.0, 2.0, 2.0, 2.0), Same(1, 0), vocabulary=4, top_k=3, company=OneByOne(0, 1))
    assert (result.first, result.top_k) == (1, 1)


def test_where_there_are_fewer_than_k_all_of_them_are_among_the_likeliest() -> None:
    result = evaluate(Fixed(1.0, 2.0), Same(0, 1), vocabulary=2, top_k=5, company=OneByOne(0, 1))
    assert (result.first, result.top_k) == (1, 2)


def test_a_model_that_gives_no_numbers_is_never_right() -> None:
    result = evaluate(Fixed(math.nan, math.nan), Same(0, 1), vocabulary=2, top_k=1, company=OneByOne(0, 1))
    assert (result.first, result.top_k, result.figures()["held_out_nats"]) == (0, 0, None)


def test_where_nothing_is_asked_for_there_are_no_figures() -> None:
    result = evaluate(Fixed(1.0, 2.0), Same(IGNORED, IGNORED), vocabulary=2, top_k=1, company=OneByOne(0, 1))
    assert result.tokens == 0
    assert set(result.figures().values()) == {0, None}


def test_it_draws_no_random_number_and_leaves_the_mode(model: nn.Module) -> None:
    before = torch.get_rng_state()
    model.train()
    measured(model, 1)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_it_gives_a_sign_of_life_before_each_batch(model: nn.Module) -> None:
    signs: list[None] = []
    long = windows(np.tile(TEXT, 4))
    evaluate(model, long, vocabulary=VOCABULARY, top_k=1, company=OneByOne(0, 1), alive=lambda: signs.append(None))
    assert len(signs) == math.ceil((len(TEXT) * 4 - 1) / CONTEXT / 32)


def test_a_large_vocabulary_makes_batches_smaller() -> None:
    assert [len(batch) for batch in batches(windows(np.tile(TEXT, 4)), 1 << 20)] == [8] * 9 + [3]
    assert {len(batch) for batch in batches(windows(), 1 << 30)} == {1}
