"""Sums that do not depend on the order or the grouping of their terms: what ranks add up must not show who added what. Pure.

A float64 sum is rounded at every addition, so its last bits tell how many ranks there were. `math.fsum` rounds once, at the end
(Shewchuk 1997); `exact` keeps what that rounding cuts off, so that ranks may add up their parts and a sum over all parts is still the
sum over all terms, rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

Rests = tuple[float, float]


class Sums(NamedTuple):
    """What a rank brings to the exchange of a step."""

    nll: float  # summed over its share, nats
    tokens: int
    gradient_square: float  # of its part of the reduced gradient; over all ranks it is the square of the global norm
    nll_rests: Rests = (0.0, 0.0)  # what rounding cut off, see `exact`
    gradient_square_rests: Rests = (0.0, 0.0)


def total(terms: Iterable[float]) -> float:
    """Their sum, rounded once: the same in any order. Infinite or NaN where a term is, or where it is beyond float64."""
    try:
        return math.fsum(terms)
    except (OverflowError, ValueError):  # ValueError: infinities of both signs
        return math.nan


def exact(terms: Iterable[float]) -> tuple[float, Rests]:
    """(total, rests): together the sum of the terms to 159 bits, three times those of a float64.

    `total` over the results of several groups is the `total` over all their terms.
    """
    terms = list(terms)
    first = total(terms)
    if not math.isfinite(first):
        return first, (0.0, 0.0)
    second = math.fsum((*terms, -first))
    return first, (second, math.fsum((*terms, -first, -second)))
