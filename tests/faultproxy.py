"""An HTTP/1.1 proxy in front of the real S3 server that breaks what it is told to, request by request.

    with fault_proxy(server.endpoint_url) as proxy:
        proxy.script(On(Answer.of(503, "SlowDown"), r"PUT .*/log/", times=3))

Runs on a loop of its own in a thread of the test's process. Requests are forwarded one by one, so that each one's fate is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Answer:
    """The proxy answers itself; the server never hears of the request."""

    status: int
    body: bytes

    @staticmethod
    def of(status: int, code: str) -> Answer:
        """An S3 error document."""
        text = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>the proxy says so</Message></Error>"
        return Answer(status, text.encode())


@dataclass(frozen=True, slots=True)
class Late:
    seconds: float


@dataclass(frozen=True, slots=True)
class ResetUpload:
    """The connection is reset after so many bytes of the request's body; nothing reaches the server."""

    after: int


@dataclass(frozen=True, slots=True)
class ResetDownload:
    """The connection is reset after so many bytes of the answer's body."""

    after: int


@dataclass(frozen=True, slots=True)
class BlackHole:
    """The connection stays open, nothing comes, nothing reaches the server."""


@dataclass(frozen=True, slots=True)
class Dribble:
    """The answer's body comes byte by byte, with a pause after each."""

    pause_s: float


@dataclass(frozen=True, slots=True)
class LostAnswer:
    """The server does what was asked; the connection is reset before its answer."""


@dataclass(frozen=True, slots=True)
class Corrupt:
    """One bit of the answer's body is flipped."""


Fault = Answer | Late | ResetUpload | ResetDownload | BlackHole | Dribble | LostAnswer | Corrupt


@dataclass(slots=True)
class On:
    """`fault` for `times` of the requests in whose "METHOD /path?query" the pattern is found, after `skip` of them."""

    fault: Fault
    pattern: str
    times: int = 1 << 62
    skip: int = 0

    def takes(self, line: str) -> bool:
        if not self.times or not re.search(self.pattern, line):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class _Reset(Exception):
    """This connection ends with RST."""


@dataclass(frozen=True, slots=True)
class _Head:
    """First line and headers of a message, verbatim; `length` of its body, None for chunked."""

    raw: bytes
    length: int | None

    @property
    def line(self) -> str:
        return self.raw.split(b"\r\n", 1)[0].decode()

    @staticmethod
    async def read(reader: asyncio.StreamReader) -> _Head:
        raw = await reader.readuntil(b"\r\n\r\n")
        is_chunked = re.search(rb"(?i)\r\ntransfer-encoding: *chunked", raw)
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", raw)
        return _Head(raw, None if is_chunked else int(length[1]) if length else 0)


class FaultProxy:
    """Thread-safe: `script` may be changed while requests run. `seen`: (request line, fault) of each request that came."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._rules: list[On] = []
        self._lock = threading.Lock()
        self.seen: list[tuple[str, Fault | None]] = []
        self.endpoint_url = ""

    def script(self, *rules: On) -> None:
        """Replaces the rules; the first that takes a request decides."""
        with self._lock:
            self._rules = list(rules)
            self.seen = []

    def num_seen(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line, _ in self.seen)

    def _choose(self, line: str) -> Fault | None:
        with self._lock:
            fault = next((rule.fault for rule in self._rules if rule.takes(line)), None)
            self.seen.append((line, fault))
            return fault

    async def serve(self) -> asyncio.Server:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=1 << 20)
        self.endpoint_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await self._exchange(reader, writer)
        except (_Reset, ConnectionError):
            _reset(writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError):
            writer.close()  # the client has left, or the test

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await _Head.read(reader)
        fault = self._choose(head.line.rpartition(" ")[0])
        if b"100-continue" in head.raw:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        match fault:
            case BlackHole():
                await reader.read()  # until the client gives up
                raise _Reset
            case ResetUpload(after):
                await reader.readexactly(min(after, head.length or 0))
                raise _Reset
            case Answer(status, body):
                await _drop(reader, head)
                writer.write(
                    f"HTTP/1.1 {status} Said\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
                )
                await writer.drain()
            case _:
                await self._forward(head, reader, writer, fault)

    async def _forward(self, head: _Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault | None) -> None:
        if isinstance(fault, Late):
            await asyncio.sleep(fault.seconds)
        up_reader, up_writer = await asyncio.open_connection(self._host, self._port, limit=1 << 20)
        try:
            up_writer.write(re.sub(rb"(?i)\r\nexpect:[^\r]*", b"", head.raw))
            async for piece in _body(reader, head):
                up_writer.write(piece)
                await up_writer.drain()
            answer = await _Head.read(up_reader)
            if isinstance(fault, LostAnswer):
                raise _Reset
            writer.write(answer.raw)
            if not head.raw.startswith(b"HEAD"):
                await _relay(_body(up_reader, answer), writer, fault)
            await writer.drain()
        finally:
            up_writer.close()


async def _relay(body: AsyncIterator[bytes], writer: asyncio.StreamWriter, fault: Fault | None) -> None:
    sent = 0
    async for piece in body:
        match fault:
            case ResetDownload(after) if sent + len(piece) > after:
                writer.write(piece[: after - sent])
                await writer.drain()
                raise _Reset
            case Dribble(pause_s):
                for byte in piece:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(pause_s)
            case Corrupt() if not sent:
                writer.write(bytes([piece[0] ^ 1]) + piece[1:])
            case _:
                writer.write(piece)
        await writer.drain()
        sent += len(piece)


async def _body(reader: asyncio.StreamReader, head: _Head) -> AsyncIterator[bytes]:
    """The pieces of a body, verbatim."""
    if head.length is None:
        while True:
            size = await reader.readuntil(b"\r\n")
            yield size + await reader.readexactly(int(size.split(b";")[0], 16) + 2)
            if int(size.split(b";")[0], 16) == 0:
                return
    left = head.length
    while left:
        piece = await reader.read(min(left, CHUNK))
        if not piece:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(piece)
        yield piece


async def _drop(reader: asyncio.StreamReader, head: _Head) -> None:
    async for _ in _body(reader, head):
        pass


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):  # closed already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.contextmanager
def fault_proxy(target: str) -> Iterator[FaultProxy]:
    """A proxy in front of http://host:port, without faults until it is given a script."""
    proxy, loop = FaultProxy(target), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="fault proxy", daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(proxy.serve(), loop).result(timeout=10)
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(_stop(server), loop).result(timeout=10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)
        loop.close()


async def _stop(server: asyncio.Server) -> None:
    """A connection that was just accepted gets its task some turns later: whatever comes is ended, until nothing has come for a while."""
    server.close()
    quiet = 0
    while quiet < 5:
        await asyncio.sleep(0)  # closed transports are told
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.sleep(0)  # each has had its first moment: cancelled before, it would close nothing
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        quiet = 0 if others else quiet + 1
