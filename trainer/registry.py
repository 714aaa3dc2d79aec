"""Everything of a rank that must survive a restart, beside its tensors: one named part each, all of them or none.

A checkpoint keeps {"parts": {name: JSON}} in every rank's own index, so what belongs to a rank is never under a key that others share.
Restoring compares the names first, then asks every part whether it can take what was saved, and only then changes anything.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

log = logging.getLogger("keepstep.trainer")

PARTS: Final = "parts"  # their key in a rank's state
TENSOR_PARALLEL: Final = "tensor_parallel"  # another key: of how many ranks one such group consisted, if not of one
_REMEDY: Final = (
    "Resume it with the version of keepstep, the script and the sections of run.toml that it was saved with; "
    "its tensors alone are had with `keepstep checkpoints export`"
)
_SHOWN: Final = 80  # characters of a value in a message

Json = Any
RankStates = Sequence[Mapping[str, Json]]  # the state of every rank of a checkpoint, by rank


class StateMismatch(ValueError):
    """A checkpoint's parts are not those of this process, and nothing was changed. Each difference is named, with what to do."""

    def __init__(
        self, *, missing: Sequence[str] = (), extra: Sequence[str] = (), different: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self.missing, self.extra, self.different = tuple(missing), tuple(extra), dict(different or {})
        super().__init__(f"the checkpoint does not hold the state of this run: {'; '.join(self._told())}. {_REMEDY}")

    def _told(self) -> Iterator[str]:
        if self.missing:
            yield f"missing in it: {', '.join(self.missing)}"
        if self.extra:
            yield f"not known to this run: {', '.join(self.extra)}"
        yield from (f"{name} differs: {', '.join(problems)}" for name, problems in self.different.items())


def _no_problem(saved: Json) -> Iterable[str]:
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One piece of state. What it saves is JSON; floats that must come back to the bit are written as they are (JSON keeps float64) or,
    where they may be infinite or no number, as `float.hex()`."""

    name: str
    capture: Callable[[], Json]
    """As of now; changes nothing."""
    restore: Callable[[Json], None]
    """Of what `check` found nothing wrong with."""
    check: Callable[[Json], Iterable[str]] = _no_problem
    """What is wrong with it, as sentences; changes nothing."""
    per_rank: bool = False
    """False: all ranks have the same, so ranks of another world size take rank 0's, after a look whether all agree."""
    elsewhere: Callable[[Sequence[Json]], str] | None = None
    """Of a part per rank, at another world size: makes it anew, given what every rank had saved, and says how (for the log).
    None: such a checkpoint is refused."""
    check_elsewhere: Callable[[Json], Iterable[str]] = _no_problem
    """What is wrong with one rank's value for `elsewhere`, as sentences; changes nothing."""


class Registry:
    """The parts of one rank, in the order in which they are restored.

    Args:
        tensor_parallel: so many ranks have the same random streams and samples: a world with other groups is another one.
    """

    def __init__(self, *, rank: int, world_size: int, tensor_parallel: int = 1) -> None:
        self.rank, self.world_size, self._tensor_parallel = rank, world_size, tensor_parallel
        self._parts: dict[str, Part] = {}

    def add(self, *parts: Part) -> None:
        """Raises ValueError when there is one of that name already."""
        for part in parts:
            if part.name in self._parts:
                raise ValueError(f"there is a part named {part.name!r} already: every piece of state has a name of its own")
            self._parts[part.name] = part

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(self._parts.values())

    def capture(self) -> dict[str, Json]:
        """Every part as of now, by name."""
        return {name: part.capture() for name, part in self._parts.items()}

    def state(self) -> dict[str, Json]:
        """What `Checkpointer.save` takes as this rank's state."""
        return {PARTS: self.capture()}

    def check(self, states: RankStates) -> None:
        """Raises StateMismatch unless `restore` would put every part back."""
        saved = self._counting(states)
        missing = [name for name in self._parts if not all(name in parts for parts in saved)]
        extra = sorted(set[str]().union(*saved) - set(self._parts))
        there = [part for part in self._parts.values() if part.name not in missing]
        found = {part.name: tuple(self._problems(part, [parts[part.name] for parts in saved], states)) for part in there}
        different = {name: problems for name, problems in found.items() if problems}
        if missing or extra or different:
            raise StateMismatch(missing=missing, extra=extra, different=different)

    def restore(self, states: RankStates) -> None:
        """Puts every part back, or raises StateMismatch and changes nothing.

        Args:
            states: what each rank of the checkpoint had saved. At the same world size a rank takes its own.
        """
        self.check(states)
        saved, sentences = self._counting(states), dict[str, None]()
        for name, part in self._parts.items():
            values = [parts[name] for parts in saved]
            if part.per_rank and not self._is_same_world(states):
                assert part.elsewhere is not None
                sentences[part.elsewhere(values)] = None
            else:
                part.restore(values[0])
        for sentence in filter(None, sentences):
            log.info("saved by %d ranks, resumed by %d: %s", len(states), self.world_size, sentence)

    def _counting(self, states: RankStates) -> list[Mapping[str, Json]]:
        """The parts that are compared: this rank's own; at another world size those of all ranks."""
        count = [states[self.rank]] if self._is_same_world(states) else states
        return [state.get(PARTS, {}) for state in count]

    def _is_same_world(self, states: RankStates) -> bool:
        """Whether each rank of this one can go on from what the same rank of that one had."""
        return len(states) == self.world_size and states[0].get(TENSOR_PARALLEL, 1) == self._tensor_parallel

    def _problems(self, part: Part, values: Sequence[Json], states: RankStates) -> Iterator[str]:
        if self._is_same_world(states) or not part.per_rank:
            if odd := [rank for rank, value in enumerate(values) if value != values[0]]:
                told = f"rank 0 had saved {_short(values[0])}, rank {odd[0]} {_short(values[odd[0]])}"
                yield f"{told}, so {self.world_size} ranks cannot go on from one of them"
            yield from _found(part.check, values[0])
        elif part.elsewhere is None:
            yield f"every rank has its own, so what {len(states)} ranks had saved is nothing for {self.world_size}"
        else:
            yield from (
                f"of rank {rank}: {problem}" for rank, value in enumerate(values) for problem in _found(part.check_elsewhere, value)
            )


def _found(check: Callable[[Json], Iterable[str]], value: Json) -> Iterator[str]:
    try:
        yield from check(value)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # of another version's making
        yield f"it holds what this version cannot read ({type(error).__name__}: {error}): {_short(value)}"


def _short(value: Json) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
