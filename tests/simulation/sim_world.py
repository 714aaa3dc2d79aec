"""A cluster in virtual time: clock, network, run log, and the physics of ranks that step together. One seed, one story."""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from keepstep.orchestrator import events as ev
from keepstep.orchestrator.wire import Launch
from keepstep.storage import skips
from keepstep.trainer.contract import BAD_STEP_KIND, Phase, Request

STORE = "store"
SAMPLES = 2  # of a step
BLIND_S = 4.0  # who was refused by storage so recently could not know better: a lease and its margin


class Violation(AssertionError):
    """Something happened that must never happen."""


@dataclass
class Weather:
    """How bad the network and the storage are at the moment."""

    loss: float = 0.0
    duplicates: float = 0.0
    slow: float = 0.0  # share of messages and storage calls that take seconds
    refusals: float = 0.0  # share of storage calls that fail
    lost_answers: float = 0.0  # share of storage calls that work, but whose answer does not come


@dataclass
class Log:
    """What is in storage. Every rule that must hold for it is checked at every append."""

    steps: int
    budget: int = 0  # rewinds that bad steps may cause
    entries: list[tuple[int, Any]] = field(default_factory=list)  # (term, record)
    term: int = 0
    coordinator: str = ""
    attempt: int = 0
    newest: ev.AttemptRecord | None = None
    history: list[ev.Committed] = field(default_factory=list)
    quarantined: set[str] = field(default_factory=set)
    skips: tuple[str, ...] = ()
    rewound: bool = False  # since the newest attempt
    is_forgiven: bool = False  # people asked for the newest rewind
    rewind: tuple[int, ev.LogRewind, ev.RewindRecord] | None = None  # the newest: term, what was asked for, what was written
    num_bad_steps: int = 0
    consumed: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)  # (attempt, step) -> positions
    ledger: dict[int, tuple[int, ...]] = field(default_factory=dict)  # committed step of the history -> positions
    end: ev.EndRecord | None = None

    def open(self, coordinator: str) -> int:
        self.term += 1
        self.coordinator = coordinator
        self.entries.append((self.term, f"opened by {coordinator}"))
        return self.term

    def newest_good(self) -> ev.Committed | None:
        return next((commit for commit in reversed(self.history) if commit.directory not in self.quarantined), None)

    def resume_of(self) -> ev.Checkpoint | None:
        good = self.newest_good()
        return None if good is None else ev.Checkpoint(step=good.step, directory=good.directory, manifest_sha256=good.manifest_sha256)

    def newest_until(self, step: int) -> ev.Checkpoint | None:
        good = (commit for commit in reversed(self.history) if commit.step <= step and commit.directory not in self.quarantined)
        return next((ev.Checkpoint(step=one.step, directory=one.directory, manifest_sha256=one.manifest_sha256) for one in good), None)

    def append(self, term: int, record: ev.AttemptRecord | ev.Committed | ev.QuarantineRecord | ev.RewindRecord | ev.EndRecord) -> None:
        self._must(term == self.term, f"{type(record).__name__} of term {term} was written while term {self.term} reigns")
        self._must(self.end is None, f"{type(record).__name__} was written after the end")
        self.entries.append((term, record))
        match record:
            case ev.AttemptRecord():
                self._append_attempt(record)
            case ev.Committed():
                self._append_commit(record)
            case ev.QuarantineRecord(directory=directory):
                self._must(any(commit.directory == directory for commit in self.history), f"{directory} was never committed")
                self.quarantined.add(directory)
            case ev.RewindRecord():
                self._append_rewind(record)
            case ev.EndRecord():
                self._append_end(record)

    def _append_rewind(self, record: ev.RewindRecord) -> None:
        self._must(skips.cover(record.skips, self.skips), f"a rewind brings skipped samples back: {record.skips} after {self.skips}")
        self.num_bad_steps += record.bad_step >= 0
        self._must(self.num_bad_steps <= self.budget, f"rewind {self.num_bad_steps} for a bad step, the budget is {self.budget}")
        self._cut(record.resume)
        self.skips, self.rewound, self.is_forgiven = record.skips, True, record.bad_step < 0
        self._check_ledger()

    def _cut(self, resume: ev.Checkpoint | None) -> None:
        while self.history and (resume is None or self.history[-1].directory != resume.directory):
            self.history.pop()
        self._must(resume is None or bool(self.history), f"{resume} is not in the history")
        last = resume.step if resume else 0
        self.ledger = {step: positions for step, positions in self.ledger.items() if step <= last}

    def _check_ledger(self) -> None:
        """What the history has consumed is the beginning of the canonical order, but for what is skipped: no gap, nothing twice."""
        consumed = [position for step in sorted(self.ledger) for position in self.ledger[step]]
        expected = [skips.position_of(turn, self.skips) for turn in range(len(consumed))]
        self._must(consumed == expected, f"the history consumed {consumed}, without {self.skips} it should be {expected}")

    def _append_attempt(self, record: ev.AttemptRecord) -> None:
        self._must(record.attempt > self.attempt, f"attempt {record.attempt} after attempt {self.attempt}")
        self._must(
            record.resume == self.resume_of(), f"attempt {record.attempt} resumes from {record.resume}, newest is {self.resume_of()}"
        )
        self._must(record.resume is not None or not self.history, f"attempt {record.attempt} starts from scratch silently")
        self._must(record.skips == self.skips, f"attempt {record.attempt} skips {record.skips}, not {self.skips}")
        self._cut(record.resume)
        self.attempt, self.newest, self.rewound = record.attempt, record, False

    def _append_commit(self, record: ev.Committed) -> None:
        self._must(record.attempt == self.attempt, f"commit of attempt {record.attempt} while attempt {self.attempt} is the newest")
        self._must(not self.history or record.step > self.history[-1].step, f"commit of step {record.step} goes back")
        self._must(not self.rewound, f"commit of attempt {record.attempt}, which was rewound")
        before = self.history[-1].step if self.history else 0
        self.ledger |= {step: self.consumed[record.attempt, step] for step in range(before + 1, record.step + 1)}
        self.history.append(record)
        self._check_ledger()

    def _append_end(self, record: ev.EndRecord) -> None:
        if record.outcome == "succeeded":
            good = self.newest_good()
            self._must(good is not None and good.step == self.steps, "success without the commit of the last step")
        self.end = record

    @staticmethod
    def _must(holds: bool, why: str) -> None:
        if not holds:
            raise Violation(why)


@dataclass(eq=False)
class Rank:
    """One training process."""

    attempt: int
    rank: int
    local_rank: int
    host: str
    step: int
    phase: Phase = Phase.LOAD
    alive: bool = True
    exit_code: int | None = None
    order: int = 0
    stopped: bool = False
    kind: str = ""
    why: str = ""
    beat_at: float = 0.0  # its last sign of progress
    hangs: bool = False
    waits: bool = False  # as its stack showed
    refusal: dict[str, Any] = field(default_factory=dict)  # of a bad step: what its report says


@dataclass(eq=False)
class Gang:
    """All ranks of an attempt: they step together or not at all."""

    record: ev.AttemptRecord
    ranks: dict[int, Rank] = field(default_factory=dict)
    agents: dict[int, Any] = field(default_factory=dict)  # rank -> its agent
    skips: tuple[str, ...] = ()  # as the ranks were told
    own_failures: set[int] = field(default_factory=set)  # ranks that failed by themselves or were killed from outside
    clear_case: bool = True  # nothing but rank crashes troubled this attempt
    stepping: bool = False


class World:
    """Everything that the simulated parts share."""

    def __init__(self, seed: int, steps: int, mutant: str = "") -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.mutant = mutant
        self.log = Log(steps)
        self.weather = Weather()
        self.cuts: set[frozenset[str]] = set()
        self.gangs: dict[int, Gang] = {}
        self.living: set[Rank] = set()
        self.parts: dict[tuple[int, int], list[Any]] = {}  # of each standby: those of its nodes
        self.hot: dict[tuple[int, int], int] = {}  # standby -> the attempt that was launched into it
        self.durable: dict[tuple[int, int, str], set[int]] = {}
        self.damaged: set[str] = set()
        self.blind_at: dict[str, float] = {}  # host -> when storage last refused it
        self.curse: Callable[[], str] | None = None  # a program error that comes back at every attempt
        self.alone: dict[tuple[int, int, str], bool] = {}  # (term, attempt, node) that goes on without that coordinator -> does no more
        self.poison: set[int] = set()  # positions of samples that spoil a step
        self.spoils_all = False  # whatever the samples, step after step is bad
        self.ambush: dict[str, Callable[[], None]] = {}  # what happens at the next "refused" or "rewound"
        self.story: deque[str] = deque(maxlen=3000)
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    # --- time -------------------------------------------------------------------------------------------------------

    def at(self, delay: float, work: Callable[..., None], *arguments: Any) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.now + delay, self._count, work, arguments))

    def run_until(self, deadline: float, done: Callable[[], bool]) -> None:
        while self._queue and self._queue[0][0] <= deadline and not done():
            self.now, _, work, arguments = heapq.heappop(self._queue)
            work(*arguments)

    def tell(self, text: str) -> None:
        self.story.append(f"{self.now:8.3f}  {text}")

    # --- network and storage ----------------------------------------------------------------------------------------

    def reaches(self, one: str, other: str) -> bool:
        return frozenset((one, other)) not in self.cuts

    def send(self, source: str, target: str, deliver: Callable[..., None], *arguments: Any) -> None:
        """Messages are lost, late, repeated and overtake each other."""
        weather, random_ = self.weather, self.rng.random
        for _ in range(2 if random_() < weather.duplicates else 1):
            if random_() >= weather.loss:
                delay = random_() * 3.0 if random_() < weather.slow else 0.001 + random_() * 0.03
                self.at(delay, self._deliver, source, target, deliver, arguments)

    def _deliver(self, source: str, target: str, deliver: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if self.reaches(source, target):
            deliver(*arguments)

    def storage(self, client: str, work: Callable[[], Any], answer: Callable[[Any, str], None]) -> None:
        """Does `work` in storage at some instant and answers (result, "") or (None, why). Never both, never neither."""
        slow_s = 2.0 if self.rng.random() < self.weather.slow else 0.03
        self.at(0.003 + self.rng.random() * slow_s, self._store, client, work, answer)

    def _store(self, client: str, work: Callable[[], Any], answer: Callable[[Any, str], None]) -> None:
        if not self.reaches(client, STORE):
            self.blind_at[client] = self.now
            self.at(1.5, answer, None, "storage cannot be reached")
        elif self.rng.random() < self.weather.refusals:
            self.blind_at[client] = self.now
            self.at(0.05, answer, None, "503 slow down")
        else:
            self._answer(client, work(), answer)

    def _answer(self, client: str, result: Any, answer: Callable[[Any, str], None]) -> None:
        """An answer that got lost is read back, for as long as it takes."""
        if not self.reaches(client, STORE) or self.rng.random() < self.weather.lost_answers:
            self.at(0.7, self._answer, client, result, answer)
        else:
            self.at(0.003, answer, result, "")

    # --- ranks ------------------------------------------------------------------------------------------------------

    def gang_of(self, attempt: int) -> Gang:
        if attempt not in self.gangs:
            record = self.log.newest
            assert record is not None
            if record.attempt != attempt:
                raise Violation(f"attempt {attempt} was launched while the log's newest is {record.attempt}")
            self.gangs[attempt] = Gang(record)
        return self.gangs[attempt]

    def join(self, rank: Rank, agent: Any, told: tuple[str, ...]) -> None:
        gang = self.gang_of(rank.attempt)
        gang.skips = told
        gang.ranks[rank.rank], gang.agents[rank.rank] = rank, agent
        self._must_be_alone(rank.attempt, "is launched")
        self.living.add(rank)
        rank.beat_at = self.now
        self.at(0.1 + self.rng.random() * 0.4, self._loaded, gang, rank)

    # --- standbys ---------------------------------------------------------------------------------------------------

    def form(self, part: Any, agent: Any) -> None:
        """Its ranks have come to the meeting; when all are there they form their group."""
        if part.state != "forming" or agent.part is not part:
            return
        parts = self.parts.setdefault(part.key, [])
        parts.append((part, agent))
        if sum(each.order.num_ranks for each, _ in parts) == part.order.world_size:
            for each, its_agent in parts:
                self.at(self.rng.random() * 0.3, self._wait_there, each, its_agent)

    def _wait_there(self, part: Any, agent: Any) -> None:
        if part.state == "forming" and agent.part is part and agent.alive:
            part.state, part.was_ready = "ready", True
            agent.tell()

    def end_part(self, part: Any) -> None:
        """Its peers find out when they need it: those that were launched already."""
        attempt = self.hot.get(part.key)
        if attempt in self.gangs:
            self.gangs[attempt].clear_case = False
            self.at(0.01, self._break_up, self.gangs[attempt])

    def must_be_formed(self, part: Any, launch: Launch) -> None:
        """An attempt is launched into a standby that was ready on every node, and had the very same seats."""
        formed_by = [each for each, _ in self.parts.get(part.key, [])] if part else []
        if part is None or len(formed_by) < launch.num_nodes or not all(each.was_ready for each in formed_by):
            raise Violation(f"attempt {launch.attempt} is launched into standby {launch.standby}, which was never ready")
        self.hot.setdefault(part.key, launch.attempt)
        seats = {each.order.first_rank: (each.host, each.order.num_ranks) for each in formed_by}
        gang = [host for host, _ in (seats[first] for first in sorted(seats))]
        wanted = [node.partition("#")[0] for node in self.gang_of(launch.attempt).record.gang]
        formed = (part.order.first_rank, part.order.num_ranks, part.order.world_size, part.order.overrides, gang)
        if formed != (launch.first_rank, launch.num_ranks, launch.world_size, launch.overrides, wanted):
            raise Violation(f"attempt {launch.attempt} is launched into a standby that was formed as {formed}")

    def _loaded(self, gang: Gang, rank: Rank) -> None:
        if not rank.alive:
            return
        resume = gang.record.resume
        if resume is not None and resume.directory in self.damaged:
            self.exit(rank, 1, "damaged-checkpoint", f"{resume.directory}: block 3")
            return
        rank.phase, rank.beat_at = Phase.STEP, self.now
        ready = len(gang.ranks) == gang.record.world_size and all(each.phase == Phase.STEP for each in gang.ranks.values())
        if ready and not gang.stepping:
            gang.stepping = True
            self.at(self._step_s(), self._step, gang)

    def _step_s(self) -> float:
        return 0.5 + self.rng.random() * 0.4

    def _step(self, gang: Gang) -> None:
        ranks = list(gang.ranks.values())
        living = [rank for rank in ranks if rank.alive]
        if not living:
            return
        if len(living) < len(ranks):
            self._lose_peers(gang, living)
        elif any(rank.hangs for rank in living):
            self.at(0.5, self._step, gang)  # the others wait for it
        elif not self._connected(gang):
            gang.clear_case = False
            self.at(0.5, self._step, gang)  # a collective that hangs until the network is back
        else:
            self._make_step(gang, ranks)

    def _connected(self, gang: Gang) -> bool:
        if not self.cuts:
            return True
        hosts = sorted({rank.host for rank in gang.ranks.values()})
        return all(self.reaches(one, other) for one in hosts for other in hosts)

    def _lose_peers(self, gang: Gang, living: list[Rank]) -> None:
        """Those who hear of a death fail; the others hang until they are killed."""
        dead = {rank.host for rank in gang.ranks.values() if not rank.alive}
        for rank in living:
            hears = any(host == rank.host or self.reaches(host, rank.host) for host in dead)
            if hears and self.rng.random() < 0.7:
                self.at(self.rng.random() * 0.05, self.exit, rank, 1, "peer-lost", "connection closed by peer")

    def _make_step(self, gang: Gang, ranks: list[Rank]) -> None:
        attempt = gang.record.attempt
        self._must_be_alone(attempt, "steps")
        turns = range(ranks[0].step * SAMPLES, (ranks[0].step + 1) * SAMPLES)
        positions = tuple(skips.position_of(turn, gang.skips) for turn in turns)
        bad = [position for position in positions if position in self.poison or (self.spoils_all and ranks[0].step >= 2)]
        if bad:
            self._refuse(ranks, bad)
            return
        self.log.consumed[attempt, ranks[0].step + 1] = positions
        for rank in ranks:
            rank.step += 1
            rank.beat_at = self.now
        step = ranks[0].step
        if self.curse is not None and step >= 3:
            self.fail(self.rng.choice(ranks), 1, "exception", self.curse())
        request = max(agent.request for agent in gang.agents.values())
        last = step >= self.log.steps
        if step % 4 == 0 or request or last:
            self._save(gang, step)
        if last or request == Request.STOP:
            self._leave(ranks, Phase.DONE if last else Phase.STOPPED)
        else:
            self.at(self._step_s(), self._step, gang)

    def _refuse(self, ranks: list[Rank], bad: list[int]) -> None:
        """All ranks find the same, and say where it was."""
        step, named = ranks[0].step + 1, self.rng.choice(ranks).rank
        left_out = skips.union(f"{position}:{position + 1}" for position in bad)
        self.gangs[ranks[0].attempt].own_failures |= {rank.rank for rank in ranks}
        for rank in ranks:
            rank.refusal = {"bad_step": step, "bad_ranks": (named,), "skips": left_out}
            self.at(self.rng.random() * 0.05, self.fail, rank, 1, BAD_STEP_KIND, f"BadStep: step {step}: the loss of rank {named} is nan")
        self.spring("refused")

    def spring(self, moment: str) -> None:
        if work := self.ambush.pop(moment, None):
            work()

    def _must_be_alone(self, attempt: int, does: str) -> None:
        """The one excuse: a whole gang that, like its coordinator, has no sight of storage. It can commit nothing, and cannot know."""
        for other in self.living:
            if other.attempt != attempt and not self._is_blind(min(attempt, other.attempt)):
                raise Violation(f"attempt {attempt} {does} while rank {other.rank} of attempt {other.attempt} lives on {other.host}")

    def _is_blind(self, attempt: int) -> bool:
        """All its ranks live, their agents were answered by some coordinator, and could not read the log themselves."""
        gang = self.gangs[attempt]
        agents = gang.agents.values()
        return all(rank.alive for rank in gang.ranks.values()) and all(
            self.now - self.blind_at.get(agent.host, -math.inf) < BLIND_S and self.now - agent.obeyed_at < BLIND_S for agent in agents
        )

    def _save(self, gang: Gang, step: int) -> None:
        directory = f"data/a{gang.record.attempt:06d}/s{step:09d}-{gang.record.nonce}"
        for rank, agent in gang.agents.items():
            agent.stage(gang.record.attempt, step, directory, rank)

    def _leave(self, ranks: list[Rank], phase: Phase) -> None:
        for rank in ranks:
            if rank.alive:
                rank.phase = phase
                self.at(self.rng.random() * 0.1, self.exit, rank, 0, "", "")

    def fail(self, rank: Rank, code: int, kind: str, why: str) -> None:
        """A rank fails by itself, or somebody kills it."""
        if rank.alive:
            self.gangs[rank.attempt].own_failures.add(rank.rank)
            self.exit(rank, code, kind, why)

    def exit(self, rank: Rank, code: int, kind: str, why: str) -> None:
        if not rank.alive:
            return
        rank.alive, rank.exit_code, rank.kind, rank.why = False, code, kind, why
        self.living.discard(rank)
        gang = self.gangs[rank.attempt]
        gang.agents[rank.rank].on_exit(rank)
        if code and not rank.stopped:
            self.at(self.rng.random() * 0.01, self._break_up, gang)

    def _break_up(self, gang: Gang) -> None:
        self._lose_peers(gang, [rank for rank in gang.ranks.values() if rank.alive])
