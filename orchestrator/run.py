"""The machine's state, and the moves that change its phase. Pure.

Every function takes a run and gives the next one; what is to be asked of the shell collects in `Run.out`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from immutables import Map

from . import asking, hangs, membership, phases, saves
from .events import Asking, AttemptRecord, Died, Disconnected, Event, LogEnd, LogRewind, Outcome, Reported, Request, Say
from .interval import Pace
from .policy import Policy
from .verdict import Evidence
from .wire import AgentReport

MAX_NAMES: Final = 16  # of nodes, in a sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A verdict that was reached in this term."""

    attempt: int
    culprit: Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Degraded:
    """Storage does not take what it should; nothing is lost yet, but a failure would cost more than usual."""

    why: str
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Who forms a standby, see standby.py."""

    number: int  # unique within the term
    seats: Mapping[str, phases.Seat]  # in seat order
    world_size: int
    overrides: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standby:
    """One that is wanted."""

    group: Group
    ready: phases.Nodes = field(default_factory=Map)  # nodes whose part waits for its launch, as they said last


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything that a term knows. Who reads it may read all of it; only `machine.step` makes new ones."""

    policy: Policy
    phase: phases.Phase
    now: float = 0.0
    term: int = 0
    opened_at: float = 0.0
    read_at: float | None = None  # when the newest successful read of the log's end began
    revision: int = 0  # counts decisions; directives carry it

    attempt: int = 0  # number of the newest attempt in the log
    taken: int = 0  # attempt numbers up to here may have been used, whether or not the log still shows it
    reached: int = 0  # newest step that any of its ranks finished
    members: membership.Members = field(default_factory=membership.Members)
    saves: saves.Saves = field(default_factory=saves.Saves)
    asks: asking.Asks = ()

    failures: int = 0  # in a row, without a commit between them
    failed: tuple[Failure, ...] = ()
    last_error: tuple[str, str, int] | None = None  # Evidence.sameness of the last failure
    resized: tuple[int, int] | None = None  # nodes of a full gang by the config, and by people's later order
    skips: tuple[str, ...] = ()  # positions that attempts leave out, as the log says
    overrides: tuple[str, ...] = ()  # on top of run.toml, as the log says
    rewinds: int = 0  # bad steps that the run was rewound past, in all terms
    rewind: LogRewind | None = None  # wanted; asked for when nothing runs
    stop: str = ""  # why people want the run to end
    save_above: int | None = None  # people want a checkpoint newer than this step
    short_since: float | None = None  # since when a full gang has been impossible
    degraded: Degraded | None = None
    committed_at: float | None = None  # when the newest commit of this term was heard of
    pace: Pace = field(default_factory=Pace)  # how often attempts save
    standby: Standby | None = None
    standby_of: int = 0  # the newest attempt for which one was ordered, or was not to be had
    standbys: int = 0  # ordered so far in this term

    out: tuple[Request, ...] = ()  # requests of the newest event


# Requests.


def emit(run: Run, *requests: Request) -> Run:
    return replace(run, out=(*run.out, *requests))


def say(run: Run, kind: str, why: str, *, node: str = "", step: int = -1) -> Run:
    return emit(run, Say(kind=kind, why=why, attempt=run.attempt, node=node, step=step))


def say_verdict(run: Run, kind: str, culprit: Evidence) -> Run:
    verdict = Say(
        kind=kind,
        why=culprit.why,
        attempt=run.attempt,
        node=culprit.node,
        rank=culprit.rank,
        step=culprit.step,
        cause=culprit.kind,
        detail=culprit.tail,
    )
    return emit(run, verdict)


def ask(run: Run, request: Asking) -> Run:
    """Asks once; from here on it is repeated until it is answered."""
    return emit(replace(run, asks=asking.add(run.asks, request, run.policy, run.now)), request)


def drop_asks(run: Run, kind: type[Asking]) -> Run:
    return replace(run, asks=asking.without(run.asks, lambda request: isinstance(request, kind)))


# Moves.


def enter(run: Run, phase: phases.Phase) -> Run:
    assert (type(run.phase), type(phase)) in phases.TRANSITIONS, f"{phases.name_of(run.phase)} -> {phases.name_of(phase)}"
    return say(replace(run, phase=phase, revision=run.revision + 1), phases.name_of(phase).lower(), phase.why)


def wait(run: Run, why: str, pause_s: float = 0.0) -> Run:
    return enter(run, phases.Waiting(since=run.now, why=why, not_before=run.now + pause_s))


def start(run: Run, attempt: phases.Attempt) -> Run:
    """Launches the attempt. No rank of an older one may be alive."""
    assert not run.members.suspects
    into = f", in standby {attempt.standby}" if attempt.standby else ""
    return enter(run, phases.Starting(since=run.now, why=launch_sentence(attempt.record) + into, attempt=attempt))


def drain(run: Run, record: AttemptRecord, culprit: Evidence, seats: Mapping[str, phases.Seat]) -> Run:
    """Ends the attempt: from here on its nodes are told to run nothing, and are suspects until they prove that they do not."""
    stood = hangs.stood_still(heard(run, record), run.now) if culprit.kind == "stall" else ()
    run = enter(run, phases.Draining(since=run.now, why=culprit.why, record=record, culprit=culprit, seats=seats, stood=stood))
    found = {node: _suspect(run, node, record.attempt) for node in record.gang}
    unclean = {node: suspect for node, suspect in found.items() if not is_clean(run, node, suspect)}
    return replace(run, members=membership.suspect(run.members, unclean))


def concerned(event: Event, nodes: Collection[str]) -> Collection[str]:
    """Those of the nodes that an event can have changed: one, or all of them where time went by or the log answered."""
    match event:
        case Reported(report=report):
            return (report.node,) if report.node in nodes else ()
        case Disconnected(node=node) | Died(node=node):
            return (node,) if node in nodes else ()
        case _:
            return nodes


def heard(run: Run, record: AttemptRecord) -> tuple[tuple[AgentReport, float], ...]:
    """What the nodes of a gang last said about its attempt, and when."""
    nodes = (run.members.nodes[node] for node in record.gang if node in run.members.nodes)
    return tuple((node.report, node.heard_at) for node in nodes if node.report.attempt == record.attempt)


def _suspect(run: Run, node: str, attempt: int) -> membership.Suspect:
    report = run.members.report_of(node)
    listens = report is not None and report.term == run.term
    return membership.Suspect(attempt=attempt, since=run.now, revision=run.revision, listens=listens)


def is_clean(run: Run, node: str, suspect: membership.Suspect) -> bool:
    report = run.members.report_of(node)
    return report is not None and membership.says_clean(report, suspect, run.policy, term=run.term, now=run.now)


def end(run: Run, outcome: Outcome, why: str, *, requeue: bool) -> Run:
    """Decides the outcome; it stands when it is in the log."""
    request = LogEnd(outcome=outcome, step=max(run.saves.committed_step, 0), why=why, requeue=requeue)
    return ask(enter(run, phases.Ending(since=run.now, why=why, end=request)), request)


def stop_now(run: Run) -> Run:
    return end(run, "stopped", f"{run.stop} ({progress_sentence(run)})", requeue=True)


# Sentences.


def names(nodes: Iterable[str]) -> str:
    """For people: the first of them, and how many more."""
    listed = list(nodes)
    more = len(listed) - MAX_NAMES
    return ", ".join(listed[:MAX_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def launch_sentence(record: AttemptRecord) -> str:
    source = f"step {record.resume.step} ({record.resume.directory})" if record.resume else "scratch"
    return f"attempt {record.attempt}: {record.world_size} ranks on {names(record.gang)}, from {source}"


def progress_sentence(run: Run) -> str:
    newest = run.saves.newest
    return f"step {newest.step} of {run.policy.steps} is committed" if newest else "nothing is committed"
