"""The two ends of the conversation between an agent and its coordinator, over a real socket."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from reigning import NODES, PATIENCE_S, reigning, report

from keepstep.orchestrator import links
from keepstep.orchestrator.client import CoordinatorRefused, CoordinatorUnreachable
from keepstep.orchestrator.link import Link
from keepstep.orchestrator.wire import AgentReport


def test_a_node_that_turns_away_is_not_taken_for_dead(tmp_path: Path) -> None:
    """On a machine with too much to do an agent is not answered in time: it begins another connection, and nothing else happens."""

    async def story() -> None:
        async with reigning(tmp_path) as (coordinator, client, _):
            for node in NODES:
                await client.report(report(node, 1))
            await client.links[NODES[0]].say_goodbye()
            await client.links[NODES[0]].close()
            while NODES[0] in coordinator._links:
                await asyncio.sleep(0)
            assert coordinator.run.members.nodes[NODES[0]].broken_at is None
            await client.connect(NODES[0])
            await client.report(report(NODES[0], 2))

    asyncio.run(story())


def test_who_is_silent_for_too_long_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links.AgentLink, "_idle_s", lambda _: 0.2)

    async def story() -> None:
        async with reigning(tmp_path) as (coordinator, client, _):
            await client.report(report(NODES[0], 1))
            with pytest.raises(CoordinatorUnreachable):
                await client.until(NODES[0], lambda _: False)
            await client.links[NODES[0]].close()
            await client.connect(NODES[0])
            await client.report(report(NODES[0], 2))
            assert NODES[0] in coordinator._links

    asyncio.run(story())


def test_an_agent_of_another_version_or_run_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with reigning(tmp_path) as (_, client, _):
            link = await client.connect(NODES[0])
            await link.tell(AgentReport.model_construct(node=NODES[0], sequence=1))
            with pytest.raises(CoordinatorRefused, match="agent and coordinator are of different versions"):
                await link.hear()
            with pytest.raises(CoordinatorRefused, match="401"):
                await Link.open(client.url, "wrong", patience_s=PATIENCE_S)

    asyncio.run(story())
