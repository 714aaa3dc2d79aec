"""One per node: makes the node do what its directive says, and tells the coordinator the node's whole state.

The lease, without comparing clocks: the agent may keep its ranks only while, within every `lease_s`, it either got an answer from its
coordinator or read the run log and saw no newer attempt. `_obeyed_at` is the moment at which the newest such proof was *asked for*.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import sys
import time
from urllib.parse import urlsplit

from keepstep.storage.layout import alone_key
from keepstep.storage.lineage import Lineage
from keepstep.storage.store import Store
from keepstep.trainer.contract import EXIT_BAD_INPUT, EXIT_OK, EXIT_REQUEUE

from .client import CALL_TIMEOUT_S, CoordinatorRefused, CoordinatorUnreachable
from .contact import Contact, address_towards
from .forked import Program
from .forkserver import count_gpus, forkserver_pid, start_forkserver, wait_until_warm
from .going import Going, signal_grace_s
from .link import Link
from .lookout import Lookout, Sight
from .meeting import meet
from .node import NodeRanks, NodeSettings
from .patience import PERIOD_S, Patience
from .persisting import PersisterProcess
from .processes import kill, strays, wait_ended
from .scratch import Scratch
from .sections import RunConfig
from .tether import NoTether, tie
from .waiting import is_set_within
from .watching import watch_notices
from .wire import AgentReport, Directive, Launch

REPORT_S = 1.0  # the floor, until the coordinator names another; changes are reported at once
STEP_NEWS = 0.25  # news that is only "a step further" waits for this share of that time for company
RETRY_S = 0.1
TIE_S = 1.0  # how long the coordinator may take to accept a tether; without one its lease says when a node is dead
LOG_PERIOD_S = 5.0  # how often the ranks' output goes to a remote root


class Agent:
    """One incarnation of a node's agent. `run()` returns the process's exit code."""

    def __init__(self, name: str, contact: Contact, config: RunConfig, scratch: Scratch, store: Store) -> None:
        self.name = name
        self.config = config
        self.scratch = scratch
        self.id = ""
        self._store = store
        self._lookout = Lookout(config)
        self._doubt = asyncio.Event()
        self._token = contact.token
        self._url = contact.url.rstrip("/")
        self._report_s = REPORT_S
        self._address = address_towards(urlsplit(contact.url).hostname or "127.0.0.1")
        self._persister = PersisterProcess(scratch.staging_socket, config.run.root, config.storage.slow_s, self._changed, config.checkpoint)
        self._patience = Patience(config.cluster.hang_s)
        self._ranks = self._incarnate()
        self._news = asyncio.Event()
        self._ordered = asyncio.Event()
        self._directive: Directive | None = None
        self._term = 0
        self._slots = 0
        self._sequence = 0
        self._obeyed = 0
        self._obeyed_at = self._answered_at = time.monotonic()
        self._warm = asyncio.Event()
        self._going = Going(self._changed)
        self._signal_grace_s = signal_grace_s(config.cluster.stop_grace_s)
        self._heard: AgentReport | None = None  # the newest report that was answered
        self._answered = asyncio.Event()
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    # --- what the node is -------------------------------------------------------------------------------------------

    def _incarnate(self) -> NodeRanks:
        """A fresh identity, never used before; the older ones on this scratch directory are dead and buried."""
        self.id = f"{self.name}#{secrets.token_hex(2)}"
        self.buried = self.scratch.begin(self.id)
        settings = NodeSettings(
            run=self.config.run.name,
            root=self.config.run.root,
            program=Program(self.config.train.script, self.config.train.script_args, self.config.train.preload),
            scratch=self.scratch.path,
            address=self._address,
            config_path=self.scratch.path / "config.json",
            staging_socket=self.scratch.staging_socket,
            config=self.config,
        )
        return NodeRanks(self.id, settings, self._store, self._patience, self._changed)

    def _report(self) -> AgentReport:
        self._sequence += 1
        return AgentReport(
            node=self.id,
            host=socket.gethostname(),
            pid=os.getpid(),
            address=self._address,
            slots=self._slots,
            sequence=self._sequence,
            term=self._term,
            obeyed=self._obeyed,
            ready=self._warm.is_set() and self._persister.is_up and not self._going.why,
            buried=self.buried,
            attempt=self._ranks.attempt,
            ordered_s=self._ranks.ordered_s,
            ranks=self._ranks.reports(),
            store=self._ranks.store_address,
            standby=self._ranks.standby.report() if self._ranks.standby else None,
            persisted=self._persister.persisted,
            leaving=self._going.why,
            leaves_in_s=self._going.left_s,
            save_s=round(self._persister.save_s, 3),
            storage=self._persister.trouble,
        )

    def _changed(self) -> None:
        self._news.set()

    # --- running ----------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Serves until the run is over or the node leaves; nothing that it started survives it."""
        self._handle_signals()
        loops = (
            self._warm_up(),
            self._converse(),
            self._obey(),
            self._keep_lease(),
            self._look_into_log(),
            self._watch_pace(),
            self._watch_persister(),
            self._ship_logs(),
            watch_notices(self.config.cluster.notices, self.config.cluster.stop_grace_s, self._going.hear),
            self._go(),
        )
        tasks = [asyncio.create_task(loop) for loop in loops]
        for task in tasks:
            task.add_done_callback(self._on_loop_end)
        try:
            return await self._exit
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._ranks.stop()
            await self._ranks.drop_standby(0, None)
            await asyncio.to_thread(self._ranks.logs.ship)
            left_s = self._going.left_s
            await self._persister.stop(self.config.cluster.stop_grace_s if left_s is None else left_s)
            await asyncio.to_thread(lambda: kill(strays(self.scratch.path)))

    def _on_loop_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() and not self._exit.done():
            self._exit.set_exception(task.exception() or AssertionError)

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        seconds = self._signal_grace_s
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            loop.add_signal_handler(number, self._going.hear, f"got {number.name}, {seconds:g} s are left", seconds)

    async def _go(self) -> None:
        """Told that this node must go: the coordinator moves the run off it, then it exits; when its time is over, in any case."""
        await self._going.wait(self._is_needed)
        if self._ranks.running:
            print(f"keepstep agent {self.id}: no time is left: its ranks are stopped", file=sys.stderr)  # noqa: T201
            await self._ranks.stop()
            await self._be_heard()
        self._finish(EXIT_REQUEUE)

    async def _be_heard(self) -> None:
        """Waits until the coordinator knows what is true now, or for as long as an answer may take: it will notice by itself, later."""
        told, until = self._sequence, time.monotonic() + self._patience_s
        self._changed()
        while (self._heard is None or self._heard.sequence <= told) and (left_s := until - time.monotonic()) > 0:
            self._answered.clear()
            await is_set_within(self._answered, left_s)

    def _is_needed(self) -> bool:
        """Whoever knows that we leave, and wants no ranks here now, will not want any later; what is saved must be committed first."""
        knows = self._heard is not None and bool(self._heard.leaving)
        wants = self._directive is None or self._directive.launch is not None
        return wants or not knows or self._ranks.running or not self._persister.is_idle

    def _finish(self, code: int) -> None:
        """A node that was to go says so, also where the run ended meanwhile: whoever started it must not take its end for the run's."""
        if not self._exit.done():
            self._exit.set_result(EXIT_REQUEUE if code == EXIT_OK and self._going.why else code)

    async def _warm_up(self) -> None:
        """Torch is imported in the forkserver, never in this process. A forkserver that died took its ranks along: another succeeds it."""
        while True:
            start_forkserver(self.config.run.root)
            await asyncio.to_thread(wait_until_warm)
            self._slots = self.config.cluster.ranks_per_node or await asyncio.to_thread(count_gpus) or 1
            self._ranks.reserve.prepare(self._slots, in_time=False)
            self._warm.set()
            self._changed()
            await wait_ended(forkserver_pid())
            self._warm.clear()

    # --- talking to the coordinator ---------------------------------------------------------------------------------

    async def _converse(self) -> None:
        """One connection at a time. Where it breaks or falls silent, another is tried at once, and the log looked into."""
        while True:
            try:
                link = await Link.open(self._url, self._token, patience_s=self._patience_s)
                try:
                    await self._talk(link, self.id)
                finally:
                    await link.close()
            except CoordinatorUnreachable:
                self._doubt.set()
                await asyncio.sleep(RETRY_S)
            except CoordinatorRefused as error:
                self._refused(error)
                await asyncio.sleep(RETRY_S)

    async def _talk(self, link: Link, node: str) -> None:
        """Tells whatever is new, and the whole state at least every `report_s`, until somebody else is to be told, or tells.

        A node that lives on and turns away says so: it must not be taken for dead.
        """
        listening = asyncio.create_task(self._listen(link))
        listening.add_done_callback(lambda _: self._changed())
        try:
            while (link.url, node) == (self._url, self.id):
                if listening.done():
                    listening.result()
                self._news.clear()
                await link.tell(self._report())
                await is_set_within(self._news, min(self._report_s, self._patience_s))
            if node == self.id:
                await link.say_goodbye()
        except CoordinatorUnreachable:
            await link.say_goodbye()
            raise
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def _listen(self, link: Link) -> None:
        while True:
            answer, heard, told_at = await link.hear()
            if answer.unable:
                self._doubt.set()
                continue
            self._report_s = answer.report_s
            if link.directive:
                self._take(link.directive, told_at)
            if heard:
                self._heard = heard
                self._answered.set()

    @property
    def _patience_s(self) -> float:
        return min(CALL_TIMEOUT_S, self.config.cluster.lease_s / 4)

    def _refused(self, error: CoordinatorRefused) -> None:
        """Whoever answers where our coordinator was may be somebody else's by now: the log says who rules."""
        if self._term:
            self._doubt.set()
            return
        print(f"keepstep agent {self.id}: {error}", file=sys.stderr)  # noqa: T201
        self._finish(EXIT_BAD_INPUT)

    def _take(self, directive: Directive, asked_at: float) -> None:
        """An answer of an older term comes from a coordinator that does not know yet that it was succeeded; an older revision was late."""
        if (directive.term, directive.revision) < (self._term, self._directive.revision if self._directive else 0):
            return
        if directive.term > self._term:
            self._obeyed = 0
        self._term = directive.term
        self._obeyed_at = max(self._obeyed_at, asked_at)
        self._answered_at = max(self._answered_at, asked_at)
        self._persister.settle(directive)
        if directive != self._directive:
            self._directive = directive
            self._ordered.set()

    # --- the lease --------------------------------------------------------------------------------------------------

    async def _keep_lease(self) -> None:
        """Looks only at the clock: nothing that it would have to wait for may delay the end of a lease."""
        lease_s = self.config.cluster.lease_s
        while True:
            await asyncio.sleep(lease_s / 20)
            if self._ranks.running and time.monotonic() - self._obeyed_at > lease_s:
                self._ranks.blame_all("lease", f"{self.id} reached neither its coordinator nor the run log for {lease_s:g} s")

    async def _look_into_log(self) -> None:
        """Where the coordinator does not answer, or may have been succeeded, the log does: it says whether somebody has replaced us.

        While nobody can read it, the coordinator's word must do: storage that is away stops no training.
        """
        lease_s = self.config.cluster.lease_s
        while True:
            await is_set_within(self._doubt, lease_s / 10)
            unproven = self._directive is not None and self._directive.unproven
            patience_s = lease_s / 6 if self._is_unanswered() and self._ranks.running else lease_s / 3
            if self._doubt.is_set() or unproven or time.monotonic() - self._obeyed_at > patience_s:
                self._doubt.clear()
                await self._find_successor()

    async def _find_successor(self) -> None:
        """Reads the run log: proof that nothing newer than our attempt exists, and the address of whoever rules now."""
        sight = await self._lookout.look(self._alone() if self._is_unanswered() else "", has_ended=not self._ranks.running)
        if sight is not None:  # otherwise it cannot observe: the lease runs on
            await self._obey_log(sight)

    def _is_unanswered(self) -> bool:
        """By the coordinator; what the log says is no answer."""
        return time.monotonic() - self._answered_at > self.config.cluster.lease_s / 3

    def _alone(self) -> str:
        """Whoever goes on although its coordinator does not answer says so first, under this key: the coordinator will look for it."""
        return alone_key(self._term, self._ranks.attempt, self.id)

    async def _obey_log(self, sight: Sight) -> None:
        if self._ranks.running and (why := replaced(self._lookout.log.lineage, self._ranks.attempt)):
            self._ranks.blame_all("fenced", why)
            await self._ranks.stop()
            self._doubt.set()  # whoever replaces us waits for our word, if we had said that we go on
            return
        if not self._ranks.running or sight.alone == self._alone():
            self._obeyed_at = max(self._obeyed_at, sight.began_at)
        opened = self._lookout.log.newest_opened()
        if opened and (outcome := self._lookout.log.lineage.outcome) and outcome.term == opened.term <= self._term:
            self._finish(EXIT_OK)  # its coordinator has left, or was killed before it could tell us
            return
        if opened and opened.term > self._term and opened.url and opened.url.rstrip("/") != self._url:
            self._url = opened.url.rstrip("/")
            self._changed()

    # --- doing what the directive says ------------------------------------------------------------------------------

    async def _obey(self) -> None:
        while True:
            await self._ordered.wait()
            self._ordered.clear()
            directive = self._directive
            assert directive
            if directive.over:
                return self._finish(EXIT_OK)
            if directive.forget:
                await self._start_anew()
            if directive.autopsy:
                await self._ranks.autopsy(directive.autopsy)
            await self._ranks.drop_standby(directive.term, directive.standby, directive.launch)
            await self._reconcile(directive.launch)
            if directive.standby and self._warm.is_set():  # a forkserver that died took the attempt along: there will be another order
                await self._ranks.stand_by(directive.term, directive.standby)
            if directive.term == self._term and directive.revision > self._obeyed:
                self._obeyed = directive.revision
                self._changed()

    async def _reconcile(self, launch: Launch | None) -> None:
        if launch is None:
            await self._ranks.stop()
        else:
            self._ranks.note_order(launch.attempt)
            await self._warm.wait()
            self.scratch.check()
            if launch.attempt != self._ranks.attempt:
                await self._tie()
            await self._ranks.pursue(launch)

    async def _tie(self) -> None:
        """A tether to whoever rules now, which all processes that could step will hold: so the older ones go first."""
        url, tether = self._url, self._ranks.tether
        if tether and tether.leads_to(url):
            return
        await self._ranks.stop()
        if tether:
            tether.abandon()
        try:
            self._ranks.tether = await tie(url, self._token, self.id, within_s=min(TIE_S, self.config.cluster.lease_s / 4))
        except NoTether as error:
            self._ranks.tether = None
            print(f"keepstep agent {self.id}: a lease decides when it dies: {error}", file=sys.stderr)  # noqa: T201

    async def _start_anew(self) -> None:
        """The coordinator gave this incarnation up: its ranks die, and the node comes back under a new name."""
        await self._ranks.stop()
        await self._ranks.drop_standby(0, None)
        if self._ranks.tether:
            self._ranks.tether.abandon()
        self._ranks.reserve.close()
        self._ranks = self._incarnate()
        self._sequence = 0
        self._directive = self._heard = None
        self._changed()

    # --- watching ---------------------------------------------------------------------------------------------------

    async def _watch_pace(self) -> None:
        """Progress in shared memory makes no event: it is looked at. A new phase or a hang is news; a further step can wait a little."""
        told, told_at = self._ranks.look(), time.monotonic()
        while True:
            await asyncio.sleep(PERIOD_S)
            pace, now = self._ranks.look(), time.monotonic()
            is_urgent = [(rank.phase, rank.is_overdue) for rank in pace] != [(rank.phase, rank.is_overdue) for rank in told]
            if is_urgent or (pace != told and now - told_at >= STEP_NEWS * self._report_s):
                told, told_at = pace, now
                self._changed()

    async def _ship_logs(self) -> None:
        """What the ranks printed, for people, where the root is no local directory: the whole file whenever it has grown."""
        while True:
            await asyncio.sleep(LOG_PERIOD_S)
            await asyncio.to_thread(self._ranks.logs.ship)

    async def _watch_persister(self) -> None:
        """Beside the first reports, not before them: a coordinator may be waiting to hear whom we have buried."""
        while True:
            await self._persister.start()
            why = await self._persister.serve()
            self._ranks.blame_all("persister", why)


def replaced(lineage: Lineage, attempt: int) -> str:
    """Why the log says that this attempt's ranks must stop; "" if it does not."""
    newest = lineage.newest_attempt()
    if newest and newest.attempt > attempt:
        return f"attempt {newest.attempt} has replaced attempt {attempt}"
    if newest and newest.attempt == attempt and lineage.rewound:
        return f"attempt {attempt} was rewound: {lineage.rewound.why}"
    return f"the run is over: {lineage.outcome.why}" if lineage.outcome else ""


async def meet_and_run(name: str, contact: Contact, scratch: Scratch) -> int:
    """From the forkserver's start to the agent's end; its exit code."""
    contact, config, store = await meet(contact, scratch.path)
    agent = Agent(name, contact, config, scratch, store)
    return await agent.run()
