"""One per run: the asyncio shell around the pure machine. Torch-free.

Events go in one at a time, on the loop; requests come out and are carried out beside it: everything that touches the run log in one
thread, in order; what is slow and idempotent (reading rank indexes, writing a manifest) in others. The answer comes back as an event.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from keepstep.storage.errors import Fenced, StoreError
from keepstep.storage.records import Quarantine
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store
from keepstep.trainer.contract import EXIT_REQUEUE

from . import config as configs
from . import events as ev
from . import phases, rewinding, rewinds
from .archive import utc_now, write_result
from .books import Books, no_books
from .commits import InvalidCheckpoint, write_manifest
from .directives import Orders, directive_of, orders
from .endings import exit_code_of
from .errors import InputError
from .janitor import Hooks, Janitor
from .logbook import Logbook
from .machine import Run, begin, may_answer, step
from .policies import policy_of
from .relations import broken
from .sections import RunConfig
from .status import last_commit, live_age_s, live_status, slowest_step
from .timing import Timekeeper
from .waiting import is_set_within
from .wire import AgentReport, Directive

T = TypeVar("T")

TICK_S = 0.1
REPORT_S = 1.0  # the floor: changes are reported at once
MAX_REPORTS_PER_S = 1000.0
LOG_READ_PERIOD_S = 1.0
GOODPUT_WAIT_S = 0.5
REWIND_WAIT_S = 3.0  # below what the command line waits for an answer
FAREWELL_S = 3.0  # how long the agents may take to hear that the run is over


@dataclass(frozen=True, slots=True)
class End:
    exit_code: int
    why: str


class NoAnswer(Exception):
    """There is nothing to say to this node at the moment: it goes on as it does, and asks again."""


class Listener(Protocol):
    """A connection to an agent."""

    node: str

    def wake(self) -> None: ...


class Coordinator:
    """One term. `serve()` returns when the run is over, or a newer coordinator reigns."""

    def __init__(self, config: RunConfig, store: Store, log: RunLog, tell: Callable[[dict[str, Any]], None]) -> None:
        self._given = config
        self.config = configs.overridden(config, log.lineage.overrides)
        self.log = log
        opened = log.newest_opened()
        assert opened, "the term is opened first"
        self.term, self._url = opened.term, opened.url
        self.store = store
        self.run: Run = begin(policy_of(self.config))
        self._logbook = Logbook(log, self.term)
        self._janitor = Janitor(store, log, config.checkpoint, self._hooks())
        self._books = Books(store, config.run.name, self.term)
        self._times = Timekeeper()
        self._tell = tell
        self._told_step = -1
        self._told_alarms = 0
        self._goodput = no_books()
        self._counting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._counting.set_result(None)
        self._rewind_answer: ev.Event | None = None  # of the log, to the newest wish
        self._working: set[ev.Asking] = set()
        self._links: dict[str, Listener] = {}  # by node: its newest connection
        self._orders = orders(self.run)
        self._seen_off: set[str] = set()  # nodes that were told that the run is over
        self._news = asyncio.Event()
        self._doubt = asyncio.Event()
        self._ended: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self._log_thread = ThreadPoolExecutor(1, thread_name_prefix="run-log")
        self._event_thread = ThreadPoolExecutor(1, thread_name_prefix="events")
        self._tasks: set[asyncio.Task[None]] = set()

    # --- a reign ----------------------------------------------------------------------------------------------------

    async def reign(self, opened: ev.Opened) -> End:
        """From our `opened` record to the end. The server must be listening already: its URL stands in that record."""
        self._apply(opened)
        if why := configs.explain_overrides(self._given, self.log.lineage.overrides):
            self._say(ev.Say(kind="overridden", why=why))
        self._janitor.start()
        periodic = [asyncio.create_task(self._tick()), asyncio.create_task(self._read_log())]
        for task in periodic:
            task.add_done_callback(self._on_task_end)
        try:
            end = await self._ended
            await self._see_agents_off()
            return end
        finally:
            self._janitor.stop()  # before anything is awaited: a cancelled reign must not leave it behind
            for task in (*periodic, *self._tasks):
                task.cancel()
            await asyncio.gather(*periodic, *self._tasks, return_exceptions=True)
            self._event_thread.submit(self._books.flush)
            self._log_thread.shutdown()
            self._event_thread.shutdown()

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        """A loop or an answer that breaks is our bug: the reign ends with it, instead of standing still."""
        if not task.cancelled() and (error := task.exception()):
            self._break(error)

    def _break(self, error: BaseException) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)

    async def _tick(self) -> None:
        """They look at every node, so with thousands of them they come less often: they may take a twentieth of the time."""
        while True:
            began = time.monotonic()
            self._apply(ev.Tick(began))
            self._tell_progress()
            await asyncio.sleep(max(TICK_S, 19 * (time.monotonic() - began)))

    def _tell_progress(self) -> None:
        if (reached := slowest_step(self.run)) != self._told_step:
            self._told_step = reached
            told = {"kind": "progress", "attempt": self.run.attempt, "step": reached, "steps": self.config.run.steps}
            self._tell({**told, "at_s": round(time.monotonic(), 4)})

    async def _read_log(self) -> None:
        """Learns of a successor even when it has nothing to write."""
        while True:
            self._doubt.clear()
            await self._read_log_once()
            await is_set_within(self._doubt, LOG_READ_PERIOD_S)

    async def _read_log_once(self) -> None:
        began = time.monotonic()
        try:
            news = await self._in_log_thread(self.log.refresh)
        except StoreError:
            return  # cannot observe: the machine sees that no LogRead comes
        self._tell_alarms()
        for record in news:
            if isinstance(record, Quarantine):  # by people: our own do not come as news
                self._apply(ev.Damaged(time.monotonic(), record.directory, record.why))
        if (newest := self.log.newest_opened()) and newest.term > self.term:
            self._apply(ev.Fenced(time.monotonic(), newest.term, newest.host))
        else:
            self._apply(ev.LogRead(time.monotonic(), began))

    def _tell_alarms(self) -> None:
        """What is wrong with the log goes to people: its void records are void for everybody, but somebody must look at the storage."""
        for why in self.log.alarms[self._told_alarms :]:
            self._say(ev.Say(kind="alarm", why=f"run log: {why}"))
        self._told_alarms = len(self.log.alarms)

    async def _see_agents_off(self) -> None:
        """Keeps answering until every node has been told that the run is over. Whom this does not reach learns it from the log."""
        deadline = time.monotonic() + FAREWELL_S
        while time.monotonic() < deadline and self._anybody_there():
            await asyncio.sleep(TICK_S / 2)

    def _anybody_there(self) -> bool:
        now = time.monotonic()
        members = self.run.members
        told = self._seen_off | members.buried
        untold = (node for name, node in members.nodes.items() if name not in told)
        return any(node.broken_at is None and now - node.heard_at < 2 * self.report_s for node in untold)

    # --- events in, requests out ------------------------------------------------------------------------------------

    def _apply(self, event: ev.Event) -> None:
        self.run, requests = step(self.run, event)
        for request in requests:
            self._carry_out(request)
        self._news.set()
        if (current := orders(self.run)) != self._orders:
            self._orders = current
            for link in self._links.values():
                link.wake()

    def _carry_out(self, request: ev.Request) -> None:
        if isinstance(request, ev.Say):
            self._say(request)
        elif request not in self._working:
            self._working.add(request)
            task = asyncio.create_task(self._answer(request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(self._on_task_end)

    async def _answer(self, request: ev.Asking) -> None:
        try:
            event = await self._work(request)
        except StoreError as error:
            event = self._failed(request, str(error))
        except InvalidCheckpoint as error:
            event = self._failed(request, str(error), damaged=True)
        except Fenced as error:
            event = ev.Fenced(time.monotonic(), error.opened.term, error.opened.host)
        finally:
            self._working.discard(request)
        self._apply(event)

    async def _work(self, request: ev.Asking) -> ev.Event:
        if isinstance(request, ev.Commit):
            return await self._commit(request)
        answer = await self._in_log_thread(self._logbook.carry_out, request)
        if isinstance(request, ev.LogEnd):
            await self._end(request)
        if isinstance(request, ev.LogRewind):
            self._rewind_answer = answer
            self._reconfigure()
        return answer

    def _reconfigure(self) -> None:
        """What the overrides in force make of run.toml: agents hear of it with their next launch."""
        self.config = configs.overridden(self._given, self.log.lineage.overrides)
        self._apply(ev.Reconfigured(time.monotonic(), policy_of(self.config)))

    async def _commit(self, request: ev.Commit) -> ev.Event:
        manifest = await asyncio.to_thread(write_manifest, self.store, request)
        answer = await self._in_log_thread(self._logbook.commit, manifest)
        self._janitor.nudge()
        asyncio.get_running_loop().run_in_executor(self._log_thread, self.log.tidy)
        return answer

    async def _end(self, request: ev.LogEnd) -> None:
        await self._in_log_thread(write_result, self.store, self.log.lineage, await self._count())
        if not self._ended.done():
            self._ended.set_result(End(exit_code_of(request), request.why))

    def _failed(self, request: ev.Asking, why: str, *, damaged: bool = False) -> ev.Event:
        at = time.monotonic()
        if isinstance(request, ev.Commit):
            return ev.CommitFailed(at=at, attempt=request.attempt, step=request.step, directory=request.directory, why=why, damaged=damaged)
        return ev.LogFailed(at, request, why)

    def _say(self, event: ev.Say) -> None:
        if event.kind == "fenced" and not self._ended.done():
            self._ended.set_result(End(EXIT_REQUEUE, event.why))
        beside = self._times.hear(event, self.run)
        told = {"at": utc_now(), "term": self.term, "at_s": round(time.monotonic(), 4), **dataclasses.asdict(event), **beside}
        self._tell(told)
        self._event_thread.submit(self._books.append, told)
        if again := self._times.recovered(event, self.run):
            self._say(again)

    def _hooks(self) -> Hooks:
        """From the janitor's thread onto the loop."""
        loop = asyncio.get_running_loop()

        def apply(work: Callable[[], None]) -> None:
            if not self._janitor.is_stopping:
                work()

        def hear(work: Callable[[], None]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(apply, work)

        return Hooks(
            damaged=lambda directory, why: hear(lambda: self._apply(ev.Damaged(time.monotonic(), directory, why))),
            say=lambda kind, why: hear(lambda: self._say(ev.Say(kind=kind, why=why))),
            broke=lambda error: hear(lambda: self._break(error)),
        )

    async def _in_log_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._log_thread, work, *arguments)

    # --- what the server calls --------------------------------------------------------------------------------------

    def hear(self, report: AgentReport) -> None:
        """What it means for the node is in its next directive."""
        self._apply(ev.Reported(time.monotonic(), report))

    def orders_for(self, node: str) -> Orders:
        """Those of the moment. Raises NoAnswer while an answer could prolong a lease that a successor counts on."""
        if not may_answer(self.run, time.monotonic()):
            raise NoAnswer("the run log could not be read for a while: read it yourself")
        members = self.run.members
        if node not in members.nodes and node not in members.buried:
            # What a node runs is not known before its first report: a new coordinator would stop ranks that it is about to adopt.
            raise NoAnswer(f"{node} has not reported to term {self.term} yet")
        return self._orders

    def directive(self, node: str) -> Directive:
        """What the orders of the moment mean for a node."""
        return directive_of(self._orders, self.run, node)

    @property
    def report_s(self) -> float:
        """How often a node is to report although nothing has changed: thousands of them need not do so every second."""
        return min(max(REPORT_S, len(self.run.members.nodes) / MAX_REPORTS_PER_S), self.config.cluster.lease_s / 4)

    def join(self, link: Listener) -> None:
        """A node speaks to us over this connection from now on."""
        self._links[link.node] = link

    def leave(self, link: Listener, *, alive: bool) -> None:
        """A connection ended. Where it was the node's newest, its agent died, or has found our successor (the log says which, before
        drop_grace_s is over), or says that it lives and begins another."""
        if self._links.get(link.node) is not link:
            return
        del self._links[link.node]
        self._doubt.set()
        if not alive:
            self._apply(ev.Disconnected(time.monotonic(), link.node))

    def seen_off(self, node: str) -> None:
        """It was told that the run is over."""
        self._seen_off.add(node)

    def died(self, node: str) -> None:
        """The kernel says that its processes are gone."""
        self._doubt.set()
        self._apply(ev.Died(time.monotonic(), node))

    def ask_stop(self, why: str) -> None:
        self._apply(ev.StopAsked(time.monotonic(), why))

    def ask_save(self) -> None:
        self._apply(ev.SaveAsked(time.monotonic()))

    def ask_drain(self, node: str, why: str) -> None:
        self._apply(ev.DrainAsked(time.monotonic(), node, why))

    def ask_readmit(self, node: str) -> None:
        self._apply(ev.ReadmitAsked(time.monotonic(), node))

    def ask_resize(self, nodes: int) -> None:
        """Raises InputError where run.toml would not allow so many."""
        cluster = self.config.cluster.model_copy(update={"nodes": nodes, "min_nodes": min(self.config.cluster.min_nodes, nodes)})
        if problems := [problem.text for problem in broken(self.config.model_copy(update={"cluster": cluster}))]:
            raise InputError(*problems)
        self._apply(ev.ResizeAsked(time.monotonic(), nodes))

    async def ask_rewind(self, *, to: int, skip: Sequence[str], override: Sequence[str]) -> str:
        """What is done, once it is in the log or `REWIND_WAIT_S` is over. Raises InputError where it cannot be, or was not."""
        if isinstance(self.run.phase, (phases.Opening, phases.Ending, *phases.TERMINAL)):
            raise InputError("this coordinator is just beginning or ending; ask again in a few seconds")
        if rewinds.is_wanted(self.run):
            raise InputError("another rewind is just being written; ask again in a few seconds")
        lineage = self.log.lineage
        if to > (reached := max(self.run.reached, lineage.committed_step, 0)):
            raise InputError(f"--to {to}: the run has only reached step {reached}")
        wanted = rewinding.order(lineage, self._given, to=to, skip=skip, override=override)
        self._rewind_answer = None
        self._apply(ev.RewindAsked(at=time.monotonic(), to=wanted.to, skips=tuple(skip), overrides=tuple(override), why=wanted.why))
        deadline = time.monotonic() + REWIND_WAIT_S
        while self._rewind_answer is None and rewinds.is_wanted(self.run) and (left := deadline - time.monotonic()) > 0:
            self._news.clear()
            await is_set_within(self._news, left)
        return self._explain_rewind(rewinding.where_to(lineage.newest_until(wanted.to), wanted))

    def _explain_rewind(self, where: str) -> str:
        """By what the log answered; the next attempt may be in it by now. Raises InputError."""
        match self._rewind_answer:
            case ev.Logged(record=ev.RewindRecord() as record):
                return f"going back {rewinding.where_to(record.resume, record)}: all ranks are stopped, the next attempt begins there"
            case ev.RewindVoid(why=why):
                raise InputError(f"not rewound: {why}; the run goes on from its newest checkpoint")
        if not rewinds.is_wanted(self.run) or isinstance(self.run.phase, (phases.Ending, *phases.TERMINAL)):
            raise InputError(f"not rewound: {self.run.phase.why}; ask again once the run is over")
        late = "it is not in the run log yet: `keepstep events` tells when, and a coordinator that dies before forgets it"
        return f"going back {where}: all ranks are stopped, the next attempt begins there; {late}"

    async def status(self) -> dict[str, Any]:
        """The document of `keepstep status --json`. It never waits for storage: what is read from files may be a little old."""
        if self._counting.done():
            self._counting = asyncio.create_task(self._count_goodput())
        await asyncio.wait((self._counting,), timeout=GOODPUT_WAIT_S)
        live = live_status(self.run, self.config, url=self._url)
        return {**live, "last_commit": last_commit(self.log.lineage, live_age_s(self.run)), **self._goodput}

    async def _count_goodput(self) -> None:
        self._goodput = await self._count()

    async def _count(self) -> dict[str, Any]:
        """In the thread that writes the events: it is as far as they are."""
        lineage, timing, at = self.log.lineage, self._times.now(self.run), time.monotonic()
        return await asyncio.get_running_loop().run_in_executor(self._event_thread, self._books.document, lineage, timing, at)
