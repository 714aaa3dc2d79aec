"""Perplexity on the held-out text: exact, every token predicted once, spread over the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sums import exact, total
from .tokens import TokenArray

_IGNORED = -100  # cross_entropy's mark for targets that do not count
_BATCH_SAMPLES = 32


class Company(Protocol):
    """The ranks that evaluate together: `parallel.World`, or one process alone."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def gather(self, row: Sequence[float], /) -> Tensor:
        """Collective. Every rank's row, (size, len(row)) float64."""


class Alone:
    """A single process without a process group."""

    rank, size, device = 0, 1, torch.device("cpu")

    def gather(self, row: Sequence[float]) -> Tensor:
        return torch.tensor([row], dtype=torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    nats_per_token: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Infinite where a diverged model leaves the range of floats."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf


def nll_sum(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum of -ln p(target) in nats; targets of -100 do not count. Always float32: half precision would lose the sum."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=_IGNORED, reduction="sum")


def evaluate(
    model: nn.Module,
    held_out: TokenArray,
    *,
    context: int,
    max_tokens: int,
    company: Company,
    alive: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Collective. Windows of `context` tokens, one after the other; the first token of the text is given, not predicted.

    The windows' batches are the same in any world, a rank computes some of them whole, and their sums are added without rounding: equal
    parameters have an equal perplexity, to the bit. Draws no random number and leaves the model in the mode it was in.

    Args:
        alive: called before each batch.
    """
    count = min(max_tokens, len(held_out) - 1)
    windows = -(-count // context)
    batches = [range(first, min(first + _BATCH_SAMPLES, windows)) for first in range(0, windows, _BATCH_SAMPLES)]
    share = batches[len(batches) * company.rank // company.size : len(batches) * (company.rank + 1) // company.size]
    largest = -(-len(batches) // company.size)
    sums, tokens = list[float](), 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for i in range(largest):  # equally many on every rank: a forward pass communicates
            alive()
            inputs_BT, targets_BT = _windows(held_out, share[i] if i < len(share) else range(0), context, count)
            sums.append(float(nll_sum(model(inputs_BT.to(company.device)), targets_BT.to(company.device))))
            tokens += int((targets_BT != _IGNORED).sum())
    model.train(was_training)
    nll, rests = exact(sums)
    *nlls, counts = company.gather([nll, *rests, float(tokens)]).T.tolist()
    return Evaluation(nats_per_token=total(term for column in nlls for term in column) / sum(counts), tokens=int(sum(counts)))


def _windows(held_out: TokenArray, windows: range, context: int, count: int) -> tuple[Tensor, Tensor]:
    """(inputs, targets), at least one row; what lies behind the last token, or in a row that is only there for company, does not count."""
    inputs_BT = np.zeros((max(1, len(windows)), context), dtype=np.int64)
    targets_BT = np.full_like(inputs_BT, _IGNORED)
    for row, window in enumerate(windows):
        first, last = window * context, min((window + 1) * context, count)
        inputs_BT[row, : last - first] = held_out[first:last]
        targets_BT[row, : last - first] = held_out[first + 1 : last + 1]
    return torch.from_numpy(inputs_BT), torch.from_numpy(targets_BT)


def evaluate_root(root: str, *, step: int | None = None, partial: Sequence[str] = ()) -> dict[str, Any]:
    """A committed checkpoint (None: the newest) on the whole held-out text, on this process alone.

    `unigram_nats` is what a model reaches that knows the frequencies of tokens and no context; `skipped`, if there is one, names the
    tensors that `partial` let pass (see `load_trained`).

    Raises:
        ValueError: nothing is committed, or not this step.
        DamagedCheckpoint: its bytes are not those that were committed.
    """
    from .trained import load_trained

    trained = load_trained(root, step, partial=partial)
    held_out = trained.tokens.held_out
    result = evaluate(
        trained.model,
        held_out,
        context=trained.config.model.context,
        max_tokens=len(held_out),
        company=Alone(),
    )
    return {
        "step": trained.step,
        "perplexity": result.perplexity,
        "nats_per_token": result.nats_per_token,
        "unigram_nats": trained.tokens.index.held_out.unigram_nats,
        "tokens": result.tokens,
        **({"skipped": list(trained.skipped)} if trained.skipped else {}),
    }
