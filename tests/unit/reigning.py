"""A coordinator over a real socket and a real run log, for agents that are only reports."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from keepstep.orchestrator import config as configs
from keepstep.orchestrator.client import CoordinatorClient
from keepstep.orchestrator.coordinator import Coordinator
from keepstep.orchestrator.link import Link
from keepstep.orchestrator.logbook import opened_event
from keepstep.orchestrator.roots import claim, token_of
from keepstep.orchestrator.sections import RunConfig
from keepstep.orchestrator.server import application
from keepstep.orchestrator.wire import AgentReport, Directive
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store

NODES = ("node0#aaaa", "node1#bbbb")
PATIENCE_S = 30.0  # for an answer that must come


def two_nodes(root: Path) -> RunConfig:
    text = f'[run]\nroot = "{root}"\nsteps = 30\n[cluster]\nnodes = 2\nranks_per_node = 1\n[optimizer]\nwarmup_steps = 1\n'
    return configs.parse(text, "run.toml")


class Client(CoordinatorClient):
    """People's commands, and the conversations of agents: one connection each."""

    def __init__(self, url: str, token: str) -> None:
        super().__init__(url, token)
        self._token = token
        self.links: dict[str, Link] = {}

    async def connect(self, node: str) -> Link:
        self.links[node] = await Link.open(self.url, self._token, patience_s=PATIENCE_S)
        return self.links[node]

    async def close(self) -> None:
        for link in self.links.values():
            await link.close()
        await super().close()

    async def report(self, report: AgentReport) -> Directive:
        """What the node is told in answer."""
        link = self.links.get(report.node) or await self.connect(report.node)
        await link.tell(report)
        while (await link.hear())[1] != report:
            pass
        assert link.directive
        return link.directive

    async def until(self, node: str, holds: Callable[[Directive], bool]) -> Directive:
        """The first directive of the node of which this holds."""
        link = self.links[node]
        while link.directive is None or not holds(link.directive):
            await link.hear()
        return link.directive


@asynccontextmanager
async def reigning(root: Path) -> AsyncIterator[tuple[Coordinator, Client, list[dict[str, Any]]]]:
    config = two_nodes(root)
    store = Store.open(root)
    claim(store, config)
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    log = RunLog.open(store)
    log.open_term(run=config.run.name, identity=configs.identity(config), host="here", pid=1, url=url)
    said: list[dict[str, Any]] = []
    coordinator = Coordinator(config, store, log, said.append)
    runner = web.AppRunner(application(coordinator, token_of(store)), handler_cancellation=True)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    reign = asyncio.create_task(coordinator.reign(opened_event(log)))
    client = Client(url, token_of(store))
    async with client:
        try:
            while (await client.get("/v1/status")) and coordinator.run.read_at is None:
                await asyncio.sleep(0)
            yield coordinator, client, said
        finally:
            reign.cancel()
            await asyncio.gather(reign, return_exceptions=True)
            await runner.cleanup()


def report(node: str, sequence: int, **fields: Any) -> AgentReport:
    known = {"host": "here", "pid": 5, "address": "127.0.0.1", "slots": 1, "term": 1, "ready": True}
    return AgentReport(node=node, sequence=sequence, **{**known, **fields})


async def launched(client: Client, node: str) -> Directive:
    """The directive once it tells the node to launch."""
    return await client.until(node, lambda directive: directive.launch is not None)
