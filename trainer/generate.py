"""Text from a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .cleaning import clean
from .sampling import Sampling, continuations
from .tokenizer import Tokenizer
from .trained import Wanted, load_trained


def generate(
    root: str,
    prompts: Sequence[str],
    *,
    max_tokens: int = 100,
    sampling: Sampling | None = None,
    seed: int = 0,
    step: Wanted = None,
    partial: Sequence[str] = (),
) -> Iterator[list[str]]:
    """Continues prompts with a committed checkpoint (None: the newest): first the prompts, then whatever text each gets, bit by bit.

    Deterministic for a seed; what a prompt gets does not depend on the others. A text ends with the end-of-text token. A model that was
    trained on pairs completes prompts as it learnt it.

    Args:
        partial: names of tensors that may differ, see `load_trained`.

    Raises:
        ValueError: nothing is committed, or not this step; or the model cannot generate.
        DamagedCheckpoint: its bytes are not those that were committed.
    """
    if max_tokens < 1 or not prompts:
        raise ValueError(f"max_tokens = {max_tokens} must be 1 or more, and there must be a prompt")
    trained = load_trained(root, step, partial=partial)
    if trained.config.train.objective == "classes":
        raise ValueError('train.objective = "classes": this model names classes and writes no text; use `keepstep classify`')
    if not trained.model.is_causal:
        raise ValueError(f'model.kind = "{trained.config.model.kind}" sees what comes next: it cannot generate text')
    tokenizer = trained.tokens.tokenizer
    given = [
        list(ids) or [tokenizer.end_of_text] for ids in tokenizer.encode_all([clean(prompt, trained.config.data) for prompt in prompts])
    ]
    if trained.config.train.objective == "pairs":  # as in training, where the completion begins behind it
        given = [[*ids, tokenizer.end_of_text] for ids in given]
    texts = [_Text(tokenizer, ids, max_tokens) for ids in given]
    yield [text.news() for text in texts]
    for tokens in continuations(trained.model, given, sampling or Sampling(), seed=seed):
        for text, token in zip(texts, tokens, strict=True):
            text.take(token)
        yield [text.news() for text in texts]
        if all(text.is_over for text in texts):
            return


class _Text:
    """A prompt and what was added to it, as text that grows. Bytes that are no UTF-8 yet wait for those that follow."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], max_tokens: int) -> None:
        self._tokenizer, self._ids, self._left, self._told = tokenizer, list(prompt), max_tokens, ""

    @property
    def is_over(self) -> bool:
        return self._left == 0

    def take(self, token: int | None) -> None:
        """None, or one that comes after the end, is nothing."""
        if token is None or self.is_over:
            return
        if token == self._tokenizer.end_of_text:
            self._left = 0
            return
        self._ids.append(token)
        self._left -= 1

    def news(self) -> str:
        """What was not told yet."""
        text = self._tokenizer.decode(self._ids)
        if not self.is_over:
            text = text.rstrip("\ufffd")
        news, self._told = text[len(self._told) :], text if len(text) > len(self._told) else self._told
        return news
