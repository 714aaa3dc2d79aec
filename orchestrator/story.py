"""What happened, as text that people read: one line per event, per request, per changed directive. Pure.

Golden stories (tests/scenarios) compare this text; the simulation prints it when it finds a fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import assert_never

from keepstep.trainer.contract import Phase, Request

from . import events as ev
from . import wire
from .machine import Run, describe, directive, step
from .phases import Phase as RunPhase
from .phases import name_of

_PHASES = frozenset(name_of(phase).lower() for phase in RunPhase.__args__)


@dataclass(slots=True)
class Story:
    """A run and the lines that its events led to."""

    run: Run
    _told: dict[str, str] = field(default_factory=dict)  # node -> its directive as last told

    def step(self, event: ev.Event) -> tuple[tuple[ev.Request, ...], list[str]]:
        """One event; the requests, and the lines about what changed."""
        self.run, requests = step(self.run, event)
        return requests, [*map(tell_request, requests), *self._tell_directives()]

    def _tell_directives(self) -> Iterator[str]:
        for node in sorted(self.run.members.nodes.keys() | self._told.keys()):
            line = tell_directive(directive(self.run, node))
            if self._told.get(node, "run nothing") != line:
                yield f"{node}: {line}"
            self._told[node] = line


def tell_state(run: Run) -> str:
    name, why = describe(run)
    return f"{name}: {why}"


# Events.


def tell_event(event: ev.Event) -> str:
    return f"{event.at:.2f} {_what(event)}"


def _what(event: ev.Event) -> str:
    match event:
        case ev.Opened():
            return _tell_opened(event)
        case ev.Tick():
            return "tick"
        case ev.Reported(report=report):
            return f"report {tell_report(report)}"
        case ev.Disconnected(node=node):
            return f"gone {node}"
        case ev.Died(node=node):
            return f"died {node}"
        case ev.Found(resume=resume, rolled_forward=rolled_forward):
            return f"found {_source(resume)}{' and rolled it forward' if rolled_forward else ''}"
        case ev.FoundAlone(nodes=nodes, ended=ended):
            return f"go on without us: {', '.join(sorted(nodes)) or 'none'}; no more: {', '.join(sorted(ended)) or 'none'}"
        case ev.Logged(record=record):
            return f"logged {_tell_record(record)}"
        case ev.LogFailed(request=request, why=why):
            return f"refused {type(request).__name__}: {why}"
        case ev.AttemptVoid(attempt=attempt, why=why):
            return f"attempt {attempt} is void: {why}"
        case ev.RewindVoid(why=why):
            return f"the rewind is void: {why}"
        case ev.Reconfigured():
            return "other overrides"
        case ev.LogRead(began=began):
            return f"read the log at {began:.2f}"
        case ev.Committed(attempt=attempt, step=at_step):
            return f"committed step {at_step} of attempt {attempt}"
        case ev.CommitFailed(attempt=attempt, step=at_step, why=why, damaged=damaged):
            return f"{'cannot ever' if damaged else 'could not'} commit step {at_step} of attempt {attempt}: {why}"
        case ev.Damaged(directory=directory, why=why):
            return f"{directory} is damaged: {why}"
        case ev.Fenced(term=term, by=by):
            return f"fenced by term {term} ({by})"
        case ev.StopAsked(why=why):
            return f"stop: {why}"
        case ev.SaveAsked():
            return "save"
        case ev.DrainAsked(node=node, why=why):
            return f"drain {node}: {why}"
        case ev.ReadmitAsked(node=node):
            return f"readmit {node}"
        case ev.ResizeAsked(nodes=nodes):
            return f"resize to {nodes} nodes"
        case ev.RewindAsked(to=to):
            return f"rewind to step {to}"
        case _:
            assert_never(event)


def _tell_opened(event: ev.Opened) -> str:
    if not event.last_attempt:
        return f"opened term {event.term}"
    end = "ended" if event.ended else ("rewound" if event.rewound else "no end")
    return f"opened term {event.term}: attempt {event.last_attempt} on {', '.join(event.last_gang)} ({end})"


def _tell_record(record: ev.Record) -> str:
    match record:
        case ev.AttemptRecord():
            return f"attempt {record.attempt}"
        case ev.QuarantineRecord(directory=directory):
            return f"quarantine of {directory}"
        case ev.RewindRecord(resume=resume):
            return f"rewind to {_source(resume)}"
        case ev.EndRecord(outcome=outcome):
            return f"the end: {outcome}"
        case _:
            assert_never(record)


def tell_report(report: wire.AgentReport) -> str:
    """ "node0#a #7 obeys 1/4, attempt 1: 0 STEP@41, 1 SIGKILL@41; persisted 40/0 40/1"."""
    told = [f"{report.node} #{report.sequence} obeys {report.term}/{report.obeyed}"]
    if not report.ready:
        told.append("not ready")
    if report.ranks:
        told.append(f"attempt {report.attempt}: " + " ".join(_tell_rank(rank) for rank in report.ranks))
    if report.standby:
        told.append(f"standby {report.standby.term}/{report.standby.number} {report.standby.state}")
    if report.persisted:
        told.append("persisted " + " ".join(f"{part.step}/{part.rank}" for part in report.persisted))
    told += [f"{name} {value}" for name in ("leaving", "problem", "storage") if (value := getattr(report, name))]
    if report.buried:
        told.append(f"buried {', '.join(report.buried)}")
    return ", ".join(told)


def _tell_rank(rank: wire.RankReport) -> str:
    if rank.state == "running":
        state = Phase(rank.phase).name
    elif rank.stopped_by_agent:
        state = "stopped"
    else:
        state = f"exited({rank.why or rank.exit_code})"
    return f"{rank.rank}:{state}@{rank.step}"


# Requests and directives.


def tell_request(request: ev.Request) -> str:
    match request:
        case ev.Say(kind=kind, why=why):
            return f"{kind.upper()}: {why}" if kind in _PHASES else f"say {kind}: {why}"
        case ev.FindCheckpoint():
            return "ask FindCheckpoint"
        case ev.FindAlone():
            return f"ask FindAlone among {', '.join(node for node, _ in request.suspects)}"
        case ev.LogAttempt():
            unconfirmed = f", unconfirmed {', '.join(request.unconfirmed)}" if request.unconfirmed else ""
            gang = ", ".join(request.gang)
            source = f"{_source(request.resume)}{_changes(request.skips, request.overrides)}"
            return f"ask LogAttempt {request.attempt}: {request.world_size} ranks on {gang} from {source}{unconfirmed}"
        case ev.Commit():
            return f"ask Commit step {request.step} of attempt {request.attempt} ({len(request.indexes)} parts)"
        case ev.LogQuarantine(directory=directory):
            return f"ask LogQuarantine {directory}"
        case ev.LogRewind(to=to):
            return f"ask LogRewind to step {to}{_changes(request.skips, request.overrides)}"
        case ev.LogEnd():
            requeue = ", requeue" if request.requeue else ""
            return f"ask LogEnd {request.outcome} at step {request.step}{requeue}"
        case _:
            assert_never(request)


def tell_directive(found: wire.Directive) -> str:
    """Without what changes all the time: revision and reason."""
    if found.over:
        return "the run is over"
    if found.forget:
        return "start anew"
    beside = f"; beside it {_tell_standby(found.standby)}" if found.standby else ""
    if found.launch is None:
        return (f"run nothing, after an autopsy of attempt {found.autopsy}" if found.autopsy else "run nothing") + beside
    return _tell_launch(found.launch) + beside


def _tell_launch(launch: wire.Launch) -> str:
    last = launch.first_rank + launch.num_ranks - 1
    store = f"in standby {launch.standby}" if launch.standby else _tell_store(launch)
    source = (f"step {launch.resume.step}" if launch.resume else "scratch") + _changes(launch.skips, launch.overrides)
    request = f", {Request(launch.request).name}: {launch.request_why}" if launch.request else ""
    return f"run attempt {launch.attempt}, ranks {launch.first_rank}-{last} of {launch.world_size}, from {source}, {store}{request}"


def _tell_standby(standby: wire.Standby) -> str:
    last = standby.first_rank + standby.num_ranks - 1
    return f"standby {standby.number}, ranks {standby.first_rank}-{last} of {standby.world_size}, {_tell_store(standby)}"


def _tell_store(group: wire.Launch | wire.Standby) -> str:
    return f"store {group.store.host}:{group.store.port}" if group.store else f"store of {group.store_node} awaited"


def _changes(skips: tuple[str, ...], overrides: tuple[str, ...]) -> str:
    left_out = f" without {', '.join(skips)}" if skips else ""
    return left_out + (f" with {', '.join(overrides)}" if overrides else "")


def _source(resume: ev.Checkpoint | None) -> str:
    return f"step {resume.step}" if resume else "scratch"
