"""What ranks wrote down of their steps, read back. See steplines.py for the writing side.

A steps file holds one JSON object per line. Those with an int under "step" are the step records; others hold one object under their kind:
{"evaluation": {...}}, {"rejected": {...}}, {"surroundings": {...}}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .layout import STEPS, parse_steps_key, steps_key
from .store import Store


def attempts_with_steps(store: Store) -> tuple[int, ...]:
    """Ascending."""
    return tuple(sorted({attempt for attempt in map(parse_steps_key, store.list(STEPS)) if attempt is not None}))


def step_lines(store: Store, attempt: int) -> Iterator[dict[str, Any]]:
    """Every object of an attempt's steps file, one at a time; a torn line is left out."""
    for line in store.read_lines(steps_key(attempt)):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def newest_loss(store: Store, attempt: int) -> float | None:
    """Of an attempt's newest step record; reads the end of its steps file."""
    return next((loss for record in _backwards(store, attempt) if isinstance(loss := record.get("loss"), float)), None)


def trained_s(store: Store, attempt: int, step: int) -> tuple[float, float] | None:
    """How long an attempt had trained when it finished `step`, and when it finished its newest one. Reads no more than the lines after
    `step`. None: they were not written down.
    """
    newest: float | None = None
    for record in _backwards(store, attempt):
        if not is_step(record) or not isinstance(seconds := record.get("trained_s"), float):
            continue
        newest = seconds if newest is None else newest
        if record["step"] <= step:
            return (seconds, newest) if record["step"] == step else None
    return None


def _backwards(store: Store, attempt: int) -> Iterator[dict[str, Any]]:
    """The objects of a steps file, newest first."""
    for line in store.lines_backwards(steps_key(attempt)):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn
        if isinstance(record, dict):
            yield record


def is_step(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("step"), int)


def read_steps(store: Store) -> dict[int, Sequence[dict[str, Any]]]:
    """Step records by attempt, lost work included."""
    return {attempt: [record for record in step_lines(store, attempt) if is_step(record)] for attempt in attempts_with_steps(store)}


def surroundings_of(store: Store, attempt: int) -> dict[str, str]:
    """What computed an attempt, see trainer/surroundings.py; {} where it was not written down."""
    found = (record["surroundings"] for record in step_lines(store, attempt) if isinstance(record.get("surroundings"), dict))
    return next(found, {})
