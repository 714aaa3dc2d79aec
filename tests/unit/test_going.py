"""When a node that was told to go leaves."""

from __future__ import annotations

import asyncio

import pytest

from keepstep.orchestrator import going
from keepstep.orchestrator.errors import InputError
from keepstep.orchestrator.going import Going, shortened, signal_grace_s


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """After how many seconds the process would have been ended, whatever hangs."""
    seconds: list[float] = []
    monkeypatch.setattr(going, "_exit_after", seconds.append)
    return seconds


def test_the_time_ends_a_little_before_the_platform_takes_the_node() -> None:
    grace = shortened(None, "aws", 120, now=1000)
    assert (grace.stop_at, grace.until) == (1119.5, 1120)
    short = shortened(None, "aws", 0.5, now=1000)
    assert (short.stop_at, short.until) == (1000.4, 1000.5), "a short one keeps a fifth"
    assert shortened(None, "aws", 0, now=1000).stop_at == 1000


def test_a_repeated_or_longer_notice_changes_nothing_and_a_shorter_one_shortens() -> None:
    first = shortened(None, "aws", 120, now=1000)
    assert shortened(first, "aws", 120, now=1001) is first
    assert shortened(first, "SIGTERM", 119, now=1001) is first
    nearer = shortened(first, "SIGTERM", 30, now=1001)
    assert (nearer.why, nearer.until) == ("SIGTERM", 1031)


async def test_a_node_goes_when_nobody_needs_it_any_more(ends: list[float]) -> None:
    changes: list[str] = []
    needed = [True]
    node = Going(lambda: changes.append(node.why))
    assert (node.why, node.left_s) == ("", None)
    waiting = asyncio.create_task(node.wait(lambda: needed[0]))
    node.hear("got SIGTERM, 60 s are left", 60)
    node.hear("got SIGTERM, 60 s are left", 60)
    assert changes == ["got SIGTERM, 60 s are left"]
    assert ends == [60]
    assert node.left_s is not None
    assert 50 < node.left_s <= 59.5
    _, pending = await asyncio.wait({waiting}, timeout=0.1)
    assert pending, "it is needed"
    needed[0] = False
    await asyncio.wait_for(waiting, 10)


async def test_a_node_goes_when_its_time_is_over_needed_or_not(ends: list[float]) -> None:
    node = Going(lambda: None)
    waiting = asyncio.create_task(node.wait(lambda: True))
    node.hear("aws", 600)
    node.hear("got SIGTERM", 0.01)
    await asyncio.wait_for(waiting, 10)
    assert node.left_s == 0
    assert ends == [600, going.STOPPING_S], "its last words take a moment"


def test_the_environment_says_how_long_the_platform_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEEPSTEP_GRACE_S", raising=False)
    assert signal_grace_s(30) == 30
    monkeypatch.setenv("KEEPSTEP_GRACE_S", "55.5")
    assert signal_grace_s(30) == 55.5
    for wrong in ("soon", "-1", "inf", "nan"):
        monkeypatch.setenv("KEEPSTEP_GRACE_S", wrong)
        with pytest.raises(InputError, match=f"KEEPSTEP_GRACE_S = '{wrong}' must be a number of seconds"):
            signal_grace_s(30)
