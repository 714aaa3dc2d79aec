"""Samples that spoil their step, on purpose: what tests and chaos plant to see that it is found, named and left out.

    KEEPSTEP_FAULTS = "trainer.sample:position=37:module=blocks.1.mlp.up:way=gradient"

What this module makes of the sample at that position of the canonical order becomes NaN: its output (`way=output`, the default), or the
gradient that comes back through it; `way=steep` makes that gradient a million times as large. The sample is known by its tokens, so it
does so in every pass, on whichever rank, at any step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from keepstep.storage.faults import planned

from .data import Feed
from .samples import Samples

POINT: Final = "trainer.sample"


def poison(model: nn.Module, samples: Samples, feed: Feed) -> None:
    """Does what the plan says of samples; without a plan, nothing. Raises ValueError for a word that it does not know."""
    for facts in planned(POINT):
        unknown = set(facts) - {"position", "module", "way"}
        spoil = WAYS.get(facts.get("way", "output"))
        if unknown or spoil is None or "position" not in facts:
            raise ValueError(f"{POINT} knows position, module and way ({', '.join(WAYS)}), not {facts}")
        number = feed.order.samples(np.array([int(facts["position"])], dtype=np.uint64))
        _plant(model, torch.from_numpy(samples.ids(number)[0, :-1]), facts.get("module", ""), spoil)


def _plant(model: nn.Module, ids_T: Tensor, module: str, spoil: Callable[[Tensor, Tensor], Tensor]) -> None:
    is_hit: list[Tensor] = []  # of the batch that is under way, (B,)

    def look(_: nn.Module, args: tuple[Any, ...]) -> None:
        is_hit[:] = [(args[0] == ids_T.to(args[0].device)).all(1)]

    model.register_forward_pre_hook(look)
    dict(model.named_modules())[module].register_forward_hook(lambda _, args, output: spoil(output, is_hit[0]))


def _spoil_output(output: Tensor, is_hit_B: Tensor) -> Tensor:
    return torch.where(is_hit_B.view(-1, *[1] * (output.ndim - 1)), math.nan, output)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, factors_B: Tensor) -> Tensor:
        ctx.save_for_backward(factors_B)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (factors_B,) = ctx.saved_tensors
        return gradients[0] * factors_B.view(-1, *[1] * (gradients[0].ndim - 1)), None


def _scale_gradient(output: Tensor, is_hit_B: Tensor, *, factor: float) -> Tensor:
    scaled: Tensor = _ScaleGradient.apply(output, torch.where(is_hit_B, factor, 1.0).to(output.dtype))  # type: ignore[no-untyped-call]
    return scaled


WAYS: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "output": _spoil_output,
    "gradient": partial(_scale_gradient, factor=math.nan),
    "steep": partial(_scale_gradient, factor=1e6),
}
