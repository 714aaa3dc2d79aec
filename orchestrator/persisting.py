"""The agent's hold on its persister process: start it, read what it made durable, start it anew when it dies."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keepstep.trainer.config import CheckpointSection

from .processes import ENV_PARENT, python_command
from .wire import Directive, Persisted


class PersisterProcess:
    """`python -m keepstep.storage.persister` as a child of the agent. It outlives the ranks; it does not outlive the agent."""

    def __init__(
        self, socket_path: Path, root: str, slow_s: float, on_change: Callable[[], None], checkpoint: CheckpointSection | None = None
    ) -> None:
        checkpoint = checkpoint or CheckpointSection()
        self.socket_path = socket_path
        self._slow_s = slow_s
        self._command = python_command(
            "keepstep.storage.persister",
            *("--socket", str(socket_path), "--root", root),
            *("--nice", str(checkpoint.nice), "--mb-per-s", str(checkpoint.write_mb_per_s)),
        )
        self._on_change = on_change
        self._process: asyncio.subprocess.Process | None = None
        self._persisted: dict[tuple[int, int, int], Persisted] = {}
        self._begun_at: dict[int, tuple[int, float]] = {}  # rank -> step on its way to storage, and since when
        self._written: dict[int, tuple[int, int, float]] = {}  # rank -> bytes on their way, of how many, heard when
        self._problems: dict[int, str] = {}  # rank -> why its newest save failed
        self._attempt = 0  # that the two are about
        self._save_s: dict[int, float] = {}  # rank -> how long its newest save took
        self._timed = 0  # the attempt that those are of
        self.is_up = False

    @property
    def persisted(self) -> tuple[Persisted, ...]:
        """What is durable and, as far as we know, not committed yet."""
        return tuple(self._persisted[key] for key in sorted(self._persisted))

    @property
    def is_idle(self) -> bool:
        """Nothing is on its way to storage, and nothing waits for its commit."""
        return not self._persisted and not self._begun_at

    @property
    def save_s(self) -> float:
        """How long the newest saves of this node's ranks took until they were durable, the longest of them; 0: none did yet.

        A save that failed at first counts for nothing: it says how long the store was away.
        """
        return max(self._save_s.values(), default=0.0)

    @property
    def trouble(self) -> str:
        """Why checkpoints of this node do not reach storage, as a sentence; "" when they do."""
        if self._problems:
            return self._problems[min(self._problems)]
        oldest = min(self._begun_at, key=lambda rank: self._begun_at[rank][1], default=None)
        if oldest is None:
            return ""
        step, begun_at = self._begun_at[oldest]
        late_s = time.monotonic() - begun_at
        if late_s <= self._slow_s:
            return ""
        return f"step {step} of rank {oldest} has been on its way to storage for over {self._slow_s:g} s{self._pace_of(oldest)}"

    def _pace_of(self, rank: int) -> str:
        """Slow or stuck, as the end of a sentence."""
        if rank not in self._written:
            return ""
        done, of, at = self._written[rank]
        return f": {done / 1e6:.0f} of {of / 1e6:.0f} MB are written or on their way, last heard of {time.monotonic() - at:.0f} s ago"

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
            self.hear(json.loads(line))
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
            async with asyncio.timeout(grace_s):
                await self._process.wait()
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
        self.hear(json.loads(line))

    def hear(self, message: dict[str, Any]) -> None:
        """One line of the persister."""
        kind = message.pop("kind")
        if kind == "ready":
            self.is_up = True
        elif kind == "writing":  # a heartbeat: nobody needs to hear of it at once
            self._written[message["rank"]] = (message["bytes"], message["of"], time.monotonic())
            return
        else:
            self._take_news(kind, message)
        self._on_change()

    def _take_news(self, kind: str, message: dict[str, Any]) -> None:
        """Ranks move to other nodes with the attempt, and their troubles with them."""
        if message["attempt"] > self._attempt:
            self._attempt = message["attempt"]
            self._problems.clear()
            self._begun_at.clear()
            self._written.clear()
        rank = message["rank"]
        match kind:
            case "begun":
                self._written.pop(rank, None)
                self._begun_at[rank] = (message["step"], time.monotonic())
            case "persisted":
                done = Persisted.model_validate(message)
                self._persisted[done.attempt, done.step, done.rank] = done
                self._time(done)
                self._begun_at.pop(rank, None)
                self._problems.pop(rank, None)
            case "failed":
                self._begun_at.pop(rank, None)
                self._problems[rank] = message["why"]
                print(message["why"], file=sys.stderr, flush=True)  # noqa: T201  (the agent's log)

    def _time(self, done: Persisted) -> None:
        """Until an attempt has saved, what the one before it knew is the best guess."""
        step, begun_at = self._begun_at.get(done.rank, (-1, 0.0))
        if step != done.step:
            return
        if done.attempt != self._timed:
            self._timed = done.attempt
            self._save_s.clear()
        self._save_s[done.rank] = time.monotonic() - begun_at


def _is_settled(key: tuple[int, int, int], directive: Directive) -> bool:
    attempt, step, _ = key
    return attempt < directive.settled_attempt or step <= directive.committed_step
