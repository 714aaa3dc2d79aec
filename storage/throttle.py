"""How many requests of a process a store gets at once: fewer when it says that it is too much, slowly more again (AIMD).

`Limit` is the rule, without time or threads; `Throttle` holds it under a lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from .errors import StoreUnavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """`allowed` requests at once, `most` at best. `cuts` numbers the times that it was halved."""

    most: int
    allowed: float
    cuts: int = 0

    @staticmethod
    def of(most: int) -> Limit:
        return Limit(most=most, allowed=float(most))

    def after_success(self) -> Limit:
        """One more for about `allowed` successes: all requests of one round together add one."""
        return replace(self, allowed=min(float(self.most), self.allowed + 1 / self.allowed))

    def after_throttling(self, cuts_at_start: int) -> Limit:
        """Half of it. Requests that began before the last cut say nothing new: sixteen answers to one burst halve it once."""
        if cuts_at_start != self.cuts:
            return self
        return replace(self, allowed=max(1.0, self.allowed / 2), cuts=self.cuts + 1)

    def has_room(self, running: int) -> bool:
        return running < int(self.allowed)


class Throttle:
    """The requests of one store in one process. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._limit = Limit.of(most)
        self._running = 0
        self._changed = threading.Condition()

    @property
    def limit(self) -> Limit:
        return self._limit

    @contextmanager
    def place(self, timeout_s: float, *, is_throttling: Callable[[BaseException], bool]) -> Iterator[None]:
        """Holds one of the places for a request, and learns from how it ends.

        Raises:
            StoreUnavailable: no place became free in time.
        """
        cuts = self._enter(timeout_s)
        try:
            yield
        except BaseException as error:
            is_too_much = is_throttling(error)
            self._leave(lambda limit: limit.after_throttling(cuts) if is_too_much else limit)
            raise
        self._leave(Limit.after_success)

    def _enter(self, timeout_s: float) -> int:
        with self._changed:
            if not self._changed.wait_for(lambda: self._limit.has_room(self._running), timeout_s):
                now = f"{self._running} requests are under way and {int(self._limit.allowed)} of {self._limit.most} allowed"
                raise StoreUnavailable(f"no request could begin within {timeout_s:.1f} s: {now}")
            self._running += 1
            return self._limit.cuts

    def _leave(self, learnt: Callable[[Limit], Limit]) -> None:
        with self._changed:
            self._limit = learnt(self._limit)
            self._running -= 1
            self._changed.notify_all()
