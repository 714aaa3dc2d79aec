"""What goes wrong in a simulated run: drawn from the seed, over by a known time, after which the run must end well."""

from __future__ import annotations

from sim_coordinator import Coordinator, Platform
from sim_world import STORE, Violation, Weather, World

from keepstep.orchestrator import events as ev
from keepstep.orchestrator import phases
from keepstep.orchestrator.machine import describe
from keepstep.orchestrator.policy import Policy
from keepstep.storage import skips
from keepstep.trainer.contract import Phase

STEPS = 24
CALM_S = 240.0  # after the last fault


class Simulation:
    """One seed: a cluster, a plan of faults, and the verdict on how the machine bore it."""

    def __init__(self, seed: int, *, mutant: str = "", faults: tuple[str, ...] = (), steps: int = STEPS) -> None:
        self.seed = seed
        self.world = World(seed, steps=steps, mutant=mutant)
        rng = self.world.rng
        nodes = rng.choice((1, 2, 2, 3))
        self.hopeless = rng.choice(("same", "other", "bad-steps")) if rng.random() < 0.08 else ""
        self.spares = rng.choice((0, 0, 1))
        self.policy = Policy(
            steps=steps,
            nodes=nodes,
            min_nodes=rng.randint(1, nodes),
            spares=self.spares,
            ranks_per_node=rng.choice((1, 1, 2)),
            hot_standby=seed % 2 == 0,
            lease_s=3.0,
            fence_s=1.0,
            outage_s=120.0,
            wait_for_nodes_s=8.0,
            start_timeout_s=30.0,
            stall_s=20.0,
            stop_grace_s=8.0,
            waits_when_preempted=rng.random() < 0.5,
            max_failures=4 if self.hopeless else 40,
            rewinds=3 if self.hopeless else 40,
            backoff_max_s=4.0,
        )
        self.world.log.budget = self.policy.rewinds
        self.hosts = [f"h{i}" for i in range(nodes + self.spares)]
        self.platform = Platform(self.world, self.policy, self.hosts)
        self._drained = self._noticed = False
        self._plan(faults)

    # --- the plan ---------------------------------------------------------------------------------------------------

    def _plan(self, faults: tuple[str, ...]) -> None:
        """`faults`: only these kinds, by name."""
        rng, world = self.world.rng, self.world
        self.calm_at = rng.uniform(8.0, 40.0) * self.policy.steps / STEPS
        kinds = (
            [self._kill_rank] * 3
            + [self._kill_agent] * 3
            + [self._cut] * 3
            + [self._isolate, self._isolate_bit_by_bit, self._kill_coordinator, self._second_coordinator, self._bad_weather] * 2
            + [self._hang_rank, self._resize, self._poison, self._poison, self._poison_and_kill, self._rewind, self._rewind_alone]
            + [self._kill_standby] * (2 if self.policy.hot_standby else 0)
            + [self._damage, self._quarantine, self._leave, self._drain, self._save, self._freeze_coordinator]
        )
        if faults:
            kinds = [getattr(self, f"_{name}") for name in faults]
        for _ in range(rng.randint(0, 6)):
            world.at(rng.uniform(0.5, self.calm_at), rng.choice(kinds))
        if rng.random() < 0.05:
            world.at(rng.uniform(0.5, self.calm_at), self._stop)
        if self.hopeless:
            self._curse()
        world.at(self.calm_at, self._calm_down)

    def _curse(self) -> None:
        """A program error that comes back every time: always the same one, or always another."""
        rng = self.world.rng
        if self.hopeless == "bad-steps":
            self.world.spoils_all = True
            return
        same = self.hopeless == "same"
        self.world.curse = lambda: "ValueError: bad batch" if same else f"ValueError: bad {''.join(rng.choices('abcdefgh', k=8))}"

    def _calm_down(self) -> None:
        self.world.tell("the faults stop")
        self.world.cuts.clear()
        self.world.weather = Weather()
        for host in self.hosts:
            self.platform.start_agent(host)
        if not any(coordinator.alive for coordinator in self.platform.coordinators):
            self.platform.start_coordinator()

    # --- faults -----------------------------------------------------------------------------------------------------

    def _kill_rank(self) -> None:
        world = self.world
        ranks = sorted(world.living, key=lambda rank: (rank.attempt, rank.rank))
        if ranks:
            rank = world.rng.choice(ranks)
            world.tell(f"SIGKILL hits rank {rank.rank} of attempt {rank.attempt}")
            world.fail(rank, -9, "signal", "SIGKILL")

    def _kill_standby(self) -> None:
        agents = [agent for agent in self.platform.agents.values() if agent.alive and agent.part is not None]
        if agents:
            agent = self.world.rng.choice(agents)
            self.world.tell(f"SIGKILL hits the standby on {agent.id}")
            self.world.at(self.world.rng.choice((0.0, 0.05)), agent.fail_standby, "a rank was killed")

    def _hang_rank(self) -> None:
        """It does nothing any more, and the others wait for it."""
        world = self.world
        ranks = [rank for rank in sorted(world.living, key=lambda rank: (rank.attempt, rank.rank)) if rank.phase == Phase.STEP]
        if ranks:
            rank = world.rng.choice(ranks)
            rank.hangs = True
            world.gangs[rank.attempt].own_failures.add(rank.rank)
            world.tell(f"rank {rank.rank} of attempt {rank.attempt} hangs")

    def _resize(self) -> None:
        self._order(lambda at: ev.ResizeAsked(at, self.world.rng.randint(1, len(self.hosts))))

    def _kill_agent(self) -> None:
        rng = self.world.rng
        back = rng.choice((0.3, 1.0, 5.0, 12.0))
        self.platform.kill_agent(rng.choice(self.hosts), silently=rng.random() < 0.5, back_after_s=back)

    def _cut(self) -> None:
        """One node or coordinator loses sight of one, several or all of the others."""
        rng = self.world.rng
        coordinators = [coordinator.host for coordinator in self.platform.coordinators if coordinator.alive]
        places = [*self.hosts, *coordinators, STORE]
        one = rng.choice([*self.hosts, *coordinators])
        others = [place for place in places if place != one]
        cuts = {frozenset((one, other)) for other in rng.sample(others, rng.choice((1, 1, 2, len(others))) if len(others) > 1 else 1)}
        self._lay(cuts, rng.uniform(0.3, 14.0))

    def _isolate(self) -> None:
        """A cable is pulled: a node sees nobody any more, or only the storage, or only its coordinator."""
        rng = self.world.rng
        one = rng.choice(self.hosts)
        spared = rng.choice(("", STORE, self.platform.coordinators[-1].host))
        places = [*self.hosts, *(coordinator.host for coordinator in self.platform.coordinators), STORE]
        if rng.random() < 0.5:  # connections break at once; otherwise silence is all that is seen
            self.platform.hang_up(self.platform.agents[one])
        self._lay({frozenset((one, place)) for place in places if place not in (one, spared)}, rng.uniform(4.0, 30.0))

    def _isolate_bit_by_bit(self) -> None:
        """A node that does not hear its coordinator still reads the log; some lease later it cannot do that either."""
        host, rng = self.world.rng.choice(self.hosts), self.world.rng
        places = [*self.hosts, *(coordinator.host for coordinator in self.platform.coordinators)]
        self._lay({frozenset((host, place)) for place in places if place != host}, 30.0)
        self.world.at(rng.uniform(0.5, 2.0) * self.policy.lease_s, self._lay, {frozenset((host, STORE))}, 15.0)

    def _lay(self, cuts: set[frozenset[str]], for_s: float) -> None:
        self.world.tell(f"cut for {for_s:.1f} s: " + ", ".join(sorted("|".join(sorted(cut)) for cut in cuts)))
        self.world.cuts |= cuts
        for gang in self.world.gangs.values():
            gang.clear_case = False
        self.world.at(for_s, self._heal, cuts)

    def _heal(self, cuts: set[frozenset[str]]) -> None:
        self.world.cuts -= cuts

    def _kill_coordinator(self) -> None:
        alive = [coordinator for coordinator in self.platform.coordinators if coordinator.alive]
        if alive:
            alive[-1].die()
            self.world.tell(f"coordinator {alive[-1].host} dies")
            self.world.at(self.world.rng.uniform(0.3, 6.0), self.platform.start_coordinator)

    def _freeze_coordinator(self) -> None:
        coordinator = self.platform.coordinators[-1]
        coordinator.frozen_until = self.world.now + self.world.rng.uniform(1.0, 15.0)
        self.world.tell(f"coordinator {coordinator.host} is suspended until {coordinator.frozen_until:.1f}")

    def _second_coordinator(self) -> None:
        """The platform believed that the first was dead."""
        self.platform.start_coordinator()
        if self.world.rng.random() < 0.5:  # and the first cannot see that it is not alone
            first, second = self.platform.coordinators[-2:]
            cuts = {frozenset((first.host, STORE))}
            gang = {rank.host for rank in self.world.living}
            if self.world.rng.random() < 0.5:  # nor can its gang
                cuts |= {frozenset((host, place)) for host in gang for place in (STORE, second.host)}
            if self.world.rng.random() < 0.7:
                self._move_idle_node(gang)
            self._lay(cuts, self.world.rng.uniform(1.0, 60.0))

    def _move_idle_node(self, gang: set[str]) -> None:
        """A node outside the gang starts anew, and so finds the second coordinator, while the gang listens to the first."""
        idle = [host for host in self.hosts if host not in gang]
        if idle and gang:
            self.platform.kill_agent(self.world.rng.choice(idle), silently=True, back_after_s=0.5)

    def _bad_weather(self) -> None:
        rng = self.world.rng
        self.world.weather = Weather(
            loss=rng.choice((0.0, 0.1, 0.4)),
            duplicates=rng.choice((0.0, 0.2)),
            slow=rng.choice((0.0, 0.1, 0.4)),
            refusals=rng.choice((0.0, 0.3, 0.9)),
            lost_answers=rng.choice((0.0, 0.2)),
        )
        self.world.at(rng.uniform(1.0, 10.0), self._good_weather)

    def _good_weather(self) -> None:
        self.world.weather = Weather()

    def _damage(self) -> None:
        """The newest checkpoint rots; the one before it stays good."""
        good = [commit for commit in self.world.log.history if commit.directory not in self.world.damaged]
        if len(good) > 1:
            self.world.tell(f"{good[-1].directory} rots")
            self.world.damaged.add(good[-1].directory)
            if self.world.rng.random() < 0.4:  # the scrub finds it before anybody needs it
                self._order(lambda at: ev.Damaged(at, good[-1].directory, "block 3"))

    def _quarantine(self) -> None:
        """A person forbids the newest checkpoint. The coordinator reads it in the log, sooner or later."""
        log = self.world.log
        good = [commit for commit in log.history if commit.directory not in log.quarantined | self.world.damaged]
        if len(good) > 1 and log.end is None and good[-1] == log.newest_good() and good[-1].step < log.steps:
            self.world.tell(f"a person quarantines {good[-1].directory}")
            log.append(log.term, ev.QuarantineRecord(good[-1].directory))
            if self.world.rng.random() < 0.7:
                self._order(lambda at: ev.Damaged(at, good[-1].directory, "a person said so"))

    def _poison(self) -> None:
        """Samples that will spoil the step that comes to them."""
        rng = self.world.rng
        first = self._fresh() + rng.randint(0, 8)
        self.world.poison |= set(range(first, first + rng.choice((1, 1, 2, 5))))
        self.world.tell(f"the samples at {sorted(self.world.poison)} are poisoned")

    def _poison_and_kill(self) -> None:
        """The coordinator dies when the step has been refused, or when the rewind has just been written."""
        self._poison()
        moment = self.world.rng.choice(("refused", "rewound"))
        delay = 0.0 if moment == "rewound" else self.world.rng.uniform(0.0, 0.3)
        self.world.ambush[moment] = lambda: self.world.at(delay, self._kill_coordinator)

    def _fresh(self) -> int:
        """A position that nobody has come to."""
        return max((position for positions in self.world.log.consumed.values() for position in positions), default=-1) + 1

    def _wish(self) -> tuple[int, tuple[str, ...]]:
        """Where a person wants to go back to, and what is to be left out."""
        rng, log = self.world.rng, self.world.log
        usable = [commit.step for commit in log.history if commit.directory not in log.quarantined]
        first = self._fresh() + rng.randint(0, 8)
        left_out = (f"{first}:{first + rng.randint(1, 4)}",) if rng.random() < 0.7 else ()
        return rng.choice(usable) if usable and rng.random() < 0.85 else 0, left_out

    def _rewind(self) -> None:
        to, left_out = self._wish()
        self._order(lambda at: ev.RewindAsked(at=at, to=to, skips=left_out, why=f"a person asked to go back to step {to}"))

    def _rewind_alone(self) -> None:
        """No coordinator answers, so a person writes the record; the next one starts later."""
        log = self.world.log
        for coordinator in self.platform.coordinators:
            coordinator.die()
        if log.end is None and log.newest is not None:
            to, left_out = self._wish()
            record = ev.RewindRecord(
                resume=log.newest_until(to), skips=skips.union(log.skips, left_out), overrides=(), bad_step=-1, why="a person"
            )
            log.append(log.open("a person"), record)
            log.rewind = None
            self.world.tell(f"a person rewinds to {to} without {left_out}")
        self.world.at(self.world.rng.uniform(0.3, 6.0), self.platform.start_coordinator)

    def _leave(self) -> None:
        """A spot notice."""
        agent = self.platform.agents[self.world.rng.choice(self.hosts)]
        if agent.alive:
            self._noticed = True
            agent.leaving = "spot notice"
            agent.tell()
            self.world.at(12.0, self._gone, agent.host, agent.id)

    def _gone(self, host: str, node: str) -> None:
        if self.platform.agents[host].id == node:
            self.platform.kill_agent(host, silently=False, back_after_s=1.0)

    def _drain(self) -> None:
        if len(self.hosts) > self.policy.min_nodes and not self._drained:
            self._drained = True
            self._order(lambda at: ev.DrainAsked(at, self.world.rng.choice(self.hosts), "maintenance"))

    def _save(self) -> None:
        self._order(ev.SaveAsked)

    def _stop(self) -> None:
        self._order(lambda at: ev.StopAsked(at, "asked by a person"))

    def _order(self, make) -> None:  # type: ignore[no-untyped-def]
        coordinator = self.platform.coordinators[-1]
        if coordinator.alive and not isinstance(coordinator.run.phase, phases.Opening):
            coordinator.apply(make(self.world.now))

    # --- the judgement ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Raises Violation with the seed and the end of the story."""
        try:
            self.world.run_until(self.calm_at + CALM_S, self._is_over)
            self._judge()
        except AssertionError as error:
            story = "\n".join(list(self.world.story)[-400:])
            raise Violation(f"seed {self.seed}, at {self.world.now:.2f} s: {error}\n\n{story}") from error

    def _is_over(self) -> bool:
        return self.world.log.end is not None

    def _judge(self) -> None:
        end = self.world.log.end
        if end is None:
            states = "; ".join(
                f"{coordinator.host}: {_state(coordinator)}" for coordinator in self.platform.coordinators if coordinator.alive
            )
            raise Violation(f"not over {CALM_S:g} s after the last fault ({states})")
        stopped = any(coordinator.run.stop for coordinator in self.platform.coordinators)
        stopped |= self._noticed and not self.policy.waits_when_preempted
        if self.hopeless:
            expected = ("failed", "stopped") if stopped else ("failed",)
        else:
            expected = ("succeeded", "stopped") if stopped else ("succeeded",)
        if end.outcome not in expected:
            raise Violation(f"ended as {end.outcome}: {end.why}")


def _state(coordinator: Coordinator) -> str:
    return ": ".join(describe(coordinator.run))
