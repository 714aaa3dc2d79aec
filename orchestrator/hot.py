"""A node's part of a hot standby: ranks that form their group beside those that train, build, and wait for the order to begin.

They come from a launcher like all ranks, and get the same order twice: the first one without an attempt, on which they run up to
`Attached.standby()`; the second one when an attempt is launched into them. Between the two they hold no tether and no training state, and
nobody looks whether they hang. Everything runs on the agent's event loop.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .exits import explain
from .forkserver import HostedStore
from .processes import kill_session, wait_ended
from .progress import ProgressPage
from .ranks import GroupSpec, Launcher, LauncherDied, begin_ranks
from .reserve import Reserve
from .wire import Standby, StandbyReport, StoreAddress


@dataclass(frozen=True, slots=True)
class Handed:
    """What becomes an attempt's."""

    launcher: Launcher
    address: StoreAddress
    store: HostedStore | None


class HotStandby:
    """The one that `order` of this term wants. `on_change` is called whenever the report would differ."""

    def __init__(self, term: int, order: Standby, node: str, on_change: Callable[[], None]) -> None:
        self.term, self.number, self.order = term, order.number, order
        self._hosts = order.store_node == node
        self._on_change = on_change
        self._state: Literal["forming", "ready", "failed"] = "forming"
        self._why = ""
        self._store: HostedStore | None = None
        self._address: StoreAddress | None = None
        self._group: GroupSpec | None = None
        self._launcher: Launcher | None = None
        self._pages: list[ProgressPage] = []
        self._ready: set[int] = set()  # local ranks
        self._is_over = False
        self._forming: asyncio.Task[None] | None = None
        self._watched: list[int] = []  # descriptors
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def pids(self) -> tuple[int, ...]:
        return self._launcher.pids if self._launcher else ()

    def report(self) -> StandbyReport:
        store = self._address if self._hosts else None
        return StandbyReport(term=self.term, number=self.number, state=self._state, why=self._why, pids=self.pids, store=store)

    # --- forming ----------------------------------------------------------------------------------------------------

    async def meet(self, reserve: Reserve) -> None:
        """On the first node of its gang: a store for the group."""
        if self._hosts and self._store is None and self._state == "forming":
            self._store = await reserve.store()
            self._address = StoreAddress(attempt=0, host=self._store.host, port=self._store.port)
            self._on_change()

    def form(self, group: GroupSpec, address: StoreAddress, reserve: Reserve, *, within_s: float) -> None:
        """Once, when the store is known; in the background."""
        if self._group is None and self._state == "forming":
            self._group, self._address = group, address
            self._deadline = asyncio.get_running_loop().call_later(within_s, self._be_late, within_s)
            self._forming = asyncio.create_task(self._form(group, reserve))

    async def _form(self, group: GroupSpec, reserve: Reserve) -> None:
        try:
            launcher = await reserve.launcher(len(group.specs))
        except (LauncherDied, EOFError, OSError) as error:
            self.fail(f"its ranks could not be forked: {error}")
            return
        if self._is_over or self._state == "failed":
            launcher.close()
            return
        self._launcher = launcher
        self._pages = [ProgressPage(Path(spec.progress_path), step=0) for spec in group.specs]
        begin_ranks(group, launcher, None, waits=True)
        loop = asyncio.get_running_loop()
        for local_rank, (orders, code) in enumerate(zip(launcher.orders, launcher.codes, strict=True)):
            loop.add_reader(orders.fileno(), self._hear, local_rank)
            loop.add_reader(code.fileno(), self._lose, local_rank)
            self._watched += [orders.fileno(), code.fileno()]
        reserve.prepare(len(group.specs), in_time=True)  # where this one cannot be used, ranks are at hand all the same

    def _hear(self, local_rank: int) -> None:
        """A rank says that it waits; that its pipe closed, its exit code says, too."""
        assert self._launcher
        pipe = self._launcher.orders[local_rank]
        try:
            pipe.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(pipe.fileno())
            return
        self._ready.add(local_rank)
        if len(self._ready) == len(self._launcher.pids) and self._state == "forming":
            self._state = "ready"
            self._on_change()

    def _lose(self, local_rank: int) -> None:
        """Its exit code stays in the pipe: where an attempt was launched into it at this moment, that reads it."""
        assert self._group
        found = explain(1, self._group.specs[local_rank].error_path)
        how = f"failed: {found.why}" if found.kind not in ("", "exit") else "ended, see its log"
        self.fail(f"rank {self._group.first_rank + local_rank} of it {how} ({self._group.log_paths[local_rank]})")

    def _be_late(self, within_s: float) -> None:
        if self._state == "forming":
            self.fail(f"it was not ready within {within_s:g} s")

    def fail(self, why: str) -> None:
        """Its ranks are killed at once; it stays, to be reported, until nobody wants it any more."""
        if self._state == "failed":
            return
        self._state, self._why = "failed", why
        print(f"keepstep agent: standby {self.number}: {why}", file=sys.stderr)  # noqa: T201
        self._unwatch()
        for pid in self.pids:
            kill_session(pid)
        self._on_change()

    # --- its end ----------------------------------------------------------------------------------------------------

    def hand_over(self) -> Handed:
        """Its ranks, dead ones too, get the order to begin from whoever takes them."""
        self._leave()
        assert self._launcher
        assert self._address
        return Handed(self._launcher, self._address, self._store)

    async def end(self) -> None:
        """Kills it, and returns when the kernel has confirmed every death: its memory is free."""
        self._leave()
        for pid in self.pids:
            kill_session(pid)
        for pid in self.pids:
            await wait_ended(pid)
        if self._launcher:
            self._launcher.close()
        if self._store:
            self._store.close()

    def _leave(self) -> None:
        self._is_over = True
        self._unwatch()
        for page in self._pages:
            page.close()

    def _unwatch(self) -> None:
        for descriptor in self._watched:
            asyncio.get_running_loop().remove_reader(descriptor)
        self._watched.clear()
        if self._deadline:
            self._deadline.cancel()
