"""The coordinator's end of a tether (tether.py): held open, read, never written to. Tells a clean end of the stream from any other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web

from .tether import origin


class Vigil(asyncio.Protocol):
    """Takes a connection over from aiohttp, which does not say how one ended; gives its end back, so that the books are closed."""

    def __init__(self, http: asyncio.BaseProtocol, on_proof: Callable[[], None]) -> None:
        self._http = http
        self._on_proof = on_proof
        self._has_ended = False

    def eof_received(self) -> None:
        """The kernel closed the last descriptor. (That we close the connection, or that it breaks, comes without this.)"""
        self._has_ended = True

    def connection_lost(self, error: Exception | None) -> None:
        if self._has_ended and error is None:
            self._on_proof()
        self._http.connection_lost(error)  # cancels the handler


async def keep(request: web.Request, on_proof: Callable[[], None]) -> web.StreamResponse:
    """Holds the connection of a request until it ends. Raises HTTPConflict where somebody stands between."""
    transport = request.transport
    if transport is None:
        raise web.HTTPConflict(text="gone already\n")
    theirs, seen = request.query["from"], origin(transport.get_extra_info("peername"))
    if theirs != seen:
        raise web.HTTPConflict(text=f"a proxy stands between us: you connect from {theirs}, I see {seen}\n")
    answer = web.StreamResponse()
    answer.force_close()
    await answer.prepare(request)
    held: Any = transport
    held.set_protocol(Vigil(request.protocol, on_proof))
    await asyncio.Event().wait()  # until the connection's end cancels us
    raise AssertionError
