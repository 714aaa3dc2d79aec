"""What a node holds ready: used once, thrown away when it does not fit or has died. Launchers and stores without processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keepstep.orchestrator import reserve
from keepstep.orchestrator.forked import Program
from keepstep.orchestrator.ranks import LauncherDied
from keepstep.orchestrator.reserve import Reserve

forked: list[Launcher] = []


class Launcher:
    def __init__(self, num_ranks: int, program: Program, scratch: str, *, ahead: bool) -> None:
        self.program, self.ahead = program, ahead
        self.pids = tuple(range(10, 10 + num_ranks))
        self.is_whole, self.is_closed = True, False
        forked.append(self)
        if "deadly" in program.preload:
            raise LauncherDied("a module killed it")

    def close(self) -> None:
        self.is_closed = True


class Store:
    is_alive = True

    def __init__(self, address: str) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def _without_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(reserve, "Launcher", Launcher)
    monkeypatch.setattr(reserve, "HostedStore", Store)
    yield
    forked.clear()


@pytest.fixture
async def made(tmp_path: Path) -> Reserve:
    return Reserve(Program(), tmp_path, "127.0.0.1")


async def ready(made: Reserve, num_ranks: int = 2) -> None:
    made.prepare(num_ranks, in_time=True)
    made.prepare(num_ranks, in_time=True)
    assert made._preparing
    await made._preparing


async def test_what_is_ready_is_used_once(made: Reserve) -> None:
    await ready(made)
    stores = [await made.store(), await made.store()]
    launchers = [await made.launcher(2), await made.launcher(2)]
    assert launchers == forked
    assert [launcher.ahead for launcher in forked] == [True, False]
    assert stores[0] is not stores[1]


@pytest.mark.parametrize(
    "spoil",
    [lambda launcher: setattr(launcher, "is_whole", False), lambda launcher: setattr(launcher, "pids", (1,))],
    ids=["a rank died", "another number of ranks"],
)
async def test_what_does_not_fit_is_thrown_away(made: Reserve, spoil: Callable[[Launcher], None]) -> None:
    await ready(made)
    spoil(forked[0])
    used = await made.launcher(2)
    assert [launcher.is_closed for launcher in forked] == [True, False]
    assert used is forked[1]


async def test_a_launch_waits_for_what_is_being_forked(made: Reserve) -> None:
    made.prepare(2, in_time=False)
    await asyncio.sleep(0)
    assert await made.launcher(2) is forked[0]
    assert len(forked) == 1


async def test_modules_that_kill_a_launcher_are_left_to_the_script(tmp_path: Path) -> None:
    made = Reserve(Program("x.py", preload=("deadly",)), tmp_path, "127.0.0.1")
    assert await made.launcher(2) is forked[1]
    await made.launcher(2)
    assert [launcher.program.preload for launcher in forked] == [("deadly",), (), ()]


async def test_the_end_of_an_incarnation_closes_what_is_ready(made: Reserve) -> None:
    await ready(made)
    made.close()
    assert [launcher.is_closed for launcher in forked] == [True]
