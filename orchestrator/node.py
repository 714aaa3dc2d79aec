"""The ranks on this node as the agent sees them: launch an attempt once, watch it, stop it for certain, describe it.

Everything runs on the agent's event loop; what blocks goes through a thread. An attempt's number is launched at
most once by an incarnation: a late directive can never bring a dead attempt back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from keepstep.storage.layout import rank_log_key, rank_stacks_key
from keepstep.storage.store import Store
from keepstep.trainer.contract import Phase, RankSpec, Request, Resume

from . import stacks
from .config import overridden
from .contact import interface_of
from .exits import Exit
from .forked import Program
from .forkserver import HostedStore
from .hot import HotStandby
from .localrank import LocalRank, Pace, autopsy_text, look, report
from .oom import KernelLog, OomWitness
from .patience import Patience, Watch
from .progress import ProgressPage
from .ranklogs import RankLogs, tail
from .ranks import UNKNOWN_CODE, GroupSpec, Launcher, RankGroup
from .reserve import Reserve
from .sections import RunConfig
from .stacks import Subject
from .tether import Tether
from .wire import Launch, RankReport, Standby, StoreAddress

KEEP_STACKS_S = 0.5  # how long the root may take to store stacks before the ranks are killed all the same
TAIL_S = 0.1  # how long the end of a rank's log may take to be read
SETTLED_S = 10.0  # ranks that say nothing of their steps count as settled after so long


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """What does not change while the agent lives."""

    run: str
    root: str
    program: Program
    scratch: Path
    address: str
    config_path: Path
    staging_socket: Path
    config: RunConfig


@dataclass(slots=True)
class _Attempt:
    launch: Launch
    group: RankGroup
    ordered_at: float  # when the order to launch came
    ranks: list[LocalRank] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    is_lost: bool = False  # a rank failed: the others must go
    in_autopsy: bool = False
    is_fresh: bool = True  # not settled yet: nothing is forked ahead for its successor

    def is_settled(self, now: float) -> bool:
        """Every rank here has finished a step, so all ranks everywhere have; or nothing is known of that, for long."""
        first, pages = _first_step(self.launch), [rank.page.read() for rank in self.ranks]
        stepped = all(page.phase > Phase.STEP or (page.phase == Phase.STEP and page.step > first) for page in pages)
        return stepped or (now - self.ordered_at > SETTLED_S and not any(page.beats for page in pages))


class NodeRanks:
    """At most one attempt's ranks at a time. `on_change` is called on the loop whenever the report would differ."""

    def __init__(self, node: str, settings: NodeSettings, store: Store, patience: Patience, on_change: Callable[[], None]) -> None:
        self.node = node
        self._settings = settings
        self._patience = patience
        self.logs = RankLogs(store, settings.scratch)
        self._on_change = on_change
        self._attempt: _Attempt | None = None
        self.reserve = Reserve(settings.program, settings.scratch, settings.address)
        self._hosted: dict[int, HostedStore] = {}
        self.store_address: StoreAddress | None = None
        self.tether: Tether | None = None  # what the next ranks will hold
        self.standby: HotStandby | None = None
        self._newest = 0  # newest attempt launched or refused by this incarnation
        self._order = (0, 0.0)  # the newest attempt that it was told to launch, and when
        self.autopsied = 0  # newest attempt whose ranks' stacks were taken
        self._witness = OomWitness(KernelLog.open())
        self._readings = set[asyncio.Task[None]]()
        self._burial: asyncio.Task[None] | None = None  # of what the last attempt's ranks have left behind

    @property
    def attempt(self) -> int:
        return self._attempt.launch.attempt if self._attempt else 0

    @property
    def running(self) -> bool:
        return self._attempt is not None and not self._attempt.ended.is_set()

    def note_order(self, attempt: int) -> None:
        """A directive says that this attempt is to run; from the first one on its start is measured."""
        if attempt > self._order[0]:
            self._order = (attempt, time.monotonic())

    async def pursue(self, launch: Launch) -> None:
        """Makes this node run exactly this attempt; does nothing where it does so already, or did and lost it."""
        if self.attempt != launch.attempt:
            await self.stop()
        if launch.standby and launch.attempt > self._newest:
            self._newest = launch.attempt
            self._start_hot(launch)
        elif launch.store is None:
            await self._host_store(launch)
        elif launch.attempt > self._newest:
            self._newest = launch.attempt
            await self._start(launch, launch.store)
        if self._attempt and self._attempt.launch.attempt == launch.attempt:
            self._ask(launch)

    async def stop(self) -> None:
        """Kills what runs and returns when the kernel has confirmed every death."""
        if self._attempt is None or self._attempt.ended.is_set():
            return
        self._attempt.group.kill()
        await self._attempt.ended.wait()

    async def drop_standby(self, term: int, wanted: Standby | None, launch: Launch | None = None) -> None:
        """Ends the one that is there, unless it is the one that is wanted, or the attempt is about to be launched into it."""
        standby = self.standby
        numbers = (wanted.number if wanted else 0, launch.standby if launch and launch.attempt > self._newest else 0)
        if standby and (standby.term != term or standby.number not in numbers):
            self.standby = None
            await standby.end()
            self._on_change()

    async def stand_by(self, term: int, wanted: Standby) -> None:
        """Sees to it that the wanted standby forms."""
        if self.standby is None:
            self.standby = HotStandby(term, wanted, self.node, self._on_change)
            self._on_change()
        await self.standby.meet(self.reserve)
        if wanted.store:
            cluster = self._settings.config.cluster
            self.standby.form(self._standby_group(wanted, wanted.store), wanted.store, self.reserve, within_s=cluster.start_timeout_s)

    def blame_all(self, kind: str, why: str) -> None:
        """The node itself broke its ranks (its persister died, say): kill them, and let the reason be that."""
        if self.standby and kind in ("lease", "fenced"):
            self.standby.fail(why)
        if not self.running:
            return
        assert self._attempt
        for rank in self._attempt.ranks:
            rank.blame = rank.blame or (kind, why)
        self._attempt.group.kill()

    def reports(self) -> tuple[RankReport, ...]:
        if self._attempt is None:
            return ()
        ordered_at = self._attempt.ordered_at
        return tuple(report(rank, i, self._patience.step_s, ordered_at) for i, rank in enumerate(self._attempt.ranks))

    @property
    def ordered_s(self) -> float:
        """Since the order to launch `attempt` came."""
        return round(time.monotonic() - self._attempt.ordered_at, 4) if self._attempt else 0.0

    def look(self) -> tuple[Pace, ...]:
        """Looks at every rank: what the agent does every PERIOD_S, to see whether a report would say something new."""
        now = time.monotonic()
        self._witness.refresh(now)
        if self._attempt and self._attempt.is_fresh and self._attempt.is_settled(now):
            self._attempt.is_fresh = False
            self.reserve.prepare(self._attempt.launch.num_ranks, in_time=True)
        return tuple(look(rank, now) for rank in self._attempt.ranks) if self._attempt else ()

    async def autopsy(self, attempt: int) -> None:
        """Takes the stacks of this attempt's ranks, all of them before any of them is killed; once. Who is dead already has none."""
        if attempt <= self.autopsied:
            return
        if self._attempt and self.running and self.attempt == attempt:
            await self._take_stacks(self._attempt)
        self.autopsied = attempt
        self._on_change()

    async def _take_stacks(self, attempt: _Attempt) -> None:
        alive = [rank for rank in attempt.ranks if rank.exit is None]
        attempt.in_autopsy = True
        for rank in alive:
            rank.watch.give_up()
            rank.process = stacks.state(rank.pid)
        taken = await stacks.take([Subject(rank.pid, rank.answers) for rank in alive])
        attempt.in_autopsy = False
        for rank, found in zip(alive, taken, strict=True):
            rank.stacks = found
        texts = {rank_stacks_key(attempt.launch.attempt, rank.number): autopsy_text(rank, self.node) for rank in alive}
        with contextlib.suppress(TimeoutError):  # hurts only who wants to read them: the report has the innermost lines
            async with asyncio.timeout(KEEP_STACKS_S):
                await asyncio.to_thread(self.logs.write, texts)
        if attempt.is_lost:
            attempt.group.kill()

    async def _host_store(self, launch: Launch) -> None:
        if launch.store_node != self.node or launch.attempt in self._hosted or launch.attempt <= self._newest:
            return
        store = await self.reserve.store()
        for older in self._hosted.values():
            older.close()  # its ranks are dead
        self._hosted = {launch.attempt: store}
        self.store_address = StoreAddress(attempt=launch.attempt, host=store.host, port=store.port)
        self._on_change()

    async def _start(self, launch: Launch, address: StoreAddress) -> None:
        self._write_config(launch.overrides)
        if self._burial:
            await self._burial
        self._begin(launch, address, await self.reserve.launcher(launch.num_ranks))

    def _start_hot(self, launch: Launch) -> None:
        """In the standby that waits. The config that its ranks have read is that of the attempt: it has the same overrides."""
        standby, self.standby = self.standby, None
        assert standby, "an attempt is launched into what this node has said to be ready"
        handed = standby.hand_over()
        for older in self._hosted.values():
            older.close()
        self._hosted = {launch.attempt: handed.store} if handed.store else {}
        self._begin(launch, handed.address, handed.launcher)

    def _begin(self, launch: Launch, address: StoreAddress, launcher: Launcher) -> None:
        pages = [ProgressPage(self._page_path(launch, i), step=_first_step(launch)) for i in range(launch.num_ranks)]
        logs = [self.logs.path(rank_log_key(launch.attempt, launch.first_rank + i)) for i in range(launch.num_ranks)]
        log_starts = [path.stat().st_size if path.exists() else 0 for path in logs]
        specs = [self._rank_spec(launch, page.path, i) for i, page in enumerate(pages)]
        spec = self._group_spec(launch, address, specs, logs)
        group = RankGroup(spec, launcher, self.tether.socket if self.tether else None)
        old, self._attempt = self._attempt, _Attempt(launch, group, self._order[1])
        if old is not None:
            _close_pages(old)
        self._patience.begin(launch.world_size)
        self._witness.watch((*group.pids, group.launcher_pid))
        self._attempt.ranks = [
            LocalRank(
                number=launch.first_rank + i,
                pid=pid,
                page=pages[i],
                watch=Watch(self._patience, pages[i].read(), time.monotonic()),
                log=logs[i],
                log_start=log_starts[i],
                answers=stacks.answer_path(self._settings.scratch, launch.attempt, i),
            )
            for i, pid in enumerate(group.pids)
        ]
        for sentinel, local_rank in group.sentinels.items():
            asyncio.get_running_loop().add_reader(sentinel, self._on_exit, self._attempt, sentinel, local_rank)
        self._on_change()

    def _on_exit(self, attempt: _Attempt, sentinel: int, local_rank: int) -> None:
        asyncio.get_running_loop().remove_reader(sentinel)
        rank = attempt.ranks[local_rank]
        found = attempt.group.ended(local_rank)
        assert found is not None
        rank.ended_at = time.monotonic()
        rank.stopped = attempt.group.was_stopped(local_rank) and found.kind == "signal"  # else it failed before we could stop it
        rank.order = sum(other.order is not None for other in attempt.ranks)
        if not rank.stopped and (why := self._why_out_of_memory(attempt.group, rank, found)):
            found = replace(found, kind="oom", why=why)
        attempt.is_lost |= found.exit_code != 0
        if attempt.is_lost and not attempt.in_autopsy:
            attempt.group.kill()  # waiting for the order would only cost time
        if found.exit_code == 0 or rank.stopped:
            self._ended(attempt, rank, found)
        else:
            reading = asyncio.get_running_loop().create_task(self._end_with_tail(attempt, rank, found))
            self._readings.add(reading)
            reading.add_done_callback(self._readings.discard)

    def _why_out_of_memory(self, group: RankGroup, rank: LocalRank, found: Exit) -> str:
        """Of its own death, or of that of its launcher, which takes its ranks along; "" if it was something else."""
        if found.exit_code == -signal.SIGKILL:
            return self._witness.verdict(rank.pid)
        if found.exit_code != UNKNOWN_CODE or found.kind != "signal":
            return ""
        return self._witness.verdict(rank.pid) or self._witness.verdict(group.launcher_pid)

    async def _end_with_tail(self, attempt: _Attempt, rank: LocalRank, found: Exit) -> None:
        """A failure is told with its last words. They may lie on a disk that hangs: a thread reads them, and is not waited for long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TAIL_S):
                rank.tail = await asyncio.to_thread(tail, rank.log, rank.log_start)
        self._ended(attempt, rank, found)

    def _ended(self, attempt: _Attempt, rank: LocalRank, found: Exit) -> None:
        rank.exit = found
        if all(other.exit is not None for other in attempt.ranks):
            attempt.ended.set()
            self._burial = asyncio.create_task(self.reserve.bury(self.standby.pids if self.standby else ()))
        self._on_change()

    def _ask(self, launch: Launch) -> None:
        assert self._attempt
        for rank in self._attempt.ranks:
            rank.page.ask(Request(launch.request))
            rank.page.pace(launch.pacing)

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
            skips=launch.skips,
        )

    def _standby_group(self, order: Standby, address: StoreAddress) -> GroupSpec:
        scratch, count = self._settings.scratch, range(order.num_ranks)
        specs = [
            RankSpec(
                run=self._settings.run,
                attempt=0,
                nonce="",
                root=self._settings.root,
                config_path=str(self._settings.config_path),
                scratch=str(scratch),
                progress_path=str(scratch / f"standby-page-{i}"),
                staging_socket=str(self._settings.staging_socket),
                error_path=str(scratch / f"standby-error-{i}.json"),
                resume=None,
            )
            for i in count
        ]
        return self._group_spec(order, address, specs, [scratch / f"standby-{i}.log" for i in count])

    def _group_spec(self, seat: Launch | Standby, address: StoreAddress, specs: Sequence[RankSpec], logs: Sequence[Path]) -> GroupSpec:
        return GroupSpec(
            specs=tuple(specs),
            log_paths=tuple(map(str, logs)),
            program=self._settings.program,
            node=self.node,
            first_rank=seat.first_rank,
            group_rank=seat.group_rank,
            num_nodes=seat.num_nodes,
            world_size=seat.world_size,
            master_addr=address.host,
            master_port=address.port,
            interface=interface_of(self._settings.address),
        )

    def _write_config(self, overrides: Sequence[str]) -> None:
        """For the ranks. Raises InputError where run.toml was changed since this agent began: it must begin anew."""
        config = overridden(self._settings.config, overrides)
        self._settings.config_path.write_text(json.dumps(config.model_dump(mode="json"), indent=1))

    def _page_path(self, launch: Launch, local_rank: int) -> Path:
        return self._settings.scratch / f"progress-{launch.attempt:06d}-{local_rank}"


def _first_step(launch: Launch) -> int:
    return launch.resume.step if launch.resume else 0


def _close_pages(attempt: _Attempt) -> None:
    for rank in attempt.ranks:
        rank.page.close()
        rank.answers.unlink(missing_ok=True)
