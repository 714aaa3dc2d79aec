"""The agent's hold on its persister process: start it, read what it made durable, start it anew when it dies."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from .processes import ENV_PARENT, python_command
from .wire import Directive, Persisted


class PersisterProcess:
    """`python -m keepstep.storage.persister` as a child of the agent. It outlives the ranks; it does not outlive the agent."""

    def __init__(self, socket_path: Path, root: str, on_change: Callable[[], None]) -> None:
        self.socket_path = socket_path
        self._command = python_command("keepstep.storage.persister", "--socket", str(socket_path), "--root", root)
        self._on_change = on_change
        self._process: asyncio.subprocess.Process | None = None
        self._persisted: dict[tuple[int, int, int], Persisted] = {}
        self.is_up = False
        self.problem = ""  # why the last save of a rank could not be made durable; empty after one that could

    @property
    def persisted(self) -> tuple[Persisted, ...]:
        """What is durable and, as far as we know, not committed yet."""
        return tuple(self._persisted[key] for key in sorted(self._persisted))

    async def start(self) -> None:
        """Main thread only (the child dies with the thread that started it)."""
        self.socket_path.unlink(missing_ok=True)
        environment = {**os.environ, ENV_PARENT: str(os.getpid())}
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=environment
        )
        await self._expect_ready()

    async def serve(self) -> str:
        """Reads the persister's lines until it ends; returns how it ended, as a sentence."""
        assert self._process
        assert self._process.stdout
        while line := await self._process.stdout.readline():
            self._take(json.loads(line))
        self.is_up = False
        code = await self._process.wait()
        return f"the persister (pid {self._process.pid}) ended with code {code}"

    async def stop(self, grace_s: float) -> None:
        """Lets it finish what is in flight, for so long at the most."""
        if self._process is None or self._process.returncode is not None:
            return
        assert self._process.stdin
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), grace_s)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def settle(self, directive: Directive) -> None:
        """Forgets what the coordinator has committed, or will never commit."""
        for key in [key for key in self._persisted if _is_settled(key, directive)]:
            del self._persisted[key]

    async def _expect_ready(self) -> None:
        assert self._process
        assert self._process.stdout
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the persister did not start: code {await self._process.wait()}, see its message above")
        self._take(json.loads(line))

    def _take(self, message: dict[str, object]) -> None:
        match message.pop("kind", ""):
            case "ready":
                self.is_up = True
            case "persisted":
                done = Persisted.model_validate(message)
                self._persisted[done.attempt, done.step, done.rank] = done
                self.problem = ""
            case "failed":
                self.problem = f"step {message['step']} of rank {message['rank']} could not be saved: {message['why']}"
                print(self.problem, file=sys.stderr, flush=True)  # noqa: T201  (the agent's log)
        self._on_change()


def _is_settled(key: tuple[int, int, int], directive: Directive) -> bool:
    attempt, step, _ = key
    return attempt < directive.settled_attempt or step <= directive.committed_step
