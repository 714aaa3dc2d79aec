"""The coordinator's shell in virtual time: events in, requests carried out against a storage that may fail; and the platform around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sim_agent import Agent
from sim_world import Violation, World

from keepstep.orchestrator import events as ev
from keepstep.orchestrator import phases
from keepstep.orchestrator.machine import begin, directive, may_answer, step
from keepstep.orchestrator.policy import Policy
from keepstep.orchestrator.story import tell_event, tell_request
from keepstep.orchestrator.wire import AgentReport, Directive

TICK_S = 0.5
POLL_S = 0.8  # below the agents' period: their next report replaces the poll
FENCED_OUT = "fenced"


@dataclass(slots=True)
class Poll:
    """A report whose answer waits for news."""

    agent: Agent
    asked_at: float
    known: Directive | None


class Coordinator:
    def __init__(self, world: World, platform: Platform, policy: Policy, number: int) -> None:
        self.world, self.platform = world, platform
        self.host = f"c{number}"
        self.run = begin(policy)
        self.alive = True
        self.frozen_until = 0.0
        self._polls: dict[str, Poll] = {}
        self._working: set[ev.Asking] = set()
        self._told: object = None
        self._open()

    # --- the term ---------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        if self.alive and self.world.log.end is None:
            self.world.storage(self.host, self._append_opened, self._opened)

    def _append_opened(self) -> ev.Opened:
        log = self.world.log
        term = log.open(self.host)
        last, good = log.newest, log.resume_of()
        return ev.Opened(
            at=self.world.now,
            term=term,
            last_attempt=last.attempt if last else 0,
            last_gang=last.gang if last else (),
            last_world_size=last.world_size if last else 0,
            last_nonce=last.nonce if last else "",
            last_resume=last.resume if last else None,
            last_unconfirmed=last.unconfirmed if last else (),
            last_standing=last.standing if last else "",
            newest_commit=good,
            ever_committed=bool(log.history),
            rewound=log.rewound and self.world.mutant != "adopts-what-was-rewound",
            forgiven=log.rewound and log.is_forgiven,
            skips=log.skips,
            rewinds=log.num_bad_steps,
        )

    def _opened(self, event: ev.Opened | None, why: str) -> None:
        if event is None:
            self.world.at(0.5, self._open)
        elif self.alive:
            self.apply(event)
            self._tick()
            self._read_log()

    def _sleeps(self, work: Callable[..., None], *arguments: object) -> bool:
        """A suspended process finds everything waiting for it when it wakes."""
        if self.world.now >= self.frozen_until:
            return False
        self.world.at(self.frozen_until - self.world.now, work, *arguments)
        return True

    def _tick(self) -> None:
        if self.alive and not self._sleeps(self._tick):
            self.apply(ev.Tick(self.world.now))
            self.world.at(TICK_S, self._tick)

    def _read_log(self) -> None:
        if self.alive:
            began = self.world.now
            self.world.storage(self.host, lambda: (self.world.log.term, self.world.log.coordinator), self._log_was_read(began))
            self.world.at(1.0, self._read_log)

    def _log_was_read(self, began: float):  # type: ignore[no-untyped-def]
        def take(found: tuple[int, str] | None, _why: str) -> None:
            if found is None or not self.alive or self._sleeps(take, found, _why):
                return
            term, by = found
            newer = term > self.run.term and self.world.mutant != "no-term-check"
            self.apply(ev.Fenced(self.world.now, term, by) if newer else ev.LogRead(self.world.now, began))

        return take

    # --- events in, requests out ------------------------------------------------------------------------------------

    def apply(self, event: ev.Event) -> None:
        before = self.run
        self.run, requests = step(self.run, event)
        if requests or (self.run.phase is not before.phase and not isinstance(event, ev.Tick)):
            self.world.tell(f"{self.host}: {tell_event(event)}")
        for request in requests:
            self.world.tell(f"{self.host}:     {tell_request(request)}")
            self._carry_out(request)
        self._answer_news()

    def _carry_out(self, request: ev.Request) -> None:
        if isinstance(request, ev.Say):
            self.platform.check_verdict(self, request)
        elif request not in self._working:
            self._working.add(request)
            self.world.storage(self.host, lambda: self._work(request), lambda event, why: self._done(request, event, why))

    def _work(self, request: ev.Asking) -> ev.Event | str:
        """At one instant in storage: the term is checked and the record written, as create-if-absent of the next number does."""
        log, term = self.world.log, self.run.term
        if log.term > term and self.world.mutant != "no-term-check":
            return FENCED_OUT
        at = self.world.now
        match request:
            case ev.FindCheckpoint():
                rolled_forward = self._roll_forward()
                found = log.resume_of() if rolled_forward else self._find()
                return ev.Found(at, found, rolled_forward=rolled_forward, quarantined=frozenset(log.quarantined))
            case ev.FindAlone():
                said = {node: self.world.alone.get((term, attempt, node)) for node, attempt in request.suspects}
                alone = frozenset(node for node, ended in said.items() if ended is not None)
                return ev.FoundAlone(at, request, alone, frozenset(node for node in alone if said[node]))
            case ev.LogAttempt():
                return self._log_attempt(request)
            case ev.LogQuarantine(directory=directory):
                if directory not in log.quarantined:
                    log.append(term, ev.QuarantineRecord(directory))
                return ev.Logged(at, ev.QuarantineRecord(directory))
            case ev.LogRewind():
                return self._log_rewind(request)
            case ev.LogEnd():
                record = ev.EndRecord(outcome=request.outcome, step=request.step, why=request.why, requeue=request.requeue)
                if log.end is None:
                    log.append(term, record)
                return ev.Logged(at, record)
            case ev.Commit():
                return self._commit(request)

    def _roll_forward(self) -> bool:
        """Commits the newest save of the newest attempt that is whole in storage, as a predecessor would have."""
        log = self.world.log
        if log.newest is None or log.end is not None or log.rewound:
            return False
        newest_step = log.history[-1].step if log.history else -1
        whole = [
            (step, directory)
            for (attempt, step, directory), ranks in self.world.durable.items()
            if attempt == log.newest.attempt and step > newest_step and ranks == set(range(log.newest.world_size))
        ]
        if not whole:
            return False
        step, directory = max(whole)
        event = ev.Committed(at=self.world.now, attempt=log.newest.attempt, step=step, directory=directory, manifest_sha256="m")
        log.append(self.run.term, event)
        return True

    def _find(self) -> ev.Checkpoint | None:
        """A cache that lags behind now and then."""
        history = self.world.log.history
        if len(history) > 1 and self.world.rng.random() < 0.1:
            old = history[-2]
            return ev.Checkpoint(step=old.step, directory=old.directory, manifest_sha256=old.manifest_sha256)
        return self.world.log.resume_of()

    def _log_attempt(self, request: ev.LogAttempt) -> ev.Event:
        log = self.world.log
        record = ev.AttemptRecord(
            attempt=request.attempt,
            gang=request.gang,
            world_size=request.world_size,
            nonce=f"{self.world.rng.getrandbits(32):08x}",
            resume=request.resume,
            unconfirmed=request.unconfirmed,
            standing=request.standing,
            skips=request.skips,
        )
        if log.newest is not None and log.newest.attempt == request.attempt:
            record = log.newest  # asked twice
        elif request.resume is not None and request.resume.directory in log.quarantined:
            return ev.AttemptVoid(self.world.now, request.attempt, f"{request.resume.directory} is quarantined")
        else:
            log.append(self.run.term, record)
        return ev.Logged(self.world.now, record)

    def _log_rewind(self, request: ev.LogRewind) -> ev.Event:
        self._roll_forward()
        log, now, term = self.world.log, self.world.now, self.run.term
        if log.rewound and log.rewind and log.rewind[:2] == (term, request):
            return ev.Logged(now, log.rewind[2])  # asked twice
        target = log.newest_until(request.to)
        if target is None and (log.history if request.bad_step >= 0 else request.to > 0):
            return ev.RewindVoid(now, request, f"nothing at or before step {request.to}")
        record = ev.RewindRecord(
            resume=target, skips=request.skips, overrides=request.overrides, bad_step=request.bad_step, why=request.why
        )
        log.append(term, record)
        log.rewind = (term, request, record)
        self.world.spring("rewound")
        return ev.Logged(now, record)

    def _commit(self, request: ev.Commit) -> ev.Event:
        log = self.world.log
        durable = self.world.durable.get((request.attempt, request.step, request.directory), set())
        newest = self.world.gangs[request.attempt].record
        if durable != set(range(newest.world_size)) or {part.rank for part in request.indexes} != durable:
            raise Violation(f"commit of step {request.step}: durable are {durable} of {newest.world_size}, asked with {request.indexes}")
        event = ev.Committed(
            at=self.world.now, attempt=request.attempt, step=request.step, directory=request.directory, manifest_sha256="m"
        )
        if all(commit.directory != request.directory for commit in log.history):
            log.append(self.run.term, event)
        return event

    def _done(self, request: ev.Asking, event: ev.Event | str | None, why: str) -> None:
        if self._sleeps(self._done, request, event, why):
            return
        self._working.discard(request)
        if not self.alive:
            return
        now = self.world.now
        if event == FENCED_OUT:
            self.apply(ev.Fenced(now, self.world.log.term, self.world.log.coordinator))
        elif event is not None:
            assert not isinstance(event, str)
            self.apply(event)
        elif isinstance(request, ev.Commit):
            self.apply(
                ev.CommitFailed(at=now, attempt=request.attempt, step=request.step, directory=request.directory, why=why, damaged=False)
            )
        else:
            self.apply(ev.LogFailed(now, request, why))

    # --- agents -----------------------------------------------------------------------------------------------------

    def hear(self, agent: Agent, report: AgentReport, asked_at: float, known: Directive | None) -> None:
        if not self.alive or isinstance(self.run.phase, phases.Opening) or self._sleeps(self.hear, agent, report, asked_at, known):
            return
        self._polls[agent.id] = poll = Poll(agent, asked_at, known)
        self.apply(ev.Reported(self.world.now, report))
        if self._polls.get(agent.id) is poll and directive(self.run, agent.id) != known:
            self._answer(agent.id)
        else:
            self.world.at(POLL_S, self._answer_late, poll)

    def _answer_late(self, poll: Poll) -> None:
        if self._polls.get(poll.agent.id) is poll:
            self._answer(poll.agent.id)

    def _answer_news(self) -> None:
        """What is new is pushed: who waits for news gets it at once."""
        run = self.run
        unproven = run.read_at is None or run.now - run.read_at > run.policy.lease_s
        news = (run.revision, run.saves.committed_step, phases.name_of(run.phase), unproven)
        reports = [node.report for node in run.members.nodes.values()]
        store = [(report.store, report.standby.store if report.standby else None) for report in reports]
        if (news, store) == self._told:
            return
        self._told = (news, store)
        for node in list(self._polls):
            if directive(run, node) != self._polls[node].known:
                self._answer(node)

    def _answer(self, node: str) -> None:
        if self.alive and self.world.now >= self.frozen_until and may_answer(self.run, self.world.now):
            poll = self._polls.pop(node)
            self.world.send(self.host, poll.agent.host, poll.agent.take, poll.asked_at, directive(self.run, node))

    def hang_up(self, agent: Agent) -> None:
        if self.alive and not isinstance(self.run.phase, phases.Opening) and not self._sleeps(self.hang_up, agent):
            self.apply(ev.Disconnected(self.world.now, agent.id))

    def take_proof(self, agent: Agent) -> None:
        if self.alive and not isinstance(self.run.phase, phases.Opening) and not self._sleeps(self.take_proof, agent):
            self.apply(ev.Died(self.world.now, agent.id))

    def die(self) -> None:
        self.alive = False


class Platform:
    """What restarts dead things: Slurm, Kubernetes, `keepstep run`."""

    def __init__(self, world: World, policy: Policy, hosts: list[str]) -> None:
        self.world, self.policy = world, policy
        self.coordinators: list[Coordinator] = []
        self.agents: dict[str, Agent] = {}
        self.graves: dict[str, tuple[str, ...]] = {}
        self._numbers: dict[str, int] = {}
        for host in hosts:
            self.start_agent(host)
        self.start_coordinator()

    def start_coordinator(self) -> None:
        if self.world.log.end is None:
            self.coordinators.append(Coordinator(self.world, self, self.policy, len(self.coordinators) + 1))
            self.world.tell(f"coordinator {self.coordinators[-1].host} starts")

    def newest_coordinator(self) -> Coordinator | None:
        return self.coordinator_called(self.world.log.coordinator)

    def coordinator_called(self, host: str) -> Coordinator | None:
        return next((coordinator for coordinator in self.coordinators if coordinator.host == host), None)

    def start_agent(self, host: str) -> None:
        if host in self.agents and self.agents[host].alive:
            return
        if host in self.agents and self.agents[host].lingers():
            self.world.at(0.1, self.start_agent, host)  # who buries waits until the kernel confirms
            return
        number = self._numbers[host] = self._numbers.get(host, 0) + 1
        self.agents[host] = Agent(self.world, self, self.policy, host, number, self.graves.get(host, ()))
        self.world.tell(f"agent {self.agents[host].id} starts")

    def kill_agent(self, host: str, *, silently: bool, back_after_s: float | None) -> None:
        """Its processes are dead at once; peers learn at once only where the kernel still says goodbye."""
        agent = self.agents[host]
        if not agent.alive:
            return
        self.world.tell(f"agent {agent.id} dies {'silently' if silently else 'with its connections'}")
        self._spoil(agent)
        agent.die()
        self.graves[host] = (*self.graves.get(host, ()), agent.id)
        if not silently:
            self.hang_up(agent)
        if back_after_s is not None:
            self.world.at(back_after_s, self.start_agent, host)

    def hang_up(self, agent: Agent) -> None:
        for coordinator in self.coordinators:
            self.world.send(agent.host, coordinator.host, coordinator.hang_up, agent)

    def retire(self, agent: Agent, *, again: bool) -> None:
        """The agent leaves by itself: the run is over, or it was given up and comes back under a new name."""
        if agent.alive:
            self.kill_agent(agent.host, silently=True, back_after_s=0.2 if again else None)

    def _spoil(self, agent: Agent) -> None:
        for rank in agent.ranks:
            self.world.gangs[rank.attempt].clear_case = False

    # --- verdicts ---------------------------------------------------------------------------------------------------

    def check_verdict(self, coordinator: Coordinator, said: ev.Say) -> None:
        """Where nothing but ranks failed, the verdict names one that failed by itself, never a victim."""
        if said.kind != "failure" or said.attempt not in self.world.gangs:
            return
        gang = self.world.gangs[said.attempt]
        if said.rank >= 0 and gang.clear_case and gang.own_failures and said.rank not in gang.own_failures:
            raise Violation(f"verdict names rank {said.rank}, a victim of {sorted(gang.own_failures)}: {said.why}")
