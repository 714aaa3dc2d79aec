"""How tokens are chosen, and that remembering and batching change none of them."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_trainer_models import CAUSAL, V, made

from keepstep.trainer.models import LanguageModel
from keepstep.trainer.sampling import Sampling, continuations

LOGITS = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4]))
GREEDY = Sampling(temperature=0)


def drawn(times: int, row: list[int] | None = None, **fields: Any) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(**{"temperature": 1.0, "top_k": 0, **fields})
    return [sampling.choose(LOGITS, row or [], generator) for _ in range(times)]


class TestChoosing:
    def test_it_follows_the_probabilities_among_the_top_k(self) -> None:
        found = drawn(500, top_k=2)
        assert set(found) == {2, 3}
        assert found.count(3) / 500 == pytest.approx(4 / 7, abs=0.07)
        assert set(drawn(200)) == {0, 1, 2, 3}

    @pytest.mark.parametrize(("top_p", "left"), [(0.39, {3}), (0.41, {2, 3}), (0.69, {2, 3}), (0.71, {1, 2, 3}), (1.0, {0, 1, 2, 3})])
    def test_the_fewest_that_have_top_p_together(self, top_p: float, left: set[int]) -> None:
        assert set(drawn(200, top_p=top_p)) == left

    def test_nought_is_the_likeliest(self) -> None:
        assert set(drawn(5, temperature=0)) == {3}

    def test_a_low_temperature_prefers_the_likely(self) -> None:
        assert drawn(300, temperature=0.3).count(3) > drawn(300).count(3) > drawn(300, temperature=3.0).count(3)

    def test_what_is_there_already_is_less_likely(self) -> None:
        assert set(drawn(5, row=[3, 3], temperature=0, repetition_penalty=2.0)) == {2}
        penalty, generator = Sampling(temperature=0, repetition_penalty=3.0), torch.Generator()
        assert penalty.choose(torch.tensor([1.0, 2.0]), [1], generator) == 0, "2 / 3 is below 1"
        assert penalty.choose(torch.tensor([-1.0, -2.0]), [0], generator) == 1, "-1 x 3 is below -2"

    @given(st.lists(st.floats(-30, 30), min_size=1, max_size=20), st.integers(0, 25), st.floats(0.01, 1), st.floats(0, 5))
    def test_there_is_always_one(self, logits: list[float], top_k: int, top_p: float, temperature: float) -> None:
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=1.3)
        assert 0 <= sampling.choose(torch.tensor(logits), [0], torch.Generator().manual_seed(0)) < len(logits)

    @pytest.mark.parametrize(
        ("wrong", "why"),
        [
            ({"temperature": -1.0}, "must be 0 or more"),
            ({"top_k": -1}, "must be 0 or more"),
            ({"top_p": 0.0}, "top_p = 0.0 must be above 0"),
            ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0 must be above 0"),
        ],
    )
    def test_settings_out_of_range(self, wrong: dict[str, float], why: str) -> None:
        with pytest.raises(ValueError, match=why):
            Sampling(**wrong)  # type: ignore[arg-type]


def texts(model: LanguageModel, prompts: list[list[int]], count: int, sampling: Sampling, **options: Any) -> list[list[int]]:
    """The first `count` tokens that each row gets."""
    rows: list[list[int]] = [[] for _ in prompts]
    for told in islice(continuations(model, prompts, sampling, **options), count + max(map(len, prompts))):
        for row, token in zip(rows, told, strict=True):
            row.extend([] if token is None else [token])
    return [row[:count] for row in rows]


@pytest.mark.parametrize("name", CAUSAL)
class TestContinuing:
    """Models of context 16: 25 tokens reach beyond it."""

    def test_what_is_remembered_changes_nothing(self, name: str) -> None:
        model = made(name, times=3)
        for sampling in (GREEDY, Sampling(temperature=1.0, top_k=0)):
            assert texts(model, [[1, 2, 3]], 25, sampling) == texts(model, [[1, 2, 3]], 25, sampling, remember=False)

    def test_neighbours_change_nothing(self, name: str) -> None:
        model, prompts = made(name, times=3), [[1], [4, 5, 6, 7, 8], [9, 10]]
        sampling = Sampling(temperature=1.0, top_k=10)
        assert texts(model, prompts, 14, sampling, seed=3) == [texts(model, [prompt], 14, sampling, seed=3)[0] for prompt in prompts]

    def test_a_prompt_may_be_longer_than_the_context(self, name: str) -> None:
        model, prompt = made(name, times=3), [token % V for token in range(40)]
        found = texts(model, [prompt], 3, GREEDY)
        assert found == texts(model, [prompt], 3, GREEDY, remember=False)
        assert len(found[0]) == 3
