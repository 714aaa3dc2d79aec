"""The next token, and those after it: greedy or drawn, with what the model remembers instead of computing everything anew.

A batch has one random stream per row, and a row whose prompt is longer is fed it token by token: what is added to a prompt does not depend
on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .models import LanguageModel, Memory, Recurrent


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: logits are divided by it; 0: always the likeliest token.
        top_k: among so many likeliest tokens; 0: all.
        top_p: among the fewest likeliest tokens that have at least this probability together (Holtzman et al. 2020); 1: all.
        repetition_penalty: logits of tokens that the row holds are divided by it where positive, else multiplied (Keskar et al. 2019).

    Raises:
        ValueError: one of them is out of range.
    """

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0:
            raise ValueError(f"temperature = {self.temperature} and top_k = {self.top_k} must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be above 0 and at most 1")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty = {self.repetition_penalty} must be above 0")

    def choose(self, logits_V: Tensor, row: Sequence[int], generator: torch.Generator) -> int:
        """One token after those of `row`."""
        if self.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(row)), dtype=torch.long)
            penalised = torch.where(logits_V > 0, logits_V / self.repetition_penalty, logits_V * self.repetition_penalty)
            logits_V = logits_V.index_copy(0, seen, penalised[seen])
        if self.temperature == 0:
            return int(logits_V.argmax())
        if self.top_k:
            least = logits_V.topk(min(self.top_k, len(logits_V))).values[-1]
            logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
        p_V = torch.softmax((logits_V.double() - logits_V.max()) / self.temperature, 0)
        if self.top_p < 1:
            ordered, tokens = p_V.sort(descending=True, stable=True)
            behind = tokens[ordered.cumsum(0) - ordered >= self.top_p]  # what is before them has enough
            p_V = p_V.index_fill(0, behind, 0.0)
        return int(torch.multinomial(p_V, 1, generator=generator))


@torch.no_grad()
def continuations(
    model: LanguageModel, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int = 0, remember: bool = True
) -> Iterator[list[int | None]]:
    """Endlessly the next token of each row; None while its prompt is not behind it.

    Args:
        prompts: at least one token each.
        remember: False: every token is computed from its whole window.
    """
    rows, memory = [list(prompt) for prompt in prompts], Memory()
    generators = [torch.Generator().manual_seed(seed) for _ in rows]
    length = min(map(len, rows))
    while True:
        logits_BV = _next_logits(model, [row[:length] for row in rows], memory if remember else None)
        told: list[int | None] = []
        for row, logits_V, generator in zip(rows, logits_BV, generators, strict=True):
            is_new = len(row) == length
            if is_new:
                row.append(sampling.choose(logits_V, row, generator))
            told.append(row[-1] if is_new else None)
        length += 1
        yield told


def _next_logits(model: LanguageModel, rows: Sequence[Sequence[int]], memory: Memory | None) -> Tensor:
    """(B, V). A Transformer sees `context` tokens: once there are more, all of its positions move on with each, and nothing stays known."""
    device = next(model.parameters()).device
    if memory is not None and (isinstance(model, Recurrent) or len(rows[0]) <= model.context):
        logits_BTV: Tensor = model(torch.tensor([row[memory.length :] for row in rows], device=device), memory)
    else:
        first = 0 if isinstance(model, Recurrent) else -model.context
        logits_BTV = model(torch.tensor([row[first:] for row in rows], device=device))
    return logits_BTV[:, -1, : model.vocabulary].float().cpu()  # a model of others may have more tokens than the tokenizer
