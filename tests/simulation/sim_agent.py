"""An agent as the machine may rely on it: obeys the newest directive, reports its whole state, keeps its lease."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sim_world import Rank, World

from keepstep.orchestrator.policy import Policy
from keepstep.orchestrator.wire import AgentReport, Directive, Launch, Persisted, RankReport, Standby, StandbyReport, StoreAddress
from keepstep.trainer.contract import Phase

if TYPE_CHECKING:
    from sim_coordinator import Coordinator, Platform

PERIOD_S = 1.0
HANG_S = 3.0


@dataclass(eq=False)
class Part:
    """A standby's ranks on one node. They can do nothing but wait, and die."""

    term: int
    order: Standby
    host: str
    state: Literal["forming", "ready", "failed"] = "forming"
    why: str = ""
    is_joining: bool = False
    was_ready: bool = False

    @property
    def key(self) -> tuple[int, int]:
        return self.term, self.order.number


class Agent:
    """One incarnation on a host. Its processes (ranks, persister) die with it."""

    def __init__(self, world: World, platform: Platform, policy: Policy, host: str, number: int, buried: tuple[str, ...]) -> None:
        self.world, self.platform, self.policy, self.host = world, platform, policy, host
        self.id = f"{host}#{number}"
        self.buried = buried
        self.alive = True
        self.ranks: list[Rank] = []
        self.attempt = 0
        self.persisted: tuple[Persisted, ...] = ()
        self.leaving = ""
        self.store: StoreAddress | None = None
        self.part: Part | None = None
        self.request = 0
        self._newest = 0  # attempt launched or hosted
        self._sequence = 0
        self._term = 0
        self._obeyed = 0
        self._directive: Directive | None = None
        self._busy = False
        self.obeyed_at = world.now
        self._told_at = -1.0
        self._coordinator: Coordinator | None = None
        self._said_alone = (0, 0)  # term and attempt
        self._tether: Coordinator | None = None  # whose connection all of this incarnation's processes hold
        world.at(world.rng.random() * 0.3, self._beat)
        world.at(policy.lease_s / 3, self._keep_lease)

    # --- reports ----------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        if self.alive:
            if self.world.now - self._told_at >= PERIOD_S * 0.99:
                self.tell()
            self.world.at(PERIOD_S, self._beat)

    def tell(self) -> None:
        """The whole state, at once on any change."""
        coordinator = self._find_coordinator()
        if not self.alive or coordinator is None:
            return
        self._told_at = self.world.now
        self.world.send(self.host, coordinator.host, coordinator.hear, self, self._report(), self.world.now, self._directive)

    def _find_coordinator(self) -> Coordinator | None:
        if self._coordinator is None:
            self._coordinator = self.platform.newest_coordinator()
        return self._coordinator

    def _report(self) -> AgentReport:
        self._sequence += 1
        return AgentReport(
            node=self.id,
            host=self.host,
            pid=1,
            address=self.host,
            slots=0,
            sequence=self._sequence,
            term=self._term,
            obeyed=self._obeyed,
            ready=not self.leaving,
            buried=self.buried,
            attempt=self.attempt,
            ranks=tuple(_rank_report(rank, self.world.now) for rank in self.ranks),
            store=self.store,
            standby=self._report_standby(),
            persisted=self.persisted,
            leaving=self.leaving,
        )

    # --- directives -------------------------------------------------------------------------------------------------

    def take(self, asked_at: float, directive: Directive) -> None:
        """Never goes back to an older directive, whatever the network delivers."""
        if not self.alive:
            return
        is_old = (directive.term, directive.revision) < (self._term, self._directive.revision if self._directive else 0)
        if is_old and self.world.mutant != "any-revision":
            return
        self.obeyed_at = max(self.obeyed_at, asked_at)
        if directive.term != self._term:
            self._term, self._obeyed = directive.term, 0
        changed = directive != self._directive
        self._directive = directive
        self.persisted = tuple(part for part in self.persisted if not _is_settled(part, directive))
        if directive.over or directive.forget:
            self.platform.retire(self, again=directive.forget)
        elif changed:
            self._reconcile()
            self.tell()  # the next poll

    def _reconcile(self) -> None:
        directive = self._directive
        if self._busy or directive is None or not self.alive:
            return
        launch = directive.launch
        self._tend_standby(directive)
        self.request = launch.request if launch else 0
        if self._running() and (launch is None or launch.attempt != self.attempt):
            self._busy = True
            self._dump_stacks(directive.autopsy)
            self.world.at(self.world.rng.choice((0.02, 0.1, 0.3, 1.5)), self._kill, "", True)
        elif launch is not None and launch.attempt > self._newest and launch.standby:
            self._busy, self._newest = True, launch.attempt
            self.world.at(self.world.rng.choice((0.005, 0.02, 0.5)), self._hand_over, launch)
        elif launch is not None and launch.attempt > self._newest and launch.store is None:
            self._host_store(launch)
        elif launch is not None and launch.attempt > self._newest:
            self._busy, self._newest = True, launch.attempt
            self.world.at(self.world.rng.choice((0.05, 0.1, 0.2, 1.0)), self._fork, launch)
        else:
            self._comply(directive)

    def _dump_stacks(self, attempt: int) -> None:
        if attempt == self.attempt:
            for rank in self.ranks:
                rank.waits = not rank.hangs

    def _comply(self, directive: Directive) -> None:
        if (directive.term, directive.revision) != (self._term, self._obeyed):
            self._obeyed = directive.revision
            self.tell()

    def _running(self) -> bool:
        return any(rank.alive for rank in self.ranks)

    def _host_store(self, launch: Launch) -> None:
        if launch.store_node == self.id and (self.store is None or self.store.attempt != launch.attempt):
            self.store = StoreAddress(attempt=launch.attempt, host=self.host, port=1000 + launch.attempt)
            self.tell()

    def _fork(self, launch: Launch) -> None:
        self._busy = False
        if not self.alive:
            return
        self._tie()
        for rank in self._become(launch):
            self.world.join(rank, self, launch.skips)
        self.tell()
        self._reconcile()

    # --- the standby ------------------------------------------------------------------------------------------------

    def _tend_standby(self, directive: Directive) -> None:
        """There is the one that is wanted, or none; what an attempt is about to be launched into stays."""
        wanted, launch, part = directive.standby, directive.launch, self.part
        if part is not None and launch is not None and launch.attempt > self._newest and part.key == (directive.term, launch.standby):
            return
        if part is not None and (wanted is None or part.key != (directive.term, wanted.number)):
            self._end_standby()
        if wanted is not None and self.part is None:
            self.part = Part(directive.term, wanted, self.host)
            self.tell()
        if wanted is not None and wanted.store is not None and self.part is not None and not self.part.is_joining:
            self.part.is_joining = True
            self.world.at(self.world.rng.choice((0.3, 1.0, 3.0)), self.world.form, self.part, self)

    def _end_standby(self) -> None:
        if self.part is not None:
            self.world.end_part(self.part)
        self.part = None

    def _report_standby(self) -> StandbyReport | None:
        part = self.part
        if part is None:
            return None
        store = StoreAddress(attempt=0, host=self.host, port=5000 + part.order.number) if part.order.store_node == self.id else None
        return StandbyReport(term=part.term, number=part.order.number, state=part.state, why=part.why, store=store)

    def fail_standby(self, why: str) -> None:
        """Its ranks are dead; the agent says so until it is told to have none."""
        if self.alive and self.part is not None and self.part.state != "failed":
            self.part.state, self.part.why = "failed", why
            self.world.end_part(self.part)
            self.tell()

    def _hand_over(self, launch: Launch) -> None:
        """The standby's ranks become those of the attempt, dead ones too."""
        self._busy = False
        if not self.alive:
            return
        part, self.part = self.part, None
        ranks = self._become(launch)
        self.world.must_be_formed(part, launch)
        for rank in ranks:
            self.world.join(rank, self, launch.skips)
        if part is None or part.state != "ready":
            for rank in ranks:
                self.world.fail(rank, -9, "signal", "SIGKILL")
        self.tell()
        self._reconcile()

    def _become(self, launch: Launch) -> list[Rank]:
        self.attempt = launch.attempt
        step = launch.resume.step if launch.resume else 0
        self.ranks = [Rank(launch.attempt, launch.first_rank + i, i, self.host, step) for i in range(launch.num_ranks)]
        return self.ranks

    def _begin_unasked(self) -> None:
        """A mutant's standby, which takes its peers' death for an order."""
        part = self.part
        if self.world.mutant == "standby-begins-unasked" and part is not None and part.state == "ready":
            self.attempt += 1
            for i in range(part.order.num_ranks):
                self.world.join(Rank(self.attempt, part.order.first_rank + i, i, self.host, 0), self, ())

    def _kill(self, kind: str, reconciles: bool) -> None:
        for rank in self.ranks:
            if rank.alive:
                rank.stopped = not kind
                self.world.exit(rank, -9, kind or "signal", kind or "SIGKILL")
        if reconciles:
            self._busy = False
            self._reconcile()

    def on_exit(self, rank: Rank) -> None:
        """The kernel tells the agent; after a failure the node's other ranks are killed."""
        if not self.alive:
            return
        rank.order = sum(not each.alive for each in self.ranks) - 1
        if rank.exit_code and not rank.stopped:
            self._begin_unasked()
            self.world.at(0.01, self._kill, "", False)
        self.tell()

    # --- the lease --------------------------------------------------------------------------------------------------

    def _keep_lease(self) -> None:
        if not self.alive:
            return
        silent_s = self.world.now - self.obeyed_at
        if silent_s > self.policy.lease_s and self._running() and self.world.mutant != "no-lease":
            self.world.tell(f"{self.id}: lease ran out")
            self.world.gangs[self.attempt].clear_case = False
            self._kill("lease", False)
            self.fail_standby("lease")
        trusts = self.world.mutant == "trusts-unproven"
        unproven = self._directive is not None and self._directive.unproven and not trusts
        alone = (self._term, self.attempt)
        is_told = self._said_alone == alone or self.world.mutant == "goes-on-without-a-word"
        if self._running() and silent_s > self.policy.lease_s / 3 and not is_told:
            self.world.storage(
                self.host, lambda: self.world.alone.setdefault((*alone, self.id), False), lambda _, why: self._have_said(alone, why)
            )
        if unproven or silent_s > self.policy.lease_s * (0.9 if trusts else 1 / 3):
            self.world.storage(self.host, self._read_log, self._take_log(self.world.now, self._said_alone))
        self.world.at(self.policy.lease_s / 6, self._keep_lease)

    def _have_said(self, alone: tuple[int, int], why: str) -> None:
        """It is in storage that we go on without our coordinator's answers: what is read from now on prolongs the lease."""
        if not why:
            self._said_alone = alone

    def _take_back(self) -> None:
        """Our ranks are dead: whoever waits because we said that we go on need not wait any more."""
        said = (*self._said_alone, self.id)
        if said in self.world.alone:
            self.world.storage(self.host, lambda: self.world.alone.update({said: True}), lambda *_: None)

    def _read_log(self) -> tuple[int, str]:
        return self.world.log.attempt, self.world.log.coordinator

    def _take_log(self, began: float, alone: tuple[int, int]):  # type: ignore[no-untyped-def]
        def take(found: tuple[int, str] | None, _why: str) -> None:
            if found is None or not self.alive:
                return
            attempt, coordinator = found
            if self._running() and attempt > self.attempt:
                self.world.tell(f"{self.id}: attempt {attempt} has replaced attempt {self.attempt}")
                if self.world.mutant != "says-that-it-ended-and-goes-on":
                    self._kill("fenced", False)
                self._take_back()
            if not self._running() or alone == (self._term, self.attempt) or self.world.mutant == "goes-on-without-a-word":
                self.obeyed_at = max(self.obeyed_at, began)
            if self._coordinator is None or self._coordinator.host != coordinator:
                self._coordinator = self.platform.coordinator_called(coordinator)
                self.tell()

        return take

    # --- the persister ----------------------------------------------------------------------------------------------

    def stage(self, attempt: int, step: int, directory: str, rank: int) -> None:
        part = Persisted(attempt=attempt, step=step, rank=rank, directory=directory, index_sha256="x", num_bytes=1)
        self.world.at(0.05 + self.world.rng.random() * 0.8, self._persist, part)

    def _persist(self, part: Persisted) -> None:
        if self.alive:
            self.world.storage(self.host, lambda: self._write(part), lambda _, why: self._on_persisted(part, why))

    def _write(self, part: Persisted) -> None:
        self.world.durable.setdefault((part.attempt, part.step, part.directory), set()).add(part.rank)

    def _on_persisted(self, part: Persisted, why: str) -> None:
        if why:
            self.world.at(0.3, self._persist, part)
        elif self.alive:
            self.persisted = (*self.persisted, part)
            self.tell()

    # --- death ------------------------------------------------------------------------------------------------------

    def _tie(self) -> None:
        """Before a launch, when none of our ranks lives: a connection that the new ones will hold. Now and then none can be had."""
        coordinator = self._find_coordinator()
        if coordinator is not self._tether:
            can = coordinator is not None and self.world.reaches(self.host, coordinator.host) and self.world.rng.random() < 0.9
            self._tether = coordinator if can else None

    def die(self) -> None:
        """Some ranks die a little later: the kernel has to wait for a disk. Until then they hold the tether."""
        self.alive = False
        self._end_standby()
        for rank in self.ranks:
            if rank.alive and self.world.rng.random() < 0.3:
                self.world.at(self.world.rng.random() * 0.8, self._end, rank)
            elif rank.alive:
                self.world.exit(rank, -9, "signal", "SIGKILL")
        if not self.lingers() or self.world.mutant == "proof-while-ranks-live":
            self._prove_death()

    def _end(self, rank: Rank) -> None:
        self.world.exit(rank, -9, "signal", "SIGKILL")
        if not self.lingers() and self.world.mutant != "proof-while-ranks-live":
            self._prove_death()

    def lingers(self) -> bool:
        return not self.alive and self._running()

    def _prove_death(self) -> None:
        """The end of the stream is sent again until it arrives: late, or never where a cable is cut for good."""
        coordinator = self._tether
        if coordinator is None:
            return
        if not self.world.reaches(self.host, coordinator.host) or self.world.rng.random() < self.world.weather.loss:
            self.world.at(1.0, self._prove_death)
        elif self.world.rng.random() < 0.95:  # else somebody between resets the connection, which proves nothing
            self.world.at(0.01, coordinator.take_proof, self)


def _is_settled(part: Persisted, directive: Directive) -> bool:
    return part.attempt < directive.settled_attempt or part.step <= directive.committed_step


def _rank_report(rank: Rank, now: float) -> RankReport:
    return RankReport(
        rank=rank.rank,
        local_rank=rank.local_rank,
        pid=1,
        state="running" if rank.alive else "exited",
        phase=rank.phase,
        step=rank.step,
        beats=rank.step + 1,
        stands_by=True,
        quiet_s=now - rank.beat_at,
        limit_s=HANG_S if rank.phase == Phase.STEP and rank.step else 0.0,
        where="loop.py:1 f" if rank.waits or (rank.hangs and not rank.alive) else "",
        waits=rank.waits,
        exit_code=rank.exit_code,
        exit_order=None if rank.alive else rank.order,
        stopped_by_agent=rank.stopped,
        kind=rank.kind,
        why=rank.why,
        damaged=rank.why if rank.kind == "damaged-checkpoint" else "",
        **(rank.refusal if rank.kind == "bad-step" else {}),
    )
