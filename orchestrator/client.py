"""HTTP from people's commands to the coordinator: a token on every call, a deadline on every wait. (Agents: link.py.)"""

from __future__ import annotations

import socket
import struct
from types import TracebackType
from typing import Any

import aiohttp

from .wire import Message

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
            connector=abrupt_connector(),
        )

    async def __aenter__(self) -> CoordinatorClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        await self._session.close()

    async def get(self, path: str, **params: str) -> bytes:
        return await self._call("GET", path, params=params)

    async def post(self, path: str, **params: str) -> bytes:
        return await self._call("POST", path, params=params)

    async def send(self, path: str, message: Message) -> bytes:
        return await self._call("POST", path, data=message.model_dump_json().encode())

    async def _call(self, method: str, path: str, **arguments: Any) -> bytes:
        timeout = aiohttp.ClientTimeout(total=self._patience_s, sock_connect=min(2.0, self._patience_s / 2))
        try:
            async with self._session.request(method, self.url + path, timeout=timeout, **arguments) as answer:
                body = await answer.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise CoordinatorUnreachable(f"no answer from {self.url}{path}: {type(error).__name__} {error}") from error
        if answer.status != 200:
            raise refusal(self.url + path, answer.status, body.decode(errors="replace"))
        return body


def refusal(where: str, status: int, text: str) -> CoordinatorRefused | CoordinatorUnable:
    """What an answer other than 200 means."""
    if status in (401, 403, 404, 409):
        return CoordinatorRefused(f"{where}: {status} {text.strip()}")
    return CoordinatorUnable(f"{where}: {status} {text.strip()[:200]}")


def abrupt_connector() -> aiohttp.TCPConnector:
    """Closing one of its connections forgets what was not delivered. What was said while a cable was cut, and given up, must not arrive
    when the cable is back, its end right behind it: a broken connection is how a coordinator notices the death of an agent."""
    return aiohttp.TCPConnector(limit=8, socket_factory=_abrupt_socket)


def _abrupt_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
    return made
