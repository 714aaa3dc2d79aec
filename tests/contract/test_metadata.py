"""The sources of notices against services that behave like the real ones, and against some that do not behave."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from metadata_server import MetadataServer, Trouble

from keepstep.orchestrator import watching
from keepstep.orchestrator.watching import watch_notices

DEADLINE_S = 30.0
DEFAULT_S = 7.0
AWS = "/latest/meta-data/spot/instance-action"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MetadataServer]:
    for source in (watching.Aws, watching.Gcp, watching.Azure, watching.File):
        monkeypatch.setattr(source, "period_s", 0.01)
    with MetadataServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


class Ear:
    """Everything that is heard while a source is watched."""

    def __init__(self, *names: str) -> None:
        self.heard: list[tuple[str, float]] = []
        self._names = names
        self._news = asyncio.Event()

    def hear(self, why: str, seconds: float) -> None:
        self.heard.append((why, seconds))
        self._news.set()

    async def __aenter__(self) -> Ear:
        self._task = asyncio.create_task(watch_notices(self._names, DEFAULT_S, self.hear))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert not self._task.done(), "it watches as long as the agent lives"
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def next(self) -> tuple[str, float]:
        async with asyncio.timeout(DEADLINE_S):
            await self._news.wait()
        self._news.clear()
        return self.heard[-1]


async def until_asked(server: MetadataServer, path: str, times: int) -> None:
    """The source has looked so often, and found nothing to tell."""
    async with asyncio.timeout(DEADLINE_S):
        while server.asked[path] < times:
            await asyncio.sleep(0.005)


async def test_aws_tells_its_notice_once_and_a_nearer_one_again(server: MetadataServer) -> None:
    async with Ear("aws") as ear:
        await until_asked(server, AWS, 3)
        assert ear.heard == []
        server.interrupt_aws(100)
        why, seconds = await ear.next()
        assert why.startswith("aws: terminate in ")
        assert 100 - DEADLINE_S < seconds <= 100
        asked = server.asked[AWS]
        await until_asked(server, AWS, asked + 3)
        assert len(ear.heard) == 1
        server.interrupt_aws(10)
        assert (await ear.next())[1] <= 10
    assert server.asked["/latest/api/token"] == 1, "one token for many questions"


async def test_an_expired_token_of_aws_is_replaced(server: MetadataServer, capsys: pytest.CaptureFixture[str]) -> None:
    async with Ear("aws") as ear:
        await until_asked(server, AWS, 2)
        server.interrupt_aws(100)
        server.expire_tokens()
        await ear.next()
    assert capsys.readouterr().err == ""


async def test_google_answers_as_soon_as_its_value_changes(server: MetadataServer) -> None:
    path = "/computeMetadata/v1/instance/preempted"
    async with Ear("gcp") as ear:
        await until_asked(server, path, 2)  # the second question is held
        server.preempt_gcp()
        assert await ear.next() == ("gcp: preempted in 30 s", 30)
    assert server.asked[path] <= 4, "it is not asked over and over"


async def test_azure_tells_only_what_names_this_machine(server: MetadataServer) -> None:
    async with Ear("azure") as ear:
        server.schedule_azure("vm_1", "vm_2")
        await until_asked(server, "/metadata/scheduledevents", 3)
        assert ear.heard == []
        server.schedule_azure("vm_0", kind="Terminate", in_s=300)
        why, seconds = await ear.next()
        assert why.startswith("azure: Terminate in ")
        assert 300 - DEADLINE_S < seconds <= 300


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["hangs", "nonsense", "refuses"])
async def test_a_service_that_does_not_behave_gives_no_notice_is_named_once_and_asked_again(
    server: MetadataServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trouble: Trouble
) -> None:
    monkeypatch.setattr(watching, "ANSWER_S", 0.2 if trouble == "hangs" else DEADLINE_S)
    server.trouble = trouble
    async with Ear("aws", "gcp", "azure") as ear:
        paths = ("/latest/api/token", "/computeMetadata/v1/instance/preempted", "/metadata/instance/compute/name")
        for path in paths:
            await until_asked(server, path, 2)
        assert ear.heard == []
        server.trouble = ""
        monkeypatch.setattr(watching, "ANSWER_S", DEADLINE_S)
        for announce in (server.interrupt_aws, server.preempt_gcp, lambda: server.schedule_azure("vm_0")):
            announce()
            await ear.next()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(set(lines)) >= len(paths), lines
    assert all(line.startswith("keepstep agent: ") and "no notice will come from there" in line for line in lines)


async def test_a_host_without_any_metadata_service_has_no_notices(
    server: MetadataServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("GCE_METADATA_HOST", "no-such-host.invalid")
    async with Ear("aws", "gcp", "azure"):
        await until_asked(server, "/metadata/scheduledevents", 3)
    assert "no answer from http://127.0.0.1:9/latest/api/token" in capsys.readouterr().err


async def test_no_source_is_no_work() -> None:
    await asyncio.wait_for(watch_notices((), DEFAULT_S, lambda why, seconds: None), DEADLINE_S)


@pytest.fixture
def notice_file(server: MetadataServer, tmp_path: Path) -> Path:
    return tmp_path / "notice"


async def test_a_file_counts_when_it_appears_and_when_its_text_changes(notice_file: Path) -> None:
    async with Ear(f"file:{notice_file}") as ear:
        notice_file.write_text("rack 4 goes down")
        assert await ear.next() == (f"file:{notice_file}: rack 4 goes down in 7 s", DEFAULT_S)
        notice_file.write_text("in 3\nnow!")
        assert await ear.next() == (f"file:{notice_file}: now! in 3 s", 3)


async def test_a_file_that_was_there_at_the_start_counts_and_an_empty_one_too(notice_file: Path) -> None:
    notice_file.touch()
    async with Ear(f"file:{notice_file}") as ear:
        assert (await ear.next())[0] == f"file:{notice_file}: leave in 7 s"


async def test_a_file_that_cannot_be_read_is_named_once(notice_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notice_file.mkdir()
    said = ""
    async with Ear(f"file:{notice_file}") as ear, asyncio.timeout(DEADLINE_S):
        while not said:
            await asyncio.sleep(0.005)
            said = capsys.readouterr().err
        assert ear.heard == []
        notice_file.rmdir()
        notice_file.write_text("now it can")
        await ear.next()
    (line,) = (said + capsys.readouterr().err).splitlines()
    assert f"cannot read the notice file {notice_file}: Is a directory" in line
