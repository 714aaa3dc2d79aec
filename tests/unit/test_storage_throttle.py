"""How many requests at once, and how many of them again: the rules, and the locks around them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.storage.errors import NotFound, StoreError, StoreUnavailable
from keepstep.storage.retry import RetryBudget, RetryPolicy
from keepstep.storage.throttle import Limit, Throttle
from keepstep.storage.uploads import PARALLEL_PARTS_OF_ALL, Body, in_parts, send_parts


class TestLimit:
    def test_many_answers_to_one_burst_halve_it_once(self) -> None:
        limit = Limit.of(16)
        for _ in range(16):
            limit = limit.after_throttling(0)
        assert (limit.allowed, limit.cuts) == (8, 1)
        assert limit.after_throttling(1).allowed == 4

    def test_it_comes_back_by_about_one_per_round(self) -> None:
        limit, successes = Limit.of(16).after_throttling(0), 0
        while limit.allowed < 16:
            limit, successes = limit.after_success(), successes + 1
        assert 80 < successes < 120  # 8 + 9 + ... + 15 = 92

    @given(st.lists(st.booleans(), max_size=200), st.integers(1, 64))
    def test_it_is_never_below_one_nor_above_the_most(self, answers: list[bool], most: int) -> None:
        limit = Limit.of(most)
        for is_good in answers:
            limit = limit.after_success() if is_good else limit.after_throttling(limit.cuts)
            assert 1 <= limit.allowed <= most
            assert limit.has_room(0)


class TestThrottle:
    def test_no_more_run_at_once_than_are_allowed(self) -> None:
        throttle, running, seen, lock = Throttle(3), 0, [], threading.Lock()

        def work(_: int) -> None:
            nonlocal running
            with throttle.place(30, is_throttling=lambda _: False):
                with lock:
                    running += 1
                    seen.append(running)
                with lock:
                    running -= 1

        with ThreadPoolExecutor(12) as pool:
            list(pool.map(work, range(200)))
        assert max(seen) <= 3

    def test_waiting_for_a_place_ends_with_a_sentence(self) -> None:
        throttle = Throttle(1)
        with (
            throttle.place(1, is_throttling=lambda _: False),
            pytest.raises(StoreUnavailable, match=r"no request could begin within 0\.0 s: 1 requests are under way and 1 of 1 allowed"),
            throttle.place(0, is_throttling=lambda _: False),
        ):
            pytest.fail("there was no place")

    def test_only_an_answer_that_says_too_much_slows_it_down(self) -> None:
        throttle = Throttle(8)
        for error, allowed in ((NotFound("absent"), 8.0), (StoreUnavailable("SlowDown"), 4.0)):
            with pytest.raises(type(error)), throttle.place(1, is_throttling=lambda e: isinstance(e, StoreUnavailable)):
                raise error
            assert throttle.limit.allowed == allowed


class TestBudget:
    def test_it_is_spent_by_retries_and_refilled_by_successes(self) -> None:
        budget = RetryBudget(max_tokens=3, refill=0.5)
        assert [budget.take() for _ in range(4)] == [True, True, True, False]
        budget.succeeded()
        assert not budget.take()
        budget.succeeded()
        assert budget.take()

    def test_calls_share_it_and_fail_fast_without_it(self) -> None:
        budget, tries = RetryBudget(max_tokens=5), []
        policy = RetryPolicy(sleep=lambda _: None)

        def work(_: float) -> None:
            tries.append(1)
            raise TimeoutError("slow")

        for expected in (6, 7, 8):  # 1 + 5 retries, then one try each
            with pytest.raises(StoreUnavailable, match=r"the store's budget of 5 retries is used up, each success gives 0\.2 back"):
                policy.call(work, is_transient=lambda _: True, what="read x", budget=budget)
            assert len(tries) == expected

    def test_a_try_gets_half_of_the_deadline(self) -> None:
        given_s: list[float] = []
        RetryPolicy(deadline_s=10.0).call(given_s.append, is_transient=lambda _: True, what="read x")
        assert 4 < given_s[0] <= 5


class TestParts:
    def test_parts_are_equal_but_for_the_last_one(self) -> None:
        sizes = self.sent([b"abc", b"", b"defgh", b"ij"], 10, 4)
        assert sizes == {1: b"abcd", 2: b"efgh", 3: b"ij"}

    def test_no_byte_is_copied(self) -> None:
        memory = bytearray(b"abcdef")
        parts = list(in_parts([memoryview(memory)[:4], memoryview(memory)[4:]], 5))
        memory[:] = b"ghijkl"
        assert [b"".join(part) for part in parts] == [b"ghijk", b"l"]

    def test_all_writers_together_send_no_more_parts_at_once_than_is_allowed(self) -> None:
        sending, most, lock = 0, 0, threading.Lock()

        def send(number: int, body: Body) -> dict[str, object]:
            nonlocal sending, most
            with lock:
                sending += 1
                most = max(most, sending)
            with lock:
                sending -= 1
            return {}

        with ThreadPoolExecutor(16) as writers:
            sent = list(writers.map(lambda _: send_parts([bytes(200)], 200, 2, send), range(16)))
        assert [len(parts) for parts in sent] == [100] * 16
        assert most <= PARALLEL_PARTS_OF_ALL

    def test_a_failed_send_gives_its_place_back(self) -> None:
        def send(number: int, body: Body) -> dict[str, object]:
            raise StoreError("no")

        for _ in range(PARALLEL_PARTS_OF_ALL + 1):
            with pytest.raises(StoreError, match="no"):
                send_parts([bytes(40)], 40, 2, send)
        assert self.sent([b"abc"], 3, 4) == {1: b"abc"}

    def sent(self, blocks: object, num_bytes: int, part_bytes: int) -> dict[int, bytes]:
        got: dict[int, bytes] = {}
        send: Callable[[int, Body], dict[str, object]] = lambda number, body: got.update({number: b"".join(body)}) or {}  # noqa: E731
        send_parts(blocks, num_bytes, part_bytes, send)  # type: ignore[arg-type]
        return got
