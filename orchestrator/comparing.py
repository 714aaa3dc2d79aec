"""Recorded steps against computed ones: are the losses' bits the same, and if not, how far apart and why, perhaps. Pure."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A loss that did not come out as it was recorded."""

    step: int
    recorded_hex: str
    computed_hex: str

    @property
    def recorded(self) -> float:
        return float.fromhex(self.recorded_hex)

    @property
    def computed(self) -> float:
        return float.fromhex(self.computed_hex)

    @property
    def ulps(self) -> int:
        return ulps_between(self.recorded, self.computed)

    @property
    def relative(self) -> float:
        """Infinite where one of them is not finite."""
        if not (math.isfinite(self.recorded) and math.isfinite(self.computed)):
            return math.inf
        return abs(self.computed - self.recorded) / max(abs(self.recorded), abs(self.computed))

    def sentence(self) -> str:
        return (
            f"step {self.step}: the recorded loss is {self.recorded_hex} ({self.recorded:.9g}), the computed one {self.computed_hex} "
            f"({self.computed:.9g}): {self.ulps} ulp{'' if self.ulps == 1 else 's'} apart, relative {self.relative:.2g}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`tolerance` 0: bits were compared; else the relative difference that is allowed."""

    tolerance: float
    num_compared: int
    differences: tuple[Difference, ...]  # every loss whose bits differ, in step order

    @property
    def first(self) -> Difference | None:
        """The first that is too far away."""
        return next((found for found in self.differences if not self.tolerance or found.relative > self.tolerance), None)

    @property
    def widest(self) -> float:
        """The largest relative difference."""
        return max((found.relative for found in self.differences), default=0.0)

    @property
    def holds(self) -> bool:
        return self.first is None


def compare(recorded: Mapping[int, Record], computed: Mapping[int, Record], *, tolerance: float = 0.0) -> Comparison:
    """Of the steps that are in both."""
    steps = sorted(recorded.keys() & computed.keys())
    pairs = ((step, str(recorded[step]["loss_hex"]), str(computed[step]["loss_hex"])) for step in steps)
    differences = (Difference(step=step, recorded_hex=mine, computed_hex=theirs) for step, mine, theirs in pairs if mine != theirs)
    return Comparison(tolerance=tolerance, num_compared=len(steps), differences=tuple(differences))


def ulps_between(left: float, right: float) -> int:
    """How many float64 values lie between, one end included: 0 for the same value (also for -0.0 and 0.0)."""
    return abs(_ordinal(left) - _ordinal(right))


def _ordinal(value: float) -> int:
    """An integer that grows by one from each float64 to the next."""
    bits = int.from_bytes(struct.pack("<d", value), "little", signed=True)
    return bits if bits >= 0 else -(bits & 0x7FFF_FFFF_FFFF_FFFF)


def likely_causes(recorded: Record, computed: Record, then: Record, now: Record) -> Iterator[str]:
    """Sentences about what else differs at the first step that differs.

    Args:
        then, now: what computed it, see trainer/surroundings.py; {} where it was not recorded.
    """
    for name, what in (
        ("samples", "other samples were consumed"),
        ("ledger", "other token ids were read"),
        ("lr", "the learning rate differs"),
    ):
        if name in recorded and name in computed and recorded[name] != computed[name]:
            yield f"{what}: recorded {recorded[name]}, computed {computed[name]}"
    if changed := [f"{name} was {then[name]}, is {now.get(name)}" for name in then if then[name] != now.get(name)]:
        yield "what computes is not what computed: " + ", ".join(changed)
    elif not then:
        yield "other hardware or another version of torch: what computed it was not recorded"
    else:
        yield f"the same kind of machine and the same versions ({', '.join(map(str, then.values()))}): a part of the state was not restored"
