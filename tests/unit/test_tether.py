"""Proof of death: only when the last process that holds the connection has ended, and only when the kernel ended it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator

import pytest
from aiohttp import web

from keepstep.orchestrator.tether import PATH, NoTether, Tether, tie
from keepstep.orchestrator.vigil import keep

TOKEN = "a-token"


class Listener:
    """What a coordinator hears of tethers: who died, and that a connection ended, however it did."""

    def __init__(self) -> None:
        self.died: list[str] = []
        self.ended = asyncio.Event()
        self.url = ""
        self.transport: asyncio.Transport | None = None

    async def tether(self, request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == f"Bearer {TOKEN}"
        self.transport = request.transport
        try:
            return await keep(request, lambda: self.died.append(request.query["node"]))
        finally:
            self.ended.set()


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    heard = Listener()
    app = web.Application()
    app.add_routes([web.get(PATH, heard.tether)])
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    heard.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield heard
    await runner.cleanup()


@contextlib.contextmanager
def holding(tether: Tether) -> Iterator[subprocess.Popen[bytes]]:
    """A process that inherits the connection, and lives until it is killed."""
    descriptor = tether.socket.fileno()
    process = subprocess.Popen(["sleep", "1000"], pass_fds=[descriptor])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def tied(listener: Listener) -> Tether:
    return await tie(listener.url, TOKEN, "node1#ab12", within_s=10)


async def test_the_last_process_that_ends_proves_it(listener: Listener) -> None:
    tether = await tied(listener)
    with holding(tether) as one, holding(tether) as other:
        tether.socket.close()
        one.kill()
        one.wait()
        await asyncio.sleep(0)  # the loop looks once at what there is
        assert not listener.ended.is_set()
        other.kill()
        await listener.ended.wait()
    assert listener.died == ["node1#ab12"]


async def test_a_reset_proves_nothing(listener: Listener) -> None:
    tether = await tied(listener)
    with holding(tether) as process:
        tether.abandon()
        process.kill()
        await listener.ended.wait()
    assert listener.died == []


async def test_a_coordinator_that_closes_it_has_no_proof(listener: Listener) -> None:
    tether = await tied(listener)
    assert tether.leads_to(listener.url)
    assert not tether.leads_to("http://127.0.0.1:1")
    assert listener.transport
    listener.transport.close()
    await listener.ended.wait()
    assert await asyncio.get_running_loop().sock_recv(tether.socket, 1) == b""
    assert not tether.leads_to(listener.url), "its end can be read"
    tether.socket.close()
    assert listener.died == []


async def test_who_connects_through_somebody_else_gets_none(listener: Listener) -> None:
    target = listener.url.rpartition(":")[2]

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, downstream = await asyncio.open_connection("127.0.0.1", int(target))
        downstream.write(await reader.readuntil(b"\r\n\r\n"))
        writer.write(await upstream.read())
        writer.close()
        downstream.close()

    async with await asyncio.start_server(relay, "127.0.0.1", 0) as proxy:
        port = proxy.sockets[0].getsockname()[1]
        with pytest.raises(NoTether, match=r"409 Conflict a proxy stands between us: you connect from 127\.0\.0\.1 \d+, I see 127"):
            await tie(f"http://127.0.0.1:{port}", TOKEN, "node1#ab12", within_s=10)


async def test_whoever_cannot_be_reached_or_does_not_answer_gives_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(NoTether, match="TimeoutError"):
            await tie(f"http://127.0.0.1:{port}", TOKEN, "node1#ab12", within_s=0.05)
    with pytest.raises(NoTether, match="ConnectionRefusedError"):
        await tie(f"http://127.0.0.1:{port}", TOKEN, "node1#ab12", within_s=10)
    with pytest.raises(NoTether, match="not plain HTTP"):
        await tie("https://example.org", TOKEN, "node1#ab12", within_s=10)
