"""Held-out prompts are completed alike by any number of ranks, and compared as sacrebleu compares."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from keepstep.trainer import translation
from keepstep.trainer.config import ModelSection, TrainerConfig
from keepstep.trainer.evaluate import Alone
from keepstep.trainer.models import Memory, build_model, initial_value
from keepstep.trainer.sampling import Sampling, continuations
from keepstep.trainer.tokenizer import ByteTokenizer

END = 256
VOCABULARY = 257
CONTEXT = 24
PROMPTS = [[*f"say {i}".encode()[: 2 + i % 7], END] for i in range(41)]


class Together:
    """Ranks in threads, which meet at every gather; each counts how often."""

    device = torch.device("cpu")

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=60)
        self._rows: list[Sequence[float]] = [()] * size

    def of(self, rank: int) -> Any:
        return SimpleNamespace(rank=rank, size=self.size, device=self.device, gather=lambda row: self._gather(rank, row))

    def _gather(self, rank: int, row: Sequence[float]) -> Tensor:
        self._rows[rank] = row
        self._barrier.wait()
        rows = torch.tensor(self._rows, dtype=torch.float64)
        self._barrier.wait()
        return rows


class Counting(nn.Module):
    """Says what it is told to after each token, and counts its passes: a sharded model communicates in each."""

    context, vocabulary = CONTEXT, VOCABULARY

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.passes = 0

    def forward(self, ids_BT: Tensor, memory: Memory | None = None) -> Tensor:
        self.passes += 1
        if memory is not None:
            memory.length += ids_BT.shape[1]
        following = torch.where(ids_BT % 11 == 7, END, torch.where(ids_BT == END, 101, ids_BT + 1))
        return nn.functional.one_hot(following, VOCABULARY).float()


def completed(size: int, models: Sequence[Any]) -> list[list[list[int]]]:
    """Of every rank."""
    company = Together(size)
    with ThreadPoolExecutor(size) as pool:
        ranks = [pool.submit(translation.complete, models[rank], PROMPTS, company.of(rank), end_of_text=END) for rank in range(size)]
        return [rank.result(60) for rank in ranks]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    made = build_model(ModelSection(layers=1, width=16, heads=2, context=CONTEXT, dropout=0.3), VOCABULARY)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(initial_value(made, name, parameter.shape, 5) * (20 if parameter.ndim > 1 else 1))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_ranks_completes_alike(model: nn.Module, size: int) -> None:
    (alone,) = completed(1, [model])
    assert all(found == alone for found in completed(size, [model] * size))
    assert len({tuple(ids) for ids in alone}) > 1


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_ranks_compute_equally_many_passes(size: int) -> None:
    """41 prompts are three batches: some ranks have one less than others, and with four one has none."""
    models = [Counting() for _ in range(size)]
    found = completed(size, models)
    assert len({model.passes for model in models}) == 1
    assert all(ids == found[0] for ids in found)
    assert found[0] == [[101, 102, 103, 104, 105, 106]] * len(PROMPTS)


def test_a_completion_is_what_greedy_generation_gives(model: nn.Module) -> None:
    found = translation.complete(model, PROMPTS[:3], Alone(), end_of_text=END)  # type: ignore[arg-type]
    for prompt, ids in zip(PROMPTS, found, strict=False):
        model.eval()
        alone: list[int] = []
        for (token,) in continuations(model, [prompt], Sampling(temperature=0), remember=False):  # type: ignore[arg-type]
            assert token is not None
            if token == END or len(prompt) + len(alone) == CONTEXT + 1:
                break
            alone.append(token)
        assert ids == alone


def test_a_prompt_that_fills_the_context_gets_one_token_and_a_longer_one_none() -> None:
    model = Counting()
    full, longer = [1] * CONTEXT, [1] * (CONTEXT + 1)
    assert translation.complete(model, [full, longer], Alone(), end_of_text=END) == [[2], []]  # type: ignore[arg-type]


def test_it_gives_a_sign_of_life_for_every_token() -> None:
    model, signs = Counting(), list[None]()
    translation.complete(model, PROMPTS[:2], Alone(), end_of_text=END, alive=lambda: signs.append(None))  # type: ignore[arg-type]
    assert len(signs) == model.passes


REFERENCES = ["the cat sat on the mat", "a bird sings in the tree tonight", "it rains", "Grüße aus Köln am Rhein"]
COMPLETIONS = ["the cat sat on a mat", "a bird sang in that tree tonight", " it rains\n", "Grüße von Köln am Rhein"]


@pytest.mark.slow
def test_bleu_and_chrf_are_those_of_sacrebleu() -> None:
    import sacrebleu

    found = translation.scores(COMPLETIONS, REFERENCES)
    assert found["bleu"] == sacrebleu.corpus_bleu(COMPLETIONS, [REFERENCES]).score
    assert found["chrf"] == sacrebleu.corpus_chrf(COMPLETIONS, [REFERENCES]).score
    assert 0 < found["bleu"] < 100
    assert 0 < found["chrf"] < 100
    assert (found["exact_match"], found["completed"]) == (0.25, 4)
    assert "tok:13a" in found["bleu_signature"]


@pytest.mark.slow
def test_the_same_texts_are_perfect() -> None:
    found = translation.scores(REFERENCES, REFERENCES)
    assert (found["bleu"], found["chrf"], found["exact_match"]) == (pytest.approx(100), pytest.approx(100), 1)


def held_out(*pairs: tuple[str, str]) -> Any:
    """Tokens as `prepare` writes them."""
    documents = [([*prompt.encode(), END], [*completion.encode(), END]) for prompt, completion in pairs]
    lengths = [len(prompt) + len(completion) for prompt, completion in documents]
    return SimpleNamespace(
        held_out=np.array([i for document in documents for part in document for i in part], dtype=np.uint16),
        held_out_starts=np.cumsum([0, *lengths[:-1]]).astype(np.uint64),
        held_out_marks=np.array([len(prompt) for prompt, _ in documents], dtype=np.uint32),
        tokenizer=ByteTokenizer(),
    )


def test_pairs_are_read_as_they_were_written() -> None:
    written = {b"ja": b"yes", b"nein": b"no", b"gut": b"good"}
    found = translation.pairs_of(held_out(("ja", "yes"), ("nein", "no"), ("gut", "good")), 2)
    assert len(found) == 2
    assert all(written[bytes(pair.prompt[:-1])] == bytes(pair.completion) for pair in found)
    assert {pair.prompt[-1] for pair in found} == {END}


@pytest.mark.slow
def test_what_a_model_answers_is_compared_with_the_completions() -> None:
    """The model always answers efghij: 101 to 106, which is 7 modulo 11."""
    tokens = held_out(("x", "efghij"), ("y", "something else"))
    found = translation.translate(Counting(), tokens, 2, Alone())  # type: ignore[arg-type]
    assert (found["exact_match"], found["completed"]) == (0.5, 2)


@pytest.mark.slow
def test_another_objective_and_a_missing_library_are_told_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="pairs"):
        translation.require(TrainerConfig())
    config = TrainerConfig.model_validate({"train": {"objective": "pairs"}})
    translation.require(config)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"pip install keepstep\[evaluate\]"):
        translation.require(config)
