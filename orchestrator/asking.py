"""What was asked for and is not answered yet: asked once, repeated with back-off until the answer comes. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .events import Asking
from .policy import Policy, retry_pause_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    request: Asking
    again_at: float
    refusals: int = 0
    why: str = ""  # of the last refusal


Asks = tuple[Ask, ...]  # a handful at most


def add(asks: Asks, request: Asking, policy: Policy, now: float) -> Asks:
    return (*asks, Ask(request=request, again_at=now + policy.max_retry_s))


def pending(asks: Asks, kind: type[Asking]) -> bool:
    return any(isinstance(ask.request, kind) for ask in asks)


def without(asks: Asks, answered: Callable[[Asking], bool]) -> Asks:
    return tuple(ask for ask in asks if not answered(ask.request))


def refused(asks: Asks, request: Asking, why: str, policy: Policy, now: float) -> Asks:
    """The storage was in the way: once more, after a pause that grows."""

    def refuse(ask: Ask) -> Ask:
        if ask.request != request:
            return ask
        return replace(ask, again_at=now + retry_pause_s(policy, ask.refusals + 1), refusals=ask.refusals + 1, why=why)

    return tuple(refuse(ask) for ask in asks)


def due(asks: Asks, policy: Policy, now: float) -> tuple[Asks, tuple[Asking, ...]]:
    """Those whose time has come, and the list with their next time in it."""
    if not any(ask.again_at <= now for ask in asks):
        return asks, ()
    again = tuple(ask.request for ask in asks if ask.again_at <= now)
    return tuple(replace(ask, again_at=now + policy.max_retry_s) if ask.again_at <= now else ask for ask in asks), again
