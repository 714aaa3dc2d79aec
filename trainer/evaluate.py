"""Evaluation on the held-out text: exact, every target predicted once, spread over the ranks.

A batch of rows is the same in any world and is computed by one rank whole; what is counted in it is added up without rounding. So equal
parameters have equal figures, to the bit, however many ranks there are.

B rows, T positions, V columns of the logits, N targets of a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .figures import ClassCounts, Evaluation
from .heldout import HeldOut, held_out_of
from .samples import IGNORED, Rows
from .sums import exact, total
from .trained import Wanted, load_trained

_BATCH_ROWS: Final = 32
_BATCH_LOGITS: Final = 1 << 26  # of a batch at the most: 256 MiB in float32


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
class _Counted:
    """Of one batch."""

    nats: float
    tokens: int
    first: int
    top_k: int
    classes: Tensor  # (3, labels): rows that were taken for each class, that are of it, and both

    @property
    def counts(self) -> list[float]:
        return [self.tokens, self.first, self.top_k, *self.classes.flatten().tolist()]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    held_out: HeldOut,
    *,
    vocabulary: int,
    top_k: int,
    company: Company,
    alive: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Collective. All rows of `held_out`. Draws no random number and leaves the model in the mode it was in.

    Args:
        vocabulary: columns of the model's logits, which bound the rows of a batch.
        alive: called before each batch.
    """
    share, largest = share_of(batches(held_out, vocabulary), company)
    found = list[_Counted]()
    with evaluating(model):
        for i in range(largest):  # equally many on every rank: a forward pass communicates
            alive()
            rows = held_out.rows(share[i] if i < len(share) else range(0))
            found.append(_count(model, rows, top_k, len(held_out.labels), company.device))
    nats, rests = exact(one.nats for one in found)
    counts = np.sum([one.counts for one in found] or [[0.0] * (3 + 3 * len(held_out.labels))], axis=0)
    first, second, third, *columns = company.gather([nats, *rests, *counts]).T.tolist()
    tokens, right, among, *classes = (int(sum(column)) for column in columns)
    return Evaluation(
        nats=total((*first, *second, *third)),
        tokens=tokens,
        first=right,
        top_k=among,
        k=top_k,
        text_bytes=held_out.text_bytes,
        classes=_classes(held_out.labels, classes),
    )


def batches(held_out: HeldOut, vocabulary: int) -> list[range]:
    """Numbers of the rows of each batch, the same in any world."""
    size = max(1, min(_BATCH_ROWS, _BATCH_LOGITS // (held_out.context * vocabulary)))
    return [range(first, min(first + size, held_out.num_rows)) for first in range(0, held_out.num_rows, size)]


def share_of(batches: Sequence[range], company: Company) -> tuple[Sequence[range], int]:
    """(this rank's batches, how many the rank with the most has)."""
    first, last = (len(batches) * rank // company.size for rank in (company.rank, company.rank + 1))
    return batches[first:last], -(-len(batches) // company.size)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode meanwhile."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _count(model: nn.Module, rows: Rows, top_k: int, num_labels: int, device: torch.device) -> _Counted:
    inputs_BT, targets_BT = (torch.from_numpy(ids).to(device) for ids in rows)
    logits_BTV = model(inputs_BT)
    is_target = targets_BT != IGNORED
    picked_NV = logits_BTV.flatten(0, 1) if is_target.all() else logits_BTV[is_target]  # a copy is as slow as the loss
    logits_NV, targets_N = picked_NV.float(), targets_BT[is_target]
    is_first_N, is_among_N = _placed(logits_NV, targets_N, top_k)
    return _Counted(
        nats=float(F.cross_entropy(logits_NV, targets_N, reduction="none").double().sum()),
        tokens=len(targets_N),
        first=int(is_first_N.sum()),
        top_k=int(is_among_N.sum()),
        classes=_class_counts(logits_NV, targets_N, num_labels),
    )


def _placed(logits_NV: Tensor, targets_N: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(whether each target is the likeliest id, whether it is among the likeliest `top_k`), (N,) bool. What is no number is neither."""
    is_number_N = ~logits_NV.gather(1, targets_N[:, None])[:, 0].isnan()
    is_first_N = (logits_NV.argmax(1) == targets_N) & is_number_N
    among_NK = logits_NV.topk(min(top_k, logits_NV.shape[1])).indices
    return is_first_N, is_first_N | ((among_NK == targets_N[:, None]).any(1) & is_number_N)


def _class_counts(logits_NV: Tensor, targets_N: Tensor, num_labels: int) -> Tensor:
    """(3, labels)."""
    if not num_labels:
        return torch.zeros(3, 0, dtype=torch.long)
    predicted_N = logits_NV[:, :num_labels].argmax(1)
    kinds = (predicted_N, targets_N, targets_N[predicted_N == targets_N])
    return torch.stack([torch.bincount(kind.cpu(), minlength=num_labels) for kind in kinds])


def _classes(labels: Sequence[str], counts: Sequence[int]) -> tuple[ClassCounts, ...]:
    size = len(labels)
    columns = zip(labels, counts[:size], counts[size : 2 * size], counts[2 * size :], strict=True)
    return tuple(ClassCounts(label=label, predicted=predicted, actual=actual, right=right) for label, predicted, actual, right in columns)


def evaluate_root(root: str, *, step: Wanted = None, partial: Sequence[str] = (), generate: int = 0) -> dict[str, Any]:
    """A committed checkpoint (None: the newest) on the whole held-out text, on this process alone.

    `unigram_nats` is what a model reaches that knows the frequencies of tokens and no context; `skipped`, if there is one, names the
    tensors that `partial` let pass (see `load_trained`).

    Args:
        generate: so many held-out prompts are completed and compared; see translation.py.

    Raises:
        ValueError: nothing is committed, or not this step; or `generate` for another objective than "pairs".
        DamagedCheckpoint: its bytes are not those that were committed.
    """
    from . import translation  # it evaluates with this module

    trained = load_trained(root, step, partial=partial)
    config, tokens = trained.config, trained.tokens
    if generate:
        translation.require(config)
    held_out = held_out_of(tokens, config)
    result = evaluate(trained.model, held_out, vocabulary=tokens.index.vocabulary, top_k=config.evaluate.top_k, company=Alone())
    found = result.figures()
    return {
        "step": trained.step,
        "perplexity": found.pop("perplexity"),
        "nats_per_token": found.pop("held_out_nats"),
        "unigram_nats": tokens.index.held_out.unigram_nats,
        "tokens": found.pop("held_out_tokens"),
        **found,
        **({"classes": result.by_class()} if result.classes else {}),
        **(translation.translate(trained.model, tokens, generate, Alone()) if generate else {}),
        **({"skipped": list(trained.skipped)} if trained.skipped else {}),
    }
