"""The ranks on this node as the agent sees them: launch an attempt once, watch it, stop it for certain, describe it.

Everything runs on the agent's event loop; what blocks (torch's import, forks) goes through a thread. An attempt's number is launched at
most once by an incarnation: a late directive can never bring a dead attempt back.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from keepstep.storage.errors import StoreError
from keepstep.storage.layout import rank_log_key
from keepstep.storage.store import Store
from keepstep.trainer.contract import Phase, RankSpec, Request, Resume

from .patience import Patience, Watch
from .progress import ProgressPage
from .wire import Launch, RankReport, StoreAddress

if TYPE_CHECKING:
    from .ranks import Exit, HostedStore, RankGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """What does not change while the agent lives."""

    run: str
    root: str
    script: str
    script_args: tuple[str, ...]
    scratch: Path
    address: str
    config_path: Path
    staging_socket: Path


@dataclass(frozen=True, slots=True)
class Pace:
    """What makes a report worth sending."""

    phase: Phase
    step: int
    is_overdue: bool  # silent for longer than its agent expects


@dataclass(slots=True)
class _Rank:
    number: int
    pid: int
    page: ProgressPage
    watch: Watch
    exit: Exit | None = None
    order: int | None = None
    stopped: bool = False
    blame: tuple[str, str] | None = None  # kind and reason, when the agent knows better than the exit code


@dataclass(slots=True)
class _Attempt:
    launch: Launch
    group: RankGroup
    ranks: list[_Rank] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class NodeRanks:
    """At most one attempt's ranks at a time. `on_change` is called on the loop whenever the report would differ."""

    def __init__(self, node: str, settings: NodeSettings, store: Store, patience: Patience, on_change: Callable[[], None]) -> None:
        self.node = node
        self._settings = settings
        self._patience = patience
        self.logs = RankLogs(store, settings.scratch)
        self._on_change = on_change
        self._attempt: _Attempt | None = None
        self._hosted: dict[int, HostedStore] = {}
        self.store_address: StoreAddress | None = None
        self._newest = 0  # newest attempt launched or refused by this incarnation

    @property
    def attempt(self) -> int:
        return self._attempt.launch.attempt if self._attempt else 0

    @property
    def running(self) -> bool:
        return self._attempt is not None and not self._attempt.ended.is_set()

    async def pursue(self, launch: Launch) -> None:
        """Makes this node run exactly this attempt; does nothing where it does so already, or did and lost it."""
        if self.attempt != launch.attempt:
            await self.stop()
        if launch.store is None:
            await self._host_store(launch)
        elif launch.attempt > self._newest:
            self._newest = launch.attempt
            await self._start(launch, launch.store)
        if self._attempt and self._attempt.launch.attempt == launch.attempt:
            self._ask(Request(launch.request))

    async def stop(self) -> None:
        """Kills what runs and returns when the kernel has confirmed every death."""
        if self._attempt is None or self._attempt.ended.is_set():
            return
        self._attempt.group.kill()
        await self._attempt.ended.wait()

    def blame_all(self, kind: str, why: str) -> None:
        """The node itself broke its ranks (its persister died, say): kill them, and let the reason be that."""
        if not self.running:
            return
        assert self._attempt
        for rank in self._attempt.ranks:
            rank.blame = rank.blame or (kind, why)
        self._attempt.group.kill()

    def reports(self) -> tuple[RankReport, ...]:
        if self._attempt is None:
            return ()
        return tuple(_report(rank, i, self._patience.step_s) for i, rank in enumerate(self._attempt.ranks))

    def look(self) -> tuple[Pace, ...]:
        """Looks at every rank: what the agent does every PERIOD_S, to see whether a report would say something new."""
        now = time.monotonic()
        return tuple(_look(rank, now) for rank in self._attempt.ranks) if self._attempt else ()

    async def _host_store(self, launch: Launch) -> None:
        if launch.store_node != self.node or launch.attempt in self._hosted or launch.attempt <= self._newest:
            return
        from .ranks import HostedStore

        store = await asyncio.to_thread(HostedStore, self._settings.address)
        for older in self._hosted.values():
            older.close()  # its ranks are dead
        self._hosted = {launch.attempt: store}
        self.store_address = StoreAddress(attempt=launch.attempt, host=store.host, port=store.port)
        self._on_change()

    async def _start(self, launch: Launch, address: StoreAddress) -> None:
        from .ranks import GroupSpec, RankGroup

        pages = [ProgressPage(self._page_path(launch, i), step=_first_step(launch)) for i in range(launch.num_ranks)]
        logs = tuple(str(self.logs.path(rank_log_key(launch.attempt, launch.first_rank + i))) for i in range(launch.num_ranks))
        spec = GroupSpec(
            specs=tuple(self._rank_spec(launch, page.path, i) for i, page in enumerate(pages)),
            log_paths=logs,
            script=self._settings.script,
            script_args=self._settings.script_args,
            node=self.node,
            first_rank=launch.first_rank,
            group_rank=launch.group_rank,
            num_nodes=launch.num_nodes,
            world_size=launch.world_size,
            master_addr=address.host,
            master_port=address.port,
        )
        group = await asyncio.to_thread(RankGroup, spec)
        old, self._attempt = self._attempt, _Attempt(launch, group)
        if old is not None:
            _close_pages(old)
        self._patience.begin(launch.world_size)
        self._attempt.ranks = [_Rank(launch.first_rank + i, pid, pages[i], self._watch(pages[i])) for i, pid in enumerate(group.pids)]
        for sentinel, local_rank in group.sentinels.items():
            asyncio.get_running_loop().add_reader(sentinel, self._on_exit, self._attempt, sentinel, local_rank)
        self._on_change()

    def _on_exit(self, attempt: _Attempt, sentinel: int, local_rank: int) -> None:
        asyncio.get_running_loop().remove_reader(sentinel)
        rank = attempt.ranks[local_rank]
        rank.exit = attempt.group.ended(local_rank)
        assert rank.exit is not None
        rank.stopped = attempt.group.was_stopped(local_rank)
        rank.order = sum(other.order is not None for other in attempt.ranks)
        if rank.exit.exit_code != 0:
            attempt.group.kill()  # the attempt is lost; waiting for the order would only cost time
        if all(other.exit is not None for other in attempt.ranks):
            attempt.ended.set()
        self._on_change()

    def _ask(self, request: Request) -> None:
        assert self._attempt
        for rank in self._attempt.ranks:
            rank.page.ask(request)

    def _rank_spec(self, launch: Launch, page: Path, local_rank: int) -> RankSpec:
        settings, resume = self._settings, launch.resume
        return RankSpec(
            run=settings.run,
            attempt=launch.attempt,
            nonce=launch.nonce,
            root=settings.root,
            config_path=str(settings.config_path),
            scratch=str(settings.scratch),
            progress_path=str(page),
            staging_socket=str(settings.staging_socket),
            error_path=str(settings.scratch / f"error-{local_rank}.json"),
            resume=None if resume is None else Resume(step=resume.step, directory=resume.directory, manifest_sha256=resume.manifest_sha256),
        )

    def _watch(self, page: ProgressPage) -> Watch:
        return Watch(self._patience, page.read(), time.monotonic())

    def _page_path(self, launch: Launch, local_rank: int) -> Path:
        return self._settings.scratch / f"progress-{launch.attempt:06d}-{local_rank}"


class RankLogs:
    """Where ranks print to: the root itself where it is a local directory that takes files; else scratch, shipped now and then."""

    def __init__(self, store: Store, scratch: Path) -> None:
        self._store = store
        self._scratch = scratch
        self._shipped: dict[str, int] = {}  # remote keys -> bytes that the root has

    def path(self, key: str) -> Path:
        local = self._store.local_path(key)
        if local is not None and _can_write_to(local):
            return local
        self._shipped.setdefault(key, 0)
        path = self._scratch / key
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def ship(self) -> None:
        for key, shipped in list(self._shipped.items()):
            body = (self._scratch / key).read_bytes() if (self._scratch / key).exists() else b""
            if len(body) == shipped:
                continue
            try:
                self._store.put(key, body)
            except StoreError:
                return  # hurts only who reads logs; the next round tries again
            self._shipped[key] = len(body)


def _can_write_to(path: Path) -> bool:
    """Creates the file. A full or read-only disk must not keep ranks from training."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        return False
    return True


def _first_step(launch: Launch) -> int:
    return launch.resume.step if launch.resume else 0


def _close_pages(attempt: _Attempt) -> None:
    for rank in attempt.ranks:
        rank.page.close()


def _look(rank: _Rank, now: float) -> Pace:
    seen = rank.page.read()
    is_overdue = rank.exit is None and rank.watch.look(seen, now).is_too_long
    return Pace(seen.phase, seen.step, is_overdue)


def _report(rank: _Rank, local_rank: int, step_s: float) -> RankReport:
    seen, silence = rank.page.read(), rank.watch.silence
    common = {"rank": rank.number, "local_rank": local_rank, "pid": rank.pid}
    pace = {
        "phase": int(seen.phase),
        "step": seen.step,
        "beats": seen.beats,
        "quiet_s": silence.quiet_s,
        "limit_s": silence.limit_s,
        "step_s": round(step_s, 4),
        "collective": seen.collective,
        "pulse_s": round(max(0.0, time.monotonic() - seen.pulse_at), 3) if seen.pulse_at else -1.0,
    }
    if rank.exit is None:
        return RankReport(**common, **pace, state="running")
    kind, why = rank.blame or (rank.exit.kind, rank.exit.why)
    return RankReport(
        **common,
        **pace,
        state="exited",
        exit_code=rank.exit.exit_code,
        exit_order=rank.order,
        stopped_by_agent=rank.stopped and rank.blame is None,
        kind=kind,
        why=why,
        damaged=rank.exit.damaged,
    )


def write_config(path: Path, config: dict[str, object]) -> None:
    path.write_text(json.dumps(config, indent=1))
