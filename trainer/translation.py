"""Held-out prompts completed greedily, compared with what stands there: BLEU, chrF, exact matches.

A batch of prompts is the same in any world and one rank completes it, so the texts do not depend on how many ranks there are. A forward
pass of a sharded model communicates in every layer: ranks go through their batches in step, token by token, and whoever is ready goes on
with rows that nobody reads until all are. So each token costs a gather of all parameters and one small exchange, and a round lasts as long
as its longest completion: this is for hundreds of prompts after the last step, not for millions. One process has no such costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from .config import TrainerConfig
from .evaluate import Company, evaluating, share_of
from .heldout import shuffled
from .models import LanguageModel
from .sampling import Sampling, continuations
from .tokens import Tokens

_BATCH_PROMPTS: Final = 16
_NONE: Final = -1.0  # in an exchange: no token


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Token ids of a held-out document: the prompt with its end-of-text, and the completion without."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


def require(config: TrainerConfig) -> None:
    """Before a training that would fail at its end. Raises ValueError for a model without pairs, ImportError without sacrebleu."""
    if config.train.objective != "pairs":
        raise ValueError(f'prompts are completed with train.objective = "pairs", not "{config.train.objective}"')
    _sacrebleu()


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError("BLEU and chrF need sacrebleu: pip install keepstep[evaluate], or set evaluate.generate = 0") from error
    return sacrebleu


def translate(
    model: LanguageModel, tokens: Tokens, count: int, company: Company, alive: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Collective. The figures of the first `count` held-out pairs, on rank 0; others get none."""
    pairs = pairs_of(tokens, count)
    end_of_text = tokens.tokenizer.end_of_text
    found = complete(model, [pair.prompt for pair in pairs], company, end_of_text=end_of_text, alive=alive)
    if company.rank != 0:
        return {}
    decode = tokens.tokenizer.decode
    return scores([decode(ids) for ids in found], [decode(pair.completion) for pair in pairs])


def pairs_of(tokens: Tokens, count: int) -> list[Pair]:
    """The first ones in the order in which documents are evaluated. Raises ValueError where the held-out text holds none."""
    starts, marks = tokens.held_out_starts, tokens.held_out_marks
    if marks is None:
        raise ValueError('the tokens of this root are those of a text: train.objective = "pairs" needs another run.root')
    ends = np.append(starts[1:], len(tokens.held_out))
    bounds = [(int(starts[i]), int(marks[i]), int(ends[i])) for i in shuffled(len(starts))[:count].tolist()]
    documents = [(tokens.held_out[start:end].tolist(), mark) for start, mark, end in bounds]
    return [Pair(prompt=tuple(ids[:mark]), completion=tuple(ids[mark:-1])) for ids, mark in documents]


@torch.no_grad()
def complete(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    company: Company,
    *,
    end_of_text: int,
    alive: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Collective. What the model adds to each prompt, always the likeliest token, without its end-of-text.

    A prompt and its completion have model.context + 1 tokens at the most, like a row of the training.
    """
    batches = [range(first, min(first + _BATCH_PROMPTS, len(prompts))) for first in range(0, len(prompts), _BATCH_PROMPTS)]
    share, rounds = share_of(batches, company)
    found: dict[int, list[int]] = {}
    with evaluating(model):
        for i in range(rounds):
            numbers = share[i] if i < len(share) else range(0)
            added = _complete_batch(model, [prompts[number] for number in numbers], end_of_text, company, alive)
            found |= _exchanged(numbers, added, model.context, company)
    return [found[number] for number in range(len(prompts))]


def _complete_batch(
    model: LanguageModel, prompts: Sequence[Sequence[int]], end_of_text: int, company: Company, alive: Callable[[], None]
) -> list[list[int]]:
    """Collective: all ranks take equally many tokens. A rank without prompts computes one that nobody reads."""
    given = prompts or [[end_of_text]]
    rows = [_Row(room=model.context + 1 - len(prompt), end_of_text=end_of_text) for prompt in prompts]
    for tokens in continuations(model, given, Sampling(temperature=0)):
        alive()
        for row, token in zip(rows, tokens, strict=False):
            row.take(token)
        if company.gather([float(all(row.is_over for row in rows))]).all():
            break
    return [row.ids for row in rows]


class _Row:
    """What was added to a prompt."""

    def __init__(self, *, room: int, end_of_text: int) -> None:
        self.ids: list[int] = []
        self._room, self._end_of_text = room, end_of_text
        self.is_over = room <= 0

    def take(self, token: int | None) -> None:
        """None: the prompt is not over yet."""
        if token is None or self.is_over:
            return
        if token != self._end_of_text:
            self.ids.append(token)
        self.is_over = token == self._end_of_text or len(self.ids) == self._room


def _exchanged(numbers: range, added: Sequence[Sequence[int]], context: int, company: Company) -> dict[int, list[int]]:
    """Collective. The completions of all ranks, by the number of their prompt."""
    width = context + 2  # number, and as many tokens as there may be
    table = np.full((_BATCH_PROMPTS, width), _NONE)
    for row, number, ids in zip(table, numbers, added, strict=False):
        row[: len(ids) + 1] = [number, *ids]
    rows = company.gather(table.flatten().tolist()).view(-1, width).tolist()
    return {int(number): [int(token) for token in ids if token != _NONE] for number, *ids in rows if number != _NONE}


def scores(completions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Corpus BLEU and chrF2 of sacrebleu, 0 to 100, with the signatures that say how; share of texts that are the same but for spaces
    around them."""
    metrics = _sacrebleu().metrics
    bleu, chrf = metrics.BLEU(), metrics.CHRF()
    found = {name: metric.corpus_score(list(completions), [list(references)]).score for name, metric in (("bleu", bleu), ("chrf", chrf))}
    same = sum(one.strip() == other.strip() for one, other in zip(completions, references, strict=True))
    signatures = {"bleu_signature": str(bleu.get_signature()), "chrf_signature": str(chrf.get_signature())}
    return {**found, "exact_match": same / len(references), "completed": len(references), **signatures}
