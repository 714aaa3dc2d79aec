"""How often and how long a remote call is tried: a policy is a value, and a budget is shared by all calls of a store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import tenacity

from .errors import StoreUnavailable

T = TypeVar("T")

MAX_TOKENS: Final = 100.0
REFILL: Final = 0.2  # by each success: in the long run at most one repeated request for five that worked


class RetryBudget:
    """A bucket of retries. A store that fails everywhere is then asked once per call instead of a dozen times, by every call at once.

    Thread-safe. The first try of a call is always free: it is how a store's recovery is noticed.
    """

    def __init__(self, max_tokens: float = MAX_TOKENS, refill: float = REFILL) -> None:
        self.max_tokens = max_tokens
        self._refill = refill
        self._tokens = max_tokens
        self._lock = threading.Lock()

    def take(self) -> bool:
        """One retry; false when there is none left."""
        with self._lock:
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True

    def succeeded(self) -> None:
        with self._lock:
            self._tokens = min(self.max_tokens, self._tokens + self._refill)

    def __str__(self) -> str:
        return f"the store's budget of {self.max_tokens:.0f} retries is used up, each success gives {self._refill:g} back"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Full jitter: the n-th wait is uniform in [0, min(max_wait_s, first_wait_s * 2**n)], so that ranks do not come back in step."""

    deadline_s: float = 60.0  # of the whole call, waits included; no try begins in its last tenth
    max_tries: int = 1000
    first_wait_s: float = 0.1
    max_wait_s: float = 8.0
    sleep: Callable[[float], None] = time.sleep

    def call(
        self,
        work: Callable[[float], T],
        *,
        is_transient: Callable[[BaseException], bool],
        what: str,
        budget: RetryBudget | None = None,
    ) -> T:
        """The result of `work`, tried again while its errors are transient.

        Args:
            work: one try; gets the seconds that it may take: half of the deadline, so that there is time for another, or what is left.
            what: what is tried, for the message: "read log/0000000042.json".
            budget: of the retries of all calls together; None: the call may use its deadline up.

        Raises:
            StoreUnavailable: the last transient error, when deadline, tries or budget are used up.
        """
        began_at, is_spent = time.monotonic(), _SpentBudget(budget)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            wait=tenacity.wait_random_exponential(multiplier=self.first_wait_s, max=self.max_wait_s),
            stop=tenacity.stop_any(
                tenacity.stop_before_delay(0.9 * self.deadline_s), tenacity.stop_after_attempt(self.max_tries), is_spent
            ),
            sleep=self.sleep,
        )

        def once() -> T:
            left_s = began_at + self.deadline_s - time.monotonic()
            return work(max(0.0, min(self.deadline_s / 2, left_s)))

        try:
            result = retrying(once)
        except tenacity.RetryError as error:
            tries, last = error.last_attempt.attempt_number, error.last_attempt.exception()
            said = f"{tries} tries, the last one said: {type(last).__name__}: {last}"
            raise StoreUnavailable(f"cannot {what}: {said}{is_spent.note}") from last
        if budget:
            budget.succeeded()
        return result


class _SpentBudget(tenacity.stop.stop_base):
    """Asked last, when everything else is for another try: then it costs one."""

    def __init__(self, budget: RetryBudget | None) -> None:
        self._budget = budget
        self.note = ""

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        if self._budget is None or self._budget.take():
            return False
        self.note = f"; {self._budget}"
        return True
