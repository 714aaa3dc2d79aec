"""Copies of frozen dataclasses with a few other values: `dataclasses.replace` in half its time. Pure.

Copies of the coordinator's state were a fifth of what a report costs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

T = TypeVar("T")

if TYPE_CHECKING:
    from dataclasses import replace as replace  # the type checker knows which fields there are
else:

    def replace(item: T, /, **changes: Any) -> T:
        """For classes with slots that only fill their fields when they are made. Raises KeyError for a field that is not there."""
        kind = type(item)
        copied = object.__new__(kind)
        fields = _fields(kind)
        for get, put in fields.values():
            put(copied, get(item))
        for name, value in changes.items():
            fields[name][1](copied, value)
        return copied


@cache
def _fields(kind: type) -> dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], None]]]:
    """Field -> how to read and write its slot."""
    assert not hasattr(kind, "__post_init__"), f"{kind.__name__} checks its fields: dataclasses.replace"
    slots = {field.name: getattr(kind, field.name) for field in dataclasses.fields(kind)}
    return {name: (slot.__get__, slot.__set__) for name, slot in slots.items()}
