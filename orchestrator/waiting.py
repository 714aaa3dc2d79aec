"""Waits that end, by what was waited for, by the clock or by a cancellation.

Not `asyncio.wait_for`: before Python 3.12 it swallows a cancellation that comes together with the result, and who cancelled waits for ever.
`asyncio.timeout` does not.
"""

from __future__ import annotations

import asyncio


async def is_set_within(event: asyncio.Event, seconds: float) -> bool:
    """Whether it was set in time."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
