"""How a node finds its run, and reads its log, on machines that come and go."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from keepstep.orchestrator import config as configs
from keepstep.orchestrator.contact import Contact, address_towards, interface_of
from keepstep.orchestrator.lookout import Lookout
from keepstep.orchestrator.meeting import meet
from keepstep.orchestrator.roots import claim, token_of
from keepstep.orchestrator.sections import RunConfig
from keepstep.orchestrator.serving import own_address
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    config = configs.parse(f'[run]\nroot = "{tmp_path / "root"}"\nsteps = 3\n[optimizer]\nwarmup_steps = 1\n', "run.toml")
    claim(Store.open(config.run.root), config)
    return config


@asynccontextmanager
async def answering(config: RunConfig) -> AsyncIterator[Contact]:
    """Somebody who opened a term and hands out the config."""
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    store = Store.open(config.run.root)
    RunLog.open(store).open_term(run=config.run.name, identity=configs.identity(config), host="here", pid=1, url=url)
    app = web.Application()

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=config.model_dump_json())

    app.add_routes([web.get("/v1/config", answer)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    try:
        yield Contact(url=url, token=token_of(store))
    finally:
        await runner.cleanup()


async def test_a_node_that_was_told_a_url_finds_the_successor_after_its_own_restart(config: RunConfig, tmp_path: Path) -> None:
    async with answering(config) as contact:
        met, _, _ = await meet(contact, tmp_path)
        assert (met.url, met.root) == (contact.url, config.run.root)
    async with answering(config) as successor:
        again, _, _ = await meet(contact, tmp_path)
        assert again.url == successor.url != contact.url


async def test_a_memory_of_another_url_does_not_lead_to_another_run(config: RunConfig, tmp_path: Path) -> None:
    async with answering(config) as contact:
        await meet(contact, tmp_path)
        stranger = Contact(url="http://127.0.0.1:9", token=contact.token)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(meet(stranger, tmp_path), 0.2)


async def test_one_look_into_the_log_at_a_time_however_long_it_takes(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    lookout = Lookout(config.model_copy(update={"cluster": config.cluster.model_copy(update={"lease_s": 0.02})}))
    goes_on, looks = threading.Event(), list[int]()

    def stuck() -> tuple[()]:
        looks.append(1)
        goes_on.wait(10)
        return ()

    monkeypatch.setattr(lookout.log, "refresh", stuck)
    assert [await lookout.look() for _ in range(3)] == [None] * 3
    assert looks == [1]
    goes_on.set()
    assert await lookout.look() is not None


def test_the_address_for_other_machines_is_no_loopback_where_there_is_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")  # as on Debian, where the host's name is 127.0.1.1
    try:
        outward = address_towards("198.51.100.1")
    except OSError:
        outward = "127.0.0.1"
    assert own_address(socket.AF_INET) == outward
    assert ipaddress.ip_address(own_address(socket.AF_INET6)).version == 6


def test_an_interface_is_known_by_its_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") == ""
