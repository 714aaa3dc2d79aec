"""Names that patterns choose, as in a shell: "*.qkv", "blocks.3.*"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Final

_SHOWN: Final = 20


def hits(names: Iterable[str], patterns: Sequence[str]) -> dict[str, list[str]]:
    """By pattern: the names that it matches."""
    names = list(names)
    return {pattern: [name for name in names if fnmatchcase(name, pattern)] for pattern in patterns}


def chosen(names: Iterable[str], patterns: Sequence[str], key: str) -> frozenset[str]:
    """The names that at least one pattern matches. Raises ValueError that begins with `key` for a pattern that matches none."""
    names = list(names)
    found = hits(names, patterns)
    if idle := [pattern for pattern, matching in found.items() if not matching]:
        raise ValueError(f'{key}: "{idle[0]}" matches no parameter; they are {listed(names)}')
    return frozenset(name for matching in found.values() for name in matching)


def listed(names: Iterable[str]) -> str:
    """At most 20 of them, for a message."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
