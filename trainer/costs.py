"""What a save costs the training, as rank 0 sees it: the stall of the copy, and how much longer the steps beside the writing are. Pure.

A step counts as disturbed from the save to the first one at whose exchange no rank was writing any more. Their sum above as many usual
steps is the drag: slow-down x time, without a guess at either. Medians: a step that the machine held up is nobody's cost.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

from .contract import SaveCosts

_SAVES: Final = 9  # remembered
_STEPS: Final = 32
_FEW: Final = 4  # undisturbed steps: too few to know how long one usually is


@dataclass(frozen=True, slots=True, kw_only=True)
class _Save:
    stall_s: float
    staged_at: float
    steps: int = 0  # that were disturbed by its writing,
    steps_s: float = 0.0  # how long they took together,
    persist_s: float = 0.0  # and how long it took


class Costs:
    """Of one attempt's saves."""

    def __init__(self) -> None:
        self._quiet = deque[float](maxlen=_STEPS)  # durations of undisturbed steps
        self._written = deque[_Save](maxlen=_SAVES)
        self._writing: _Save | None = None

    def saved(self, now: float, stall_s: float) -> None:
        """A save was staged by now."""
        self._writing = _Save(stall_s=stall_s, staged_at=now)

    def stepped(self, seconds: float, now: float, *, writing: bool) -> SaveCosts | None:
        """A step was finished. `writing`: some rank's part was not durable at its exchange. Returns what is known, where there is news."""
        save = self._writing
        if save is None:
            self._quiet.append(seconds)
            return self._known() if len(self._quiet) == _FEW else None
        self._writing = replace(save, steps=save.steps + 1, steps_s=save.steps_s + seconds, persist_s=now - save.staged_at)
        if writing:
            return None
        self._written.append(self._writing)
        self._writing = None
        return self._known()

    def _known(self) -> SaveCosts | None:
        if len(self._quiet) < _FEW or not self._written:
            return None
        usual_s = median(self._quiet)
        return SaveCosts(
            step_s=usual_s,
            stall_s=median(save.stall_s for save in self._written),
            drag_s=max(0.0, median(save.steps_s - save.steps * usual_s for save in self._written)),
            persist_s=median(save.persist_s for save in self._written),
        )
