"""Proof of death: a TCP connection that all processes of a node hold which could step, so that the kernel tells when the last is gone.

An agent opens it to its coordinator before it launches anything; its launchers and ranks, and what they fork, inherit the descriptor.
Nobody ever sends on it. When the last of them has ended, however it ended, the kernel closes the connection, and the coordinator reads
a clean end of the stream. A reset, a time-out and silence prove nothing: the host or the network may be gone, and the ranks may run.

What it relies on: no rank closes a descriptor that it does not know and lives on; and nobody between agent and coordinator ends TCP
connections cleanly of his own accord, as a proxy does. The agent says from where it connects, and a coordinator that sees the connection
come from elsewhere does not take it. `cluster.proof_of_death = false` switches it off.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from urllib.parse import urlencode, urlsplit

from .client import AT_ONCE

PATH = "/v1/tether"
MAX_ANSWER_BYTES = 16384
END_OF_HEAD = b"\r\n\r\n"


class NoTether(Exception):
    """There will be no proof of this node's death: its lease must do. Says why."""


class Tether:
    """One connection of one incarnation to one coordinator."""

    def __init__(self, held: socket.socket, url: str) -> None:
        self.socket = held
        self._url = url

    def leads_to(self, url: str) -> bool:
        """Whether it stands, and to this coordinator. (Whatever can be read from it is its end.)"""
        return self._url == url and not select.select([self.socket], [], [], 0)[0]

    def abandon(self) -> None:
        """Whoever held it lives on, or may: however it ends from here on, it proves nothing."""
        with contextlib.suppress(OSError):  # it is broken already
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
        self.socket.close()


async def tie(url: str, token: str, node: str, *, within_s: float) -> Tether:
    """Raises NoTether."""
    try:
        async with asyncio.timeout(within_s):
            return Tether(await _connect(url, token, node), url)
    except (OSError, TimeoutError) as error:
        raise NoTether(f"{type(error).__name__} {error}") from error


async def _connect(url: str, token: str, node: str) -> socket.socket:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise NoTether(f"{url} is not plain HTTP")
    loop = asyncio.get_running_loop()
    family, kind, protocol, _, address = (await loop.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM))[0]
    with contextlib.ExitStack() as undo:
        held = undo.enter_context(socket.socket(family, kind, protocol))
        held.setblocking(False)
        await loop.sock_connect(held, address)
        await loop.sock_sendall(held, _request(parts.netloc, token, node, held.getsockname()))
        await _read_consent(held)
        undo.pop_all()
    return held


def _request(host: str, token: str, node: str, ours: tuple[str, int]) -> bytes:
    query = urlencode({"node": node, "from": origin(ours)})
    return f"GET {PATH}?{query} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n".encode()


def origin(address: tuple[str, int]) -> str:
    """One end of a connection: "10.0.0.7 43210"."""
    return f"{address[0].partition('%')[0]} {address[1]}"


async def _read_consent(held: socket.socket) -> None:
    """All of the answer: what nobody reads would turn the end of the stream into a reset."""
    loop, answer = asyncio.get_running_loop(), b""
    while END_OF_HEAD not in answer and len(answer) < MAX_ANSWER_BYTES and (more := await loop.sock_recv(held, MAX_ANSWER_BYTES)):
        answer += more
    head, _, body = answer.partition(END_OF_HEAD)
    status = head.decode(errors="replace").partition("\r\n")[0]
    if not status.startswith("HTTP/1.1 200 "):
        raise NoTether(f"the coordinator answered {status or 'nothing'} {body.decode(errors='replace').strip()}")
