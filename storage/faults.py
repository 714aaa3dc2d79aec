"""Named places where a test can kill the process that passes them. Costs one dictionary look-up when no plan is set.

KEEPSTEP_FAULTS = "POINT[:key=value...];POINT[...]": the process ends itself when it passes POINT with all the given facts, e.g.
"persister.shards.middle:rank=1:step=20:once=/tmp/x/fired". `once=PATH`: fires once for all processes that share PATH (created with
O_EXCL). `signal=STOP` sends that signal instead of KILL.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

ENV_FAULTS: Final = "KEEPSTEP_FAULTS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    point: str
    facts: tuple[tuple[str, str], ...]
    once: str
    signal: int


@lru_cache(maxsize=4)
def parse_plan(text: str) -> tuple[Fault, ...]:
    """The faults of a plan. Raises ValueError naming the entry that is not understood."""
    return tuple(_parse_fault(entry) for entry in text.split(";") if entry.strip())


def fault_point(point: str, **facts: object) -> None:
    """Called by a process at a named place; ends it when the plan says so, otherwise does nothing."""
    text = os.environ.get(ENV_FAULTS)
    if not text:
        return
    for fault in parse_plan(text):
        if fault.point == point and all(str(facts.get(key)) == value for key, value in fault.facts) and _claim(fault.once):
            os.kill(os.getpid(), fault.signal)


def _parse_fault(entry: str) -> Fault:
    point, *pairs = entry.strip().split(":")
    if not all("=" in pair for pair in pairs):
        raise ValueError(f"{ENV_FAULTS}: {entry!r} is not POINT:key=value:...")
    facts = dict(pair.split("=", 1) for pair in pairs)
    once, name = facts.pop("once", ""), facts.pop("signal", "KILL")
    return Fault(point=point, facts=tuple(sorted(facts.items())), once=once, signal=signal.Signals[f"SIG{name}"])


def _claim(once: str) -> bool:
    if not once:
        return True
    try:
        os.close(os.open(once, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        return False
    return True
