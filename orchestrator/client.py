"""HTTP from an agent or the CLI to the coordinator: a token on every call, a deadline on every wait.

Deadlines decide how soon a node is heard again after its cable was cut for a moment: TCP sends what was lost again after 0.2, 0.4, 0.8, ...
seconds, so that a call which met a cut of 1.5 s is answered after 3. A new call on a new connection is answered at once.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from types import TracebackType
from typing import Any

import aiohttp

from .wire import AgentReport, Directive, Message

LONG_POLL_S = 1.0  # the server answers at the latest after this time; also the floor of the report period
CALL_TIMEOUT_S = 5.0
AT_ONCE = struct.pack("ii", 1, 0)  # of SO_LINGER


class CoordinatorUnreachable(ConnectionError):
    """No answer: the coordinator is dead, away, or its network is. Says nothing about which."""


class CoordinatorUnable(CoordinatorUnreachable):
    """It answered, but could not do what was asked, or not now. Whoever only wants to be heard asks again, as after no answer."""


class CoordinatorRefused(PermissionError):
    """The coordinator answered, and does not want us (wrong token, other run)."""


class CoordinatorClient:
    """Calls of one coordinator at one address. Every method raises CoordinatorUnreachable or CoordinatorRefused.

    Args:
        patience_s: for the answer to a call that is not meant to wait; a connection must stand within half of it (a kernel that hears
            nothing begins again after 1 s only).
    """

    def __init__(self, url: str, token: str, *, patience_s: float = CALL_TIMEOUT_S) -> None:
        self.url = url.rstrip("/")
        self._patience_s = patience_s
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {token}"},
            connector=aiohttp.TCPConnector(limit=8, socket_factory=_abrupt_socket),
        )

    async def __aenter__(self) -> CoordinatorClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        await self._session.close()

    async def retire(self) -> None:
        """Closes when every call under way has had its time. A coordinator that was succeeded must not take our turning away for our death:
        until it has read the log, it would drain the attempt."""
        try:
            await asyncio.sleep(LONG_POLL_S + self._patience_s)
        finally:
            await self.close()

    async def report(self, report: AgentReport) -> Directive:
        """Tells the node's whole state; the answer is what it should be doing now."""
        return Directive.model_validate_json(await self._call("POST", "/v1/report", data=report.model_dump_json().encode()))

    async def directive(self, node: str, known: str) -> Directive:
        """Long poll: answers as soon as the directive differs from the one whose digest is `known`, else after LONG_POLL_S."""
        params = {"node": node, "known": known}
        return Directive.model_validate_json(await self._call("GET", "/v1/directive", params=params, waits_s=LONG_POLL_S))

    async def get(self, path: str, **params: str) -> bytes:
        return await self._call("GET", path, params=params)

    async def post(self, path: str, **params: str) -> bytes:
        return await self._call("POST", path, params=params)

    async def send(self, path: str, message: Message) -> bytes:
        return await self._call("POST", path, data=message.model_dump_json().encode())

    async def _call(self, method: str, path: str, *, waits_s: float = 0.0, **arguments: Any) -> bytes:
        timeout = aiohttp.ClientTimeout(total=waits_s + self._patience_s, sock_connect=min(2.0, self._patience_s / 2))
        try:
            async with self._session.request(method, self.url + path, timeout=timeout, **arguments) as answer:
                body = await answer.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise CoordinatorUnreachable(f"no answer from {self.url}{path}: {type(error).__name__} {error}") from error
        if answer.status in (401, 403, 404, 409):
            raise CoordinatorRefused(f"{self.url}{path}: {answer.status} {body.decode(errors='replace').strip()}")
        if answer.status != 200:
            raise CoordinatorUnable(f"{self.url}{path}: {answer.status} {body.decode(errors='replace').strip()[:200]}")
        return body


def _abrupt_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """Closing it forgets what was not delivered. A long poll that was given up while the cable was cut must not arrive when it is back,
    its end right behind it: a broken poll is how a coordinator notices the death of an agent."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
    return made
