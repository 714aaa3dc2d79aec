"""How often and how long a remote call is tried: a policy is a value."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import tenacity

from .errors import StoreUnavailable

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Full jitter: the n-th wait is uniform in [0, min(max_wait_s, first_wait_s * 2**n)], so that ranks do not come back in step."""

    deadline_s: float = 60.0  # no new try after it
    max_tries: int = 1000
    first_wait_s: float = 0.1
    max_wait_s: float = 8.0
    sleep: Callable[[float], None] = time.sleep

    def call(self, work: Callable[[], T], *, is_transient: Callable[[BaseException], bool], what: str) -> T:
        """The result of `work`, tried again while its errors are transient.

        Raises:
            StoreUnavailable: the last transient error, when deadline or tries are used up; `what` says what was tried.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            wait=tenacity.wait_random_exponential(multiplier=self.first_wait_s, max=self.max_wait_s),
            stop=tenacity.stop_any(tenacity.stop_after_delay(self.deadline_s), tenacity.stop_after_attempt(self.max_tries)),
            sleep=self.sleep,
        )
        try:
            return retrying(work)
        except tenacity.RetryError as error:
            tries, last = error.last_attempt.attempt_number, error.last_attempt.exception()
            raise StoreUnavailable(f"cannot {what}: {tries} tries, the last one said: {type(last).__name__}: {last}") from last
