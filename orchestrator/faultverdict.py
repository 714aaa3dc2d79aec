"""Was what the run said about the faults right? Decided from its events and what was really done to it. Pure.

All instants are of one machine's monotonic clock: the coordinator's, which its events carry as `at_s`, and that of whoever inflicted
the faults. So they can only be compared where both run on one machine (network namespaces share its clock).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from .faultkinds import FAILURE, Expected, Fault

Event: TypeAlias = Mapping[str, Any]

# How a run shows that it has noticed something: it stops the attempt, moves, is adopted, or says what is in the way.
_NOTICES: Final = frozenset({FAILURE, "draining", "departure", "moved", "adopted", "degraded", "quarantined"})
_TOLD: Final = frozenset({FAILURE, "moved", "degraded", "quarantined"})  # what a report shows of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """A fault that was inflicted, and where the run stood at that moment."""

    fault: Fault
    expected: Expected
    node: str  # id of the node that was hit; "" for the coordinator and the root
    rank: int  # that was hit, or lived on that node; -1: none
    pids: tuple[int, ...]  # that got a signal
    attempt: int
    step: int  # finished by all ranks
    at_s: float
    until_s: float | None = None  # when it was over; None: it goes on, or took no time

    def ended_s(self) -> float:
        """When the fault itself was over, whatever followed from it."""
        return self.at_s + (self.fault.lasting_s or 0.0) if self.until_s is None else self.until_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What followed from one fault."""

    episode: Episode
    noticed_s: float | None  # from the fault to the first event about it
    stepped_s: float | None  # from the fault to the next step that all ranks finished
    said: str  # the sentence of the verdict
    wrong: str  # why that was not right; "" when it was


def window(events: Sequence[Event], begin_s: float, end_s: float = math.inf) -> list[Event]:
    """The events of [begin_s, end_s)."""
    return [event for event in events if begin_s <= event["at_s"] < end_s]


def stepped_at(episode: Episode, events: Sequence[Event]) -> float | None:
    """When all ranks had finished a step again; None while they have not, or what must be noticed before was not noticed yet.

    Args:
        events: since the fault.
    """
    if episode.expected.sign and not any(event["kind"] == episode.expected.sign for event in events):
        return None
    last_stop = max((event["at_s"] for event in events if event["kind"] == "draining"), default=None)
    if last_stop is not None:
        return next((event["at_s"] for event in events if event["kind"] == "training" and event["at_s"] > last_stop), None)
    return next((event["at_s"] for event in events if _steps_on(episode, event)), None)


def _steps_on(episode: Episode, event: Event) -> bool:
    """In the same attempt. What was stopped for a while counts as stepping only after that."""
    further = bool(event["kind"] == "progress" and event["step"] > episode.step)
    return further and event["at_s"] >= episode.ended_s()


def is_over(episode: Episode, events: Sequence[Event], now: float) -> bool:
    """The fault has ended, and the run trains as if nothing had been."""
    return now >= episode.ended_s() and stepped_at(episode, events) is not None


def judge(episodes: Sequence[Episode], events: Sequence[Event]) -> tuple[Judgement, ...]:
    """One judgement per episode; what happens between two faults belongs to the first."""
    return tuple(_judge_one(episode, found) for episode, found in _episodes_events(episodes, events))


def _episodes_events(episodes: Sequence[Episode], events: Sequence[Event]) -> Iterator[tuple[Episode, list[Event]]]:
    for number, episode in enumerate(episodes, start=1):
        end = episodes[number].at_s if number < len(episodes) else math.inf
        yield episode, window(events, episode.at_s, end)


def _judge_one(episode: Episode, events: Sequence[Event]) -> Judgement:
    noticed = next((event["at_s"] for event in events if event["kind"] in _NOTICES), None)
    stepped = stepped_at(episode, events)
    said = [event["why"] for event in events if event["kind"] in (_TOLD | {episode.expected.sign})]
    return Judgement(
        episode=episode,
        noticed_s=None if noticed is None else noticed - episode.at_s,
        stepped_s=None if stepped is None else stepped - episode.at_s,
        said="; ".join(said) or "nothing",
        wrong="; ".join(_wrongs(episode, events)),
    )


def _wrongs(episode: Episode, events: Sequence[Event]) -> Iterator[str]:
    expected = episode.expected
    failures = [event for event in events if event["kind"] == FAILURE]
    if expected.sign and not any(event["kind"] == expected.sign for event in events):
        yield "nobody noticed it" if expected.sign == FAILURE else f'there was no event "{expected.sign}"'
    if not expected.sign and not failures:
        return
    if expected.sign == FAILURE and failures and not any(event["cause"] in expected.causes for event in failures):
        yield f"the cause should have been {' or '.join(sorted(expected.causes))}, not {failures[0]['cause']}"
        return
    yield from (wrong for event in failures if (wrong := _wrong_failure(episode, event)))


def _wrong_failure(episode: Episode, event: Event) -> str:
    expected = episode.expected
    if event["cause"] in expected.also:
        return ""
    if event["cause"] not in expected.causes:
        return f"a failure that nobody inflicted: {event['why']}"
    if expected.names == "rank" and event["rank"] != episode.rank:
        return f"rank {episode.rank} was hit, not {event['rank']}"
    if expected.names and event["node"] != episode.node:
        return f"{episode.node} was hit, not {event['node'] or 'no node at all'}"
    return "" if expected.says in event["why"] else f"the sentence should name {expected.says}"


def uninvited(episodes: Sequence[Episode], events: Sequence[Event]) -> list[Event]:
    """Failures before the first fault: false alarms beyond doubt."""
    begin = episodes[0].at_s if episodes else math.inf
    return [event for event in window(events, -math.inf, begin) if event["kind"] == FAILURE]


def false_alarms(judgements: Sequence[Judgement], events: Sequence[Event]) -> list[str]:
    """Sentences of all failures that nobody inflicted."""
    episodes = [judgement.episode for judgement in judgements]
    found = [str(event["why"]) for event in uninvited(episodes, events)]
    for episode, mine in _episodes_events(episodes, events):
        known = episode.expected.causes | episode.expected.also
        found += [str(event["why"]) for event in mine if event["kind"] == FAILURE and event["cause"] not in known]
    return found


def redone(episodes: Sequence[Episode], lost: Mapping[int, int]) -> tuple[int, ...]:
    """Steps that each fault cost.

    Args:
        lost: attempt -> steps that it computed and that were computed again.
    """
    begins = [episode.attempt for episode in episodes]
    ends = [*begins[1:], max(lost, default=0) + 1]
    return tuple(sum(lost.get(attempt, 0) for attempt in range(*span)) for span in zip(begins, ends, strict=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """How a run ended, as far as it must not depend on faults."""

    state_sha256: str | None  # None: a user's script keeps its own
    losses: tuple[str, ...]  # float.hex() of each step of the history
    world_sizes: frozenset[int]  # of its attempts


def difference(broken: History, undisturbed: History) -> str:
    """Why the two histories are not the same; "" when they are, to the bit."""
    if differing := [step for step, pair in enumerate(zip(broken.losses, undisturbed.losses, strict=False), 1) if pair[0] != pair[1]]:
        how = f"the losses differ from step {differing[0]} on ({len(differing)} of {len(undisturbed.losses)} steps)"
        return f"{how}; the world size changed on the way, so they are equal within rounding at best" if _resized(broken) else how
    if len(broken.losses) != len(undisturbed.losses):
        return f"the history has {len(broken.losses)} steps, not {len(undisturbed.losses)}"
    return "" if broken.state_sha256 == undisturbed.state_sha256 else "the losses are equal, the final state is not"


def _resized(history: History) -> bool:
    return len(history.world_sizes) > 1
