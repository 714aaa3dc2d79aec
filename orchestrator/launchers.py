"""`keepstep run`: the platform of a run on one machine. Starts a coordinator and simulated nodes, and restarts what dies, as Slurm or
Kubernetes would. It decides nothing about the training.

Each simulated node is an agent in a process group, scratch directory and memory tier of its own. All of them die with this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias

from keepstep.trainer.contract import EXIT_OK, EXIT_REQUEUE

from .processes import ENV_PARENT, bury, python_command
from .scratch import default_scratch
from .sections import RunConfig

RESTART_PAUSE_S = 0.05  # a platform that restarts at once; doubled for a process that keeps dying young
MAX_RESTART_PAUSE_S = 5.0
YOUNG_S = 2.0
LEAVE_S = 10.0
CLI = "keepstep.orchestrator.cli"


Place: TypeAlias = Callable[[str, Sequence[str]], list[str]]
"""(role's name, its command) -> what to start on this machine so that the command runs where that role lives, and dies with it."""


def on_this_machine(_: str, command: Sequence[str]) -> list[str]:
    return list(command)


class Audience(Protocol):
    """Whoever hears what happens: the screen, or somebody between it and us."""

    def say(self, text: str) -> None: ...

    def event(self, event: Mapping[str, Any]) -> None: ...


@dataclass(slots=True)
class Role:
    """One process that the platform keeps alive."""

    name: str
    command: list[str]
    log: Path | None  # None: its standard output is events for the screen
    process: asyncio.subprocess.Process | None = None
    young_deaths: int = 0


class LocalPlatform:
    """Main thread only. `run()` returns the coordinator's exit code."""

    def __init__(self, config: RunConfig, config_path: Path, audience: Audience, place: Place = on_this_machine) -> None:
        self._config, self._config_path = config, config_path
        self._audience = audience
        self._say = audience.say
        self._place = place
        root = config.run.root
        logs = Path(root) / "logs" if "://" not in root else default_scratch(root, "logs")
        logs.mkdir(parents=True, exist_ok=True)
        self.coordinator = Role("coordinator", python_command(CLI, "coordinator", str(config_path), "--managed"), None)
        self.nodes = [self._node(f"node{i}", logs) for i in range(config.cluster.nodes + config.cluster.spares)]
        self._leaving = False
        self.told_to_stop = False

    def _node(self, name: str, logs: Path) -> Role:
        scratch = default_scratch(self._config.run.root, name)
        command = python_command(CLI, "agent", "--root", self._config.run.root, "--node", name, "--scratch", str(scratch))
        return Role(name, command, logs / f"agent-{name}.log")

    async def run(self, beside: Coroutine[Any, Any, None] | None = None) -> int:
        """`beside` goes on as long as the run does: somebody who breaks it on purpose."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        guards = [asyncio.create_task(self._keep_alive(role)) for role in self.nodes]
        extra = asyncio.create_task(self._guarded(beside)) if beside else None
        try:
            return await self._keep_coordinator_alive()
        finally:
            if extra:
                extra.cancel()
                await asyncio.gather(extra, return_exceptions=True)
            self._leaving = True
            await self._wait_for_nodes(guards)

    async def _guarded(self, beside: Coroutine[Any, Any, None]) -> None:
        """What goes on beside the run must say so when it breaks, and must not break the run."""
        try:
            await beside
        except Exception as error:  # noqa: BLE001  (an entry: what it was is said)
            self._say(f"what went on beside the run broke: {type(error).__name__}: {error}")

    async def _keep_coordinator_alive(self) -> int:
        """A coordinator that was killed is succeeded; one that exits has decided."""
        while True:
            code = await self._run_once(self.coordinator)
            if code >= 0:
                return code
            self._say(f"the coordinator was killed by {signal.Signals(-code).name}: starting its successor")
            await asyncio.sleep(self._pause(self.coordinator))

    async def _keep_alive(self, role: Role) -> None:
        """An agent that leaves by itself stays away: the run is over (0), or its node was to go (75). Any other is started again."""
        while not self._leaving:
            code = await self._run_once(role)
            if self._leaving or code in (EXIT_OK, EXIT_REQUEUE):
                return
            if code > 0:
                self._say(f"the agent of {role.name} ended with code {code}, see {role.log}")
            await asyncio.sleep(self._pause(role))

    async def _run_once(self, role: Role) -> int:
        """Its exit code; negative for a signal."""
        began = time.monotonic()
        role.process = await self._spawn(role)
        if role.process.stdout:
            await self._show_events(role.process.stdout)
        code = await role.process.wait()
        role.young_deaths = role.young_deaths + 1 if time.monotonic() - began < YOUNG_S else 0
        return code

    async def _spawn(self, role: Role) -> asyncio.subprocess.Process:
        environment = {**os.environ, ENV_PARENT: str(os.getpid())}
        with _opened(role.log) as log:
            return await asyncio.create_subprocess_exec(
                *self._place(role.name, role.command),
                stdin=subprocess.DEVNULL,
                stdout=log if role.log else subprocess.PIPE,
                stderr=log if role.log else None,
                env=environment,
                start_new_session=True,
            )

    async def _show_events(self, lines: asyncio.StreamReader) -> None:
        while line := await lines.readline():
            self._audience.event(json.loads(line))

    def _pause(self, role: Role) -> float:
        return min(MAX_RESTART_PAUSE_S, RESTART_PAUSE_S * 2.0**role.young_deaths)

    def _on_signal(self) -> None:
        """First: checkpoint and leave. Again: at once, which loses what is not committed."""
        if self._leaving:
            os._exit(128 + signal.SIGINT)  # everything else dies with us
        self._leaving = self.told_to_stop = True
        self._say("stopping at the next step boundary; once more to leave at once")
        if self.coordinator.process and self.coordinator.process.returncode is None:
            self.coordinator.process.terminate()

    async def _wait_for_nodes(self, guards: list[asyncio.Task[None]]) -> None:
        _, late = await asyncio.wait(guards, timeout=LEAVE_S)
        for guard in late:
            guard.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        for role in self.nodes:
            if role.process and role.process.returncode is None:
                role.process.kill()
                await role.process.wait()
            scratch = default_scratch(self._config.run.root, role.name)
            # Once all are dead nothing there is of use to the next start. (After a crash it stays, and the next start cleans up.)
            if not await asyncio.to_thread(bury, scratch):
                shutil.rmtree(scratch, ignore_errors=True)
        self._config_path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: logs of a remote root stay for people
            self._config_path.parent.rmdir()


def _opened(log: Path | None) -> IO[bytes]:
    """What a role prints while the root is away is lost; the role is not."""
    try:
        return open(log or os.devnull, "ab")
    except OSError:
        return open(os.devnull, "ab")
