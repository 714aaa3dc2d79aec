"""Skips: half-open ranges of positions of the canonical order that are never consumed, as text "FIRST:LAST". Pure.

A set of skips has one spelling: sorted, without overlaps, neighbours merged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, TypeAlias

Range: TypeAlias = tuple[int, int]

_SKIP: Final = re.compile(r"(\d{1,16}):(\d{1,16})")


def parse(text: str) -> Range:
    """(1024, 1040) of "1024:1040". Raises ValueError."""
    found = _SKIP.fullmatch(text)
    if found is None or int(found[1]) >= int(found[2]):
        raise ValueError(f"{text!r} must be FIRST:LAST, two positions with FIRST below LAST, for example 1024:1040")
    return int(found[1]), int(found[2])


def ranges(skips: Iterable[str]) -> tuple[Range, ...]:
    """Sorted, without overlaps, neighbours merged. Raises ValueError."""
    return tuple(_merged(sorted(map(parse, skips))))


def _merged(found: Sequence[Range]) -> Iterator[Range]:
    if not found:
        return
    first, last = found[0]
    for begin, end in found[1:]:
        if begin > last:
            yield first, last
            first, last = begin, end
        last = max(last, end)
    yield first, last


def union(*groups: Iterable[str]) -> tuple[str, ...]:
    """All positions of all groups, in the one spelling. Raises ValueError."""
    return tuple(f"{first}:{last}" for first, last in ranges(skip for group in groups for skip in group))


def cover(skips: Iterable[str], others: Iterable[str]) -> bool:
    """Whether every position of `others` is skipped by `skips`. Raises ValueError."""
    skips = tuple(skips)
    return union(skips, others) == union(skips)


def position_of(turn: int, skips: Iterable[str]) -> int:
    """Where in the canonical order the sample lies that is consumed `turn`-th (from 0). Raises ValueError."""
    position = turn
    for first, last in ranges(skips):
        if first > position:
            break
        position += last - first
    return position
