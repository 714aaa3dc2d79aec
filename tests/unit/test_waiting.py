"""A wait that is cancelled ends, whatever comes together with the cancellation."""

from __future__ import annotations

import asyncio

import pytest

from keepstep.orchestrator.waiting import is_set_within


async def test_an_event_is_set_in_time_or_not() -> None:
    event = asyncio.Event()
    assert not await is_set_within(event, 0.01)
    event.set()
    assert await is_set_within(event, 0)


@pytest.mark.parametrize("turns", range(4), ids="{} turns of the loop in between".format)
async def test_a_cancellation_that_comes_with_the_event_is_not_swallowed(turns: int) -> None:
    event = asyncio.Event()

    async def serve() -> None:
        while True:
            event.clear()
            await is_set_within(event, 60)

    task = asyncio.create_task(serve())
    await asyncio.sleep(0)
    event.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=10)
    assert done, "it goes on for ever, and so does who waits for its end"
