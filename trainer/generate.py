"""Text from a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .models import Gpt
from .trained import load_trained


def generate(
    root: str,
    prompt: str,
    *,
    max_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    step: int | None = None,
    partial: Sequence[str] = (),
) -> str:
    """Continues `prompt` with a committed checkpoint (None: the newest); returns prompt and continuation. Deterministic for a seed.

    Args:
        temperature: 0: always the likeliest token.
        top_k: sample among so many likeliest tokens; 0: all.
        partial: names of tensors that may differ, see `load_trained`.

    Raises:
        ValueError: nothing is committed, or not this step; or a setting is out of range.
        DamagedCheckpoint: its bytes are not those that were committed.
    """
    if temperature < 0 or top_k < 0 or max_tokens < 1:
        raise ValueError(f"temperature = {temperature} and top_k = {top_k} must be 0 or more, max_tokens = {max_tokens} 1 or more")
    trained = load_trained(root, step, partial=partial)
    tokenizer = trained.tokens.tokenizer
    (given,) = tokenizer.encode_all([prompt])
    start = list(given) or [tokenizer.end_of_text]
    generator = torch.Generator().manual_seed(seed)
    added: list[int] = []
    for token in sample(trained.model, start, temperature=temperature, top_k=top_k, generator=generator):
        if token == tokenizer.end_of_text:
            break
        added.append(token)
        if len(added) == max_tokens:
            break
    return tokenizer.decode([*given, *added])


@torch.no_grad()
def sample(model: Gpt, start: Sequence[int], *, temperature: float, top_k: int, generator: torch.Generator) -> Iterator[int]:
    """Endless tokens after `start`. Computes the whole window anew for each: milliseconds for the models that one process runs."""
    ids = list(start)
    while True:
        window_1T = torch.tensor([ids[-model.context :]])
        ids.append(choose(model(window_1T)[0, -1], temperature=temperature, top_k=top_k, generator=generator))
        yield ids[-1]


def choose(logits_V: Tensor, *, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token."""
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k:
        least = logits_V.topk(min(top_k, len(logits_V))).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
    return int(torch.multinomial(torch.softmax(logits_V.double() / temperature, 0), 1, generator=generator))
