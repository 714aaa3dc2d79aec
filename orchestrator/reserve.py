"""What a node holds ready for its next attempt: a launcher whose ranks are forked and wait, and a store that listens.

Both belong to no attempt until they are used up, and each is used once. Ranks are forked ahead when a node is warm, and again once all
ranks of an attempt step: a restart then costs two messages instead of a fork of each process. What does not fit, or has died, is thrown
away, and forked when it is needed.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from .forked import Program
from .forkserver import HostedStore
from .processes import kill, strays_of_ranks
from .ranks import Launcher, LauncherDied


class Reserve:
    """On the agent's loop; what blocks (forks) goes through a thread, one at a time."""

    def __init__(self, program: Program, scratch: Path, address: str) -> None:
        self._program, self._scratch, self._address = program, scratch, address
        self._forking = asyncio.Lock()
        self._launcher: Launcher | None = None
        self._store: HostedStore | None = None
        self._preparing: asyncio.Task[None] | None = None

    def prepare(self, num_ranks: int, *, in_time: bool) -> None:
        """In the background: returns at once.

        Args:
            in_time: an attempt runs, so that there is time to rehearse; else one is about to begin.
        """
        if self._preparing is None or self._preparing.done():
            self._preparing = asyncio.create_task(self._prepare(num_ranks, in_time))

    async def _prepare(self, num_ranks: int, in_time: bool) -> None:
        async with self._forking:
            try:
                if self._store is None or not self._store.is_alive:
                    self._store = await asyncio.to_thread(HostedStore, self._address)
                if not self._fits(num_ranks):
                    self._throw_away()
                    self._launcher = await asyncio.to_thread(self._fork, num_ranks, in_time)
            except (LauncherDied, EOFError, OSError) as error:  # hurts nobody yet: it is forked again when it is needed
                print(f"keepstep agent: no ranks could be forked ahead: {error}", file=sys.stderr)  # noqa: T201

    def _fits(self, num_ranks: int) -> bool:
        return self._launcher is not None and len(self._launcher.pids) == num_ranks and self._launcher.is_whole

    def _fork(self, num_ranks: int, ahead: bool) -> Launcher:
        """Modules of the script's owner that keep ranks from being forked are left to the script."""
        try:
            return Launcher(num_ranks, self._program, str(self._scratch), ahead=ahead)
        except LauncherDied as error:
            if not self._program.preload:
                raise
            self._program = replace(self._program, preload=())
            print(f"keepstep agent: {error}: train.preload is left out from now on", file=sys.stderr)  # noqa: T201
            return Launcher(num_ranks, self._program, str(self._scratch), ahead=ahead)

    def _throw_away(self) -> None:
        if self._launcher is not None:
            self._launcher.close()
            self._launcher = None

    async def launcher(self, num_ranks: int) -> Launcher:
        """The one that is ready, or a new one. It is the caller's now. Raises LauncherDied."""
        async with self._forking:
            if not self._fits(num_ranks):
                self._throw_away()
                return await asyncio.to_thread(self._fork, num_ranks, False)
            ready, self._launcher = self._launcher, None
            assert ready
            return ready

    async def store(self) -> HostedStore:
        """One that nobody has used. It is the caller's now."""
        async with self._forking:
            ready, self._store = self._store, None
            return ready if ready and ready.is_alive else await asyncio.to_thread(HostedStore, self._address)

    async def bury(self, others: Collection[int]) -> None:
        """When an attempt's ranks are dead: kills what they started, in sessions of its own, and what may hold a port or a GPU.

        Args:
            others: sessions of ranks that shall live.
        """
        async with self._forking:  # else what is being forked would be taken for a stray
            spared = frozenset((*others, *(self._launcher.pids if self._launcher else ())))
            await asyncio.to_thread(lambda: kill(strays_of_ranks(self._scratch, spared)))

    def close(self) -> None:
        self._throw_away()
        if self._store is not None:
            self._store.close()
            self._store = None
