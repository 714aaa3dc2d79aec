"""How a step that was computed once can be computed again: from which checkpoint on, and through which attempts. Pure.

A lineage keeps what is alive; this needs every attempt that ever began, so it folds the whole log.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from .layout import parse_checkpoint_directory
from .lineage import Folding, Lineage, Segment
from .records import Attempt, Commit, Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """All that the log says, and every attempt of it, also of histories that were left."""

    lineage: Lineage
    attempts: Mapping[int, Attempt]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """The steps after `after` up to `last`, as one attempt computed them."""

    attempt: int
    world_size: int
    after: int
    last: int
    skips: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    num_nodes: int = 1

    @property
    def conditions(self) -> tuple[object, ...]:
        """Legs that follow each other under equal conditions are one computation: a restart changes no bit."""
        return self.world_size, self.num_nodes, self.skips, self.overrides


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The way to a step: load `base` (None: begin from scratch), then compute the legs."""

    base: Commit | None
    legs: tuple[Leg, ...]

    @property
    def num_steps(self) -> int:
        return sum(leg.last - leg.after for leg in self.legs)

    def stretches(self) -> tuple[tuple[Leg, ...], ...]:
        """The legs, those together that one set of ranks can compute without a break."""
        return tuple(tuple(legs) for _, legs in groupby(self.legs, key=lambda leg: leg.conditions))


def read_past(entries: Iterable[Entry]) -> Past:
    """Of the whole log, from its first record on."""
    folding, attempts = Folding(Lineage()), dict[int, Attempt]()
    for entry in entries:
        if entry.record is None:
            folding.lose()
        elif not folding.add(entry.record) and isinstance(entry.record, Attempt):
            attempts[entry.record.attempt] = entry.record
    return Past(lineage=folding.lineage(), attempts=attempts)


def attempt_of(lineage: Lineage, step: int) -> int | None:
    """The attempt that computed a step of the history; None where the history does not reach."""
    segment = segment_of(lineage, step)
    return segment.attempt if segment else None


def segment_of(lineage: Lineage, step: int) -> Segment | None:
    """Where a step lies in the history. In one that is not provisional it was computed, whether or not its record is left."""
    return next((segment for segment in lineage.segments() if segment.holds(step)), None)


def routes(past: Past, attempt: int, step: int) -> Iterator[Route]:
    """Every way to `step` of `attempt`, the shortest first; the last one begins from scratch.

    A checkpoint serves when it lies before the step on that attempt's own past, was not retired and is not known to be damaged. Where a
    record of the past cannot be read, the ways that lead further back are unknown.
    """
    legs, last, newest_base = tuple[Leg, ...](), step, step - 1
    while True:
        made = past.attempts.get(attempt)
        first = max(0, made.resume_step) if made else last - 1
        for commit in _usable(past.lineage, attempt, first, newest_base):
            yield Route(base=commit, legs=_before(made, commit.step, last, legs))
        if made is None:
            return
        legs = _before(made, first, last, legs)
        source = parse_checkpoint_directory(made.resume_directory)
        if source is None:
            yield Route(base=None, legs=legs)
            return
        attempt, last, newest_base = source[0], first, first


def _usable(lineage: Lineage, attempt: int, first: int, last: int) -> list[Commit]:
    """The checkpoints of an attempt at the steps (first, last], the newest first."""
    found = [c for c in lineage.live if c.attempt == attempt and first < c.step <= last and lineage.is_usable(c)]
    return sorted(found, key=lambda commit: -commit.step)


def _before(attempt: Attempt | None, after: int, last: int, legs: tuple[Leg, ...]) -> tuple[Leg, ...]:
    """The steps (after, last] of an attempt, then the legs."""
    if attempt is None or after == last:
        return legs
    leg = Leg(
        attempt=attempt.attempt,
        world_size=attempt.world_size,
        after=after,
        last=last,
        skips=attempt.skips,
        overrides=attempt.overrides,
        num_nodes=len(attempt.nodes),
    )
    return leg, *legs
