"""How long a rank may be silent: learnt from the silences that ended by themselves, per activity. Pure.

A silence lasts from one report of a rank to its next. Time counts as silence only while the agent itself looked: a look that comes late
counts as one period, because an agent that was frozen together with its ranks, or got no processor time, knows nothing about them.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Final

from keepstep.trainer.contract import Phase, Progress

PERIOD_S: Final = 0.05
LATE_S: Final = 0.25  # looks that come this far apart count in full: a busy machine, not a frozen one

_SHORTEST_S: Final = 0.001
_RATIO: Final = 1.1  # of neighbouring buckets: what is read from them is at most so much too long
_BUCKETS: Final = 180  # up to 28,000 s
_LOG_RATIO: Final = math.log(_RATIO)
_REMEMBERED: Final = 16


class Activity(Enum):
    """What a rank does between two reports, as far as patience is concerned."""

    START = "start"  # process, process group, first parameters: Phase.INIT
    LOAD = "load"
    FIRST_STEP = "first step"  # of an attempt, compilation included
    STEP = "step"
    SAVE = "save"
    EVALUATE = "evaluate"  # one batch after the other: as regular as steps
    FINISH = "finish"
    LEAVE = "leave"  # after the last report: exit handlers, the end of the process group


@dataclass(frozen=True, slots=True)
class _Rule:
    """When enough is known about an activity, and what it may take in any case."""

    min_samples: int
    floor: float  # times hang_s
    settled: float = math.inf  # with so many samples hang_s is the floor


# What is rare must do with one sample, so its floor is higher: the next save may be the first on a machine that swaps. A start waits for
# what no silence so far has shown, however many there were: machines that boot, a compiler, a store each of whose calls may take
# storage.timeout_s (a minute).
_REGULAR: Final = _Rule(min_samples=8, floor=1.0)
_RARE: Final = _Rule(min_samples=1, floor=2.5, settled=32)
_START: Final = _Rule(min_samples=3, floor=15.0)
_RULES: Final = {
    Activity.START: _START,
    Activity.LOAD: _START,
    Activity.FIRST_STEP: _START,
    Activity.STEP: _REGULAR,
    Activity.SAVE: _RARE,
    Activity.EVALUATE: _REGULAR,
    Activity.FINISH: _RARE,
    Activity.LEAVE: _START,
}
_OF_PHASE: Final = {
    Phase.INIT: Activity.START,
    Phase.LOAD: Activity.LOAD,
    Phase.STEP: Activity.STEP,
    Phase.SAVE: Activity.SAVE,
    Phase.EVALUATE: Activity.EVALUATE,
    Phase.FINISH: Activity.FINISH,
    Phase.DONE: Activity.LEAVE,
    Phase.STOPPED: Activity.LEAVE,
}


class Silences:
    """A histogram with log-spaced buckets: bounded memory, percentiles within a tenth."""

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self.total = 0
        self.longest_s = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        index = math.ceil(math.log(seconds / _SHORTEST_S) / _LOG_RATIO) if seconds > _SHORTEST_S else 0
        self._counts[min(index, _BUCKETS - 1)] += count
        self.total += count
        self.longest_s = max(self.longest_s, seconds)

    def percentile(self, share: float) -> float:
        """The silence that `share` of all do not exceed, rounded up to its bucket's end; 0 without any."""
        wanted, seen = math.ceil(share * self.total), 0
        for index, count in enumerate(self._counts):
            seen += count
            if count and seen >= wanted:
                return min(_SHORTEST_S * _RATIO**index, self.longest_s)
        return 0.0


class Patience:
    """What one agent has learnt about its ranks' silences, over all attempts of one world size.

    Args:
        hang_s: no silence that is shorter is a hang.
    """

    def __init__(self, hang_s: float) -> None:
        self._hang_s = hang_s
        self._world_size = 0
        self._silences: dict[Activity, Silences] = {}
        self._cut_short: deque[tuple[Activity, int, float]] = deque(maxlen=_REMEMBERED)  # the last ranks that were killed for a silence

    def begin(self, world_size: int) -> None:
        """An attempt. At another world size a step has another length: nothing is known then."""
        if world_size != self._world_size:
            self._world_size = world_size
            self._silences = {activity: Silences() for activity in Activity}

    def learn(self, activity: Activity, seconds: float, count: int = 1) -> None:
        """`count` silences of that length have ended by themselves."""
        self._silences[activity].add(seconds, count)

    def cut_short(self, activity: Activity, step: int, seconds: float) -> None:
        """A silence that was taken for a hang. If the next attempt falls silent at the same step, it gets twice the time:

        perhaps it takes so long, and then patience is learnt instead of killing it for ever.
        """
        self._cut_short.append((activity, step, seconds))

    def limit_s(self, activity: Activity, step: int) -> float:
        """A longer silence is a hang; 0: too little is known.

        A silence that has ended by itself must not be cut short when it comes again, however rare it is, so the longest counts beside the
        99th percentile.
        """
        known, rule = self._silences[activity], _RULES[activity]
        if known.total < rule.min_samples:
            return 0.0
        floor = rule.floor if known.total < rule.settled else 1.0
        usual_s = max(floor * self._hang_s, 4 * known.percentile(0.99), 1.25 * known.longest_s)
        return max([usual_s, *(2 * seconds for which, at, seconds in self._cut_short if (which, at) == (activity, step))])

    @property
    def step_s(self) -> float:
        """How long a step usually takes; 0: unknown."""
        return self._silences[Activity.STEP].percentile(0.5) if self._world_size else 0.0


@dataclass(frozen=True, slots=True)
class Silence:
    """How a rank stands at a look."""

    quiet_s: float
    limit_s: float  # 0: unknown

    @property
    def is_too_long(self) -> bool:
        return 0 < self.limit_s < self.quiet_s


class Watch:
    """One rank under the eyes of its agent, which looks every PERIOD_S. `first`: its page before it started."""

    def __init__(self, patience: Patience, first: Progress, now: float) -> None:
        self._patience = patience
        self._first_step = first.step
        self._last = first
        self._looked_at = now
        self._quiet_s = 0.0
        self.silence = Silence(0.0, 0.0)

    @property
    def activity(self) -> Activity:
        """While the newest report is the last."""
        activity = _OF_PHASE[self._last.phase]
        return Activity.FIRST_STEP if activity is Activity.STEP and self._last.step <= self._first_step else activity

    def look(self, seen: Progress, now: float) -> Silence:
        """To be called with what the rank's page says now."""
        looked_s = now - self._looked_at
        self._looked_at = now
        silent_s = self._quiet_s + (looked_s if looked_s <= LATE_S else PERIOD_S)
        if seen.beats == self._last.beats:
            self._quiet_s = silent_s
        else:
            self._learn(seen, silent_s)
            self._quiet_s = max(0.0, min(now - seen.at, PERIOD_S))
            self._last = seen
        limit_s = seen.limit_s or self._patience.limit_s(self.activity, seen.step)
        self.silence = Silence(math.ceil(self._quiet_s * 1000) / 1000, round(limit_s, 3))
        return self.silence

    def _learn(self, seen: Progress, silent_s: float) -> None:
        """What was announced is no measure of what is usual."""
        if self._last.limit_s:
            return
        beats = max(1, seen.beats - self._last.beats)
        self._patience.learn(self.activity, max(0.0, min(seen.at - self._last.at, silent_s)) / beats, beats)

    def give_up(self) -> None:
        """The rank is killed while it is silent: too long for us, perhaps, and not for what it did."""
        if self.silence.is_too_long:
            self._patience.cut_short(self.activity, self._last.step, self.silence.quiet_s)
