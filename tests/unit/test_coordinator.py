"""The coordinator's shell over a real socket and a real run log, with agents that are only reports."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reigning import NODES, launched, reigning, report, two_nodes

from keepstep.orchestrator import cli, logbook, serving
from keepstep.orchestrator import config as configs
from keepstep.orchestrator.archive import read_events
from keepstep.orchestrator.client import CoordinatorClient, CoordinatorRefused
from keepstep.orchestrator.coordinator import Coordinator, NoAnswer
from keepstep.orchestrator.errors import InputError
from keepstep.orchestrator.lines import event_line, human_bytes, time_table
from keepstep.orchestrator.logbook import opened_event
from keepstep.orchestrator.roots import claim
from keepstep.orchestrator.wire import RankReport, RewindWish, StoreAddress
from keepstep.storage.layout import RUN_CONFIG_KEY, log_key
from keepstep.storage.records import Attempt, Finished, Rewind, encode
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store


def test_ready_nodes_are_told_to_launch_once_the_attempt_is_logged(tmp_path: Path) -> None:
    async def story() -> None:
        async with reigning(tmp_path) as (_, client, said):
            for node in NODES:
                await client.report(report(node, 1))
            first = await launched(client, NODES[0])
            assert first.launch
            assert (first.launch.attempt, first.launch.world_size, first.launch.store_node, first.launch.store) == (1, 2, NODES[0], None)
            attempts = [record for record in RunLog.open(Store.open(tmp_path)).records if isinstance(record, Attempt)]
            assert [(record.attempt, record.nodes, record.nonce) for record in attempts] == [(1, NODES, first.launch.nonce)]
            assert any(event["kind"] == "starting" for event in said)

            address = StoreAddress(attempt=1, host="127.0.0.1", port=4711)
            told = await client.report(report(NODES[0], 2, attempt=0, store=address))
            assert told.launch
            assert told.launch.store == address
            second = await client.until(NODES[1], lambda directive: directive.launch is not None and directive.launch.store is not None)
            assert second.launch
            assert (second.launch.first_rank, second.launch.store) == (1, address)

    asyncio.run(story())


def test_a_killed_rank_drains_the_attempt_and_reaches_events_and_status(tmp_path: Path) -> None:
    def running(rank: int, **fields: Any) -> RankReport:
        return RankReport(**{"rank": rank, "local_rank": 0, "pid": 9, "state": "running", "phase": 2, "step": 3, **fields})

    async def story() -> None:
        async with reigning(tmp_path) as (_, client, _):
            for node in NODES:
                await client.report(report(node, 1))
            await launched(client, NODES[0])
            for rank, node in enumerate(NODES):
                await client.report(report(node, 2, attempt=1, ranks=(running(rank),)))
            status = json.loads(await client.get("/v1/status"))
            assert (status["phase"], status["step"]) == ("TRAINING", 3)
            dead = running(1, state="exited", exit_code=-9, kind="signal", why="SIGKILL", exit_order=0)
            answer = await client.report(report(NODES[1], 3, attempt=1, ranks=(dead,)))
            assert answer.launch is None
            stopped = running(0, state="exited", exit_code=-9, kind="signal", why="SIGKILL", exit_order=0, stopped_by_agent=True)
            await client.report(report(NODES[0], 3, attempt=1, ranks=(stopped,)))

    asyncio.run(story())
    (failure,) = [event for event in read_events(Store.open(tmp_path)) if event["kind"] == "failure"]
    assert (failure["rank"], failure["node"], failure["cause"]) == (1, NODES[1], "signal")
    assert failure["why"] == "rank 1 on node1#bbbb was killed by SIGKILL at step 3"


def test_people_send_a_live_run_back_with_other_settings(tmp_path: Path) -> None:
    async def story() -> None:
        async with reigning(tmp_path) as (coordinator, client, said):
            for node in NODES:
                await client.report(report(node, 1))
            await launched(client, NODES[0])
            override = ["run.steps=20", "optimizer.lr=0.001"]
            wish = RewindWish(to=0, skip=("64:96",), override=tuple(override))
            asked = asyncio.create_task(client.send("/v1/rewind", wish))
            await client.until(NODES[0], lambda directive: directive.launch is None)
            with pytest.raises(CoordinatorRefused, match="another rewind is just being written"):
                await client.send("/v1/rewind", RewindWish(to=0))
            for node in NODES:
                stopped = RankReport(
                    rank=NODES.index(node), local_rank=0, pid=9, state="exited", exit_code=-9, kind="signal", stopped_by_agent=True
                )
                await client.report(report(node, 2, attempt=1, ranks=(stopped,)))
            where = "going back to the beginning, leaving out the samples at 64:96, with run.steps=20, optimizer.lr=0.001"
            assert (await asked).decode() == f"{where}: all ranks are stopped, the next attempt begins there\n"
            again = await launched(client, NODES[0])
            assert again.launch
            assert (again.launch.attempt, again.launch.skips, again.launch.overrides) == (2, ("64:96",), tuple(override))
            status = json.loads(await client.get("/v1/status"))
            assert (status["steps"], status["skips"], status["overrides"], status["rewinds"]) == (20, ["64:96"], override, 0)
            assert json.loads(await client.get("/v1/config"))["optimizer"]["lr"] == 0.001
            assert coordinator.run.policy.steps == 20
            coordinator._told_step = -1
            coordinator._tell_progress()
            assert said[-1]["steps"] == 20
            assert any(event["kind"] == "rewound" for event in said)
            with pytest.raises(CoordinatorRefused, match="must be greater than 0"):
                await client.send("/v1/rewind", RewindWish(to=0, override=("optimizer.lr=-1",)))
            with pytest.raises(CoordinatorRefused, match="--to 19: the run has only reached step"):
                await client.send("/v1/rewind", RewindWish(to=19))

    asyncio.run(story())


def test_a_wish_that_came_to_nothing_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was to be gone back to is gone by the time that the ranks are stopped."""
    monkeypatch.setattr(logbook, "why_no_rewind", lambda *_: "there is no usable checkpoint any more")

    async def story() -> None:
        async with reigning(tmp_path) as (_, client, said):
            for node in NODES:
                await client.report(report(node, 1))
            await launched(client, NODES[0])
            asked = asyncio.create_task(client.send("/v1/rewind", RewindWish(to=0)))
            await client.until(NODES[0], lambda directive: directive.launch is None)
            for node in NODES:
                stopped = RankReport(
                    rank=NODES.index(node), local_rank=0, pid=9, state="exited", exit_code=-9, kind="signal", stopped_by_agent=True
                )
                await client.report(report(node, 2, attempt=1, ranks=(stopped,)))
            with pytest.raises(CoordinatorRefused, match="not rewound: there is no usable checkpoint any more"):
                await asked
            assert not any(event["kind"] == "rewound" for event in said)
            assert (await launched(client, NODES[0])).launch, "the run goes on"

    asyncio.run(story())


def test_a_wish_that_nobody_understands_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with reigning(tmp_path) as (_, client, _):
            with pytest.raises(CoordinatorRefused, match="greater than or equal to 0"):
                await client.send("/v1/rewind", RewindWish.model_construct(to=-1))

    asyncio.run(story())


def test_a_coordinator_begins_with_the_overrides_of_the_log(tmp_path: Path) -> None:
    config = two_nodes(tmp_path)
    log = RunLog.open(Store.open(tmp_path))
    term = log.open_term(run=config.run.name, identity=configs.identity(config), host="here", pid=1).term
    log.append(Attempt(term=term, attempt=1, nodes=NODES, world_size=2, nonce="n"))
    log.append(Rewind(term=term, directory="", step=-1, overrides=("train.spike.budget=7",), why="p"))

    async def story() -> None:
        async with reigning(tmp_path) as (coordinator, _, _):
            assert (coordinator.config.train.spike.budget, coordinator.run.policy.rewinds) == (7, 7)

    asyncio.run(story())


def test_a_node_that_has_not_reported_is_told_nothing(tmp_path: Path) -> None:
    """ "Run nothing" would stop ranks that a new coordinator is about to adopt."""

    async def story() -> None:
        async with reigning(tmp_path) as (coordinator, client, _):
            with pytest.raises(NoAnswer, match="has not reported to term 1"):
                coordinator.orders_for(NODES[0])
            assert (await client.report(report(NODES[0], 1))).launch is None

    asyncio.run(story())


def test_an_answer_names_the_report_that_it_is_about_and_news_none(tmp_path: Path) -> None:
    """A lease counts from when a report was told: what the coordinator says unasked proves nothing about now."""

    async def story() -> None:
        async with reigning(tmp_path) as (coordinator, client, _):
            link = await client.connect(NODES[0])
            first = report(NODES[0], 1)
            await link.tell(first)
            answer, heard, _ = await link.hear()
            assert (answer.heard, heard) == (1, first)
            assert answer.directive
            await client.report(report(NODES[1], 1))
            while link.directive == answer.directive:
                news, heard, _ = await link.hear()
                assert (news.heard, heard) == (1, None)
            coordinator.run = replace(coordinator.run, read_at=None)  # as if nobody had been able to read the log in this term
            await link.tell(report(NODES[0], 2))
            while not (news := (await link.hear())[0]).unable:
                pass
            assert (news.heard, news.unable) == (-1, "the run log could not be read for a while: read it yourself")

    asyncio.run(story())


def test_the_end_of_a_connection_that_was_given_up_is_no_news(tmp_path: Path) -> None:
    async def story() -> None:
        async with reigning(tmp_path) as (coordinator, client, _):
            await client.report(report(NODES[0], 1))
            old = client.links[NODES[0]]
            await client.connect(NODES[0])
            await client.report(report(NODES[0], 2))
            given_up = coordinator._links[NODES[0]]
            await old.close()
            await client.report(report(NODES[0], 3))
            assert (coordinator._links[NODES[0]], coordinator.run.members.nodes[NODES[0]].broken_at) == (given_up, None)
            await client.links[NODES[0]].close()
            while coordinator.run.members.nodes[NODES[0]].broken_at is None:
                await asyncio.sleep(0)

    asyncio.run(story())


@pytest.mark.parametrize("path", ["/v1/status", "/v1/config", "/metrics"])
def test_every_call_needs_the_token(tmp_path: Path, path: str) -> None:
    async def story() -> None:
        async with reigning(tmp_path) as (_, client, _), CoordinatorClient(client.url, "wrong") as stranger:
            assert await client.get(path)
            with pytest.raises(CoordinatorRefused, match="wrong token"):
                await stranger.get(path)

    asyncio.run(story())


def test_metrics_name_what_people_watch(tmp_path: Path) -> None:
    async def story() -> str:
        async with reigning(tmp_path) as (_, client, _):
            return (await client.get("/metrics")).decode()

    text = asyncio.run(story())
    names = ("keepstep_attempts_total", "keepstep_lost_steps_total", "keepstep_goodput_ratio", "keepstep_last_recovery_seconds")
    for name in (*names, 'keepstep_time_seconds{class="wait"}', 'keepstep_phase{phase="WAITING"} 1.0'):
        assert name in text


def test_lines_for_people() -> None:
    event = {"at": "2026-11-22T04:05:06.789Z", "kind": "failure", "attempt": 2, "step": 41, "rank": 3, "why": "rank 3 was killed"}
    assert event_line(event) == "04:05:06 failure    attempt 2, step 41: rank 3 was killed"
    told = event_line(event | {"detail": ("Traceback", "ValueError: x")})
    assert told.splitlines()[1:] == ["    | Traceback", "    | ValueError: x"]
    assert event_line({"kind": "waiting", "attempt": 0, "step": -1, "why": "w"}) == "waiting    w"
    assert (human_bytes(10), human_bytes(3 << 20)) == ("10 B", "3.0 MiB")


def test_the_table_of_where_the_time_went_leaves_out_what_took_none() -> None:
    assert time_table({"productive": 90.0, "redone": 0.0, "stall": 10.0, "away": 100.0}) == [
        "where the time went    seconds    share",
        "  productive              90.0   90.0 %",
        "  stall                   10.0   10.0 %",
        "  away                   100.0        -",
        "  all                    200.0",
    ]
    assert time_table({"productive": 0.0}) == []


def test_a_bug_has_an_exit_code_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise RuntimeError("never meant to happen")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 70
    assert "never meant to happen" in capsys.readouterr().err


def test_what_is_wrong_with_the_log_is_told_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with reigning(tmp_path) as (coordinator, _, said):
            number = coordinator.log.count
            zombie = encode(Finished(term=7, step=1, outcome="stopped", why="x"), sequence=number, uuid="z", previous=coordinator.log.head)
            coordinator.store.put_new(log_key(number), zombie)
            for _ in range(2):
                await coordinator._read_log_once()
            told = [event["why"] for event in said if event["kind"] == "alarm"]
            assert told == [f"run log: record {number} is void: finished of term 7 while term 1 is open"]

    asyncio.run(story())


def test_a_broken_loop_ends_the_reign_instead_of_standing_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = two_nodes(tmp_path)
    store = Store.open(tmp_path)
    claim(store, config)
    log = RunLog.open(store)
    log.open_term(run=config.run.name, identity=configs.identity(config), host="here", pid=1, url="http://127.0.0.1:9")

    async def story() -> None:
        coordinator = Coordinator(config, store, log, lambda event: None)

        def broken() -> None:
            raise RuntimeError("a bug in the loop")

        monkeypatch.setattr(coordinator, "_tell_progress", broken)
        with pytest.raises(RuntimeError, match="a bug in the loop"):
            await asyncio.wait_for(coordinator.reign(opened_event(log)), 10)

    asyncio.run(story())


def test_of_two_runs_that_found_the_root_empty_one_has_it(tmp_path: Path) -> None:
    """Both claimed it before either had a term in the log; the slower claim overwrote the config of the other."""
    first = two_nodes(tmp_path / "root")
    second = first.model_copy(update={"run": first.run.model_copy(update={"seed": 9})})
    store = Store.open(tmp_path / "root")
    store.put(RUN_CONFIG_KEY, configs.to_toml(second).encode())
    serving._open_term(RunLog.open(store), first, "http://first")
    with pytest.raises(InputError, match="the root holds run"):
        serving._open_term(RunLog.open(store), second, "http://second")
    claim(store, first)
    with pytest.raises(InputError, match="holds another run"):
        claim(store, second)


def test_a_bug_in_carrying_out_a_request_ends_the_reign(tmp_path: Path) -> None:
    async def story() -> None:
        async with reigning(tmp_path) as (coordinator, client, _):
            coordinator._logbook.carry_out = lambda _: 1 / 0  # type: ignore[assignment, method-assign]
            for node in NODES:
                await client.report(report(node, 1))
            with pytest.raises(ZeroDivisionError):
                await coordinator._ended

    asyncio.run(story())
