"""The hot standby: a second group of ranks, formed beside those that train, that waits with its memory for the next attempt. Pure.

It is ordered once all ranks of an attempt have stepped, for the same nodes, seats, world size and overrides; the next attempt is launched
into it where all of these are the same and every node said last that its part is ready. Otherwise its agents end it and launch as always.
It holds nothing of the training and makes no step before that launch, so attempts are logged, fenced and known dead as without it. One that
fails is told once and tried again for the next attempt only; a successor of the coordinator orders anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from . import membership, phases
from .events import Event, Reported
from .run import Group, Run, Standby, concerned, names, say, start
from .wire import AgentReport


def advance_standby(run: Run, event: Event) -> Run:
    """After the phase's own rules, at every event: orders one, notes how far it is, gives it up."""
    if not run.policy.hot_standby:
        return run
    if isinstance(run.phase, phases.Training) and run.standby_of != run.phase.attempt.number:
        return _order(run, run.phase)
    if run.standby is None:
        return run
    if isinstance(event, Reported):
        return _note(run, run.standby, event.report)
    why = next(filter(None, (_why_useless(run, node) for node in concerned(event, run.standby.group.seats))), "")
    return _give_up(run, run.standby, why) if why or isinstance(run.phase, (phases.Ending, *phases.TERMINAL)) else run


def launch(run: Run, attempt: phases.Attempt) -> Run:
    """Starts the attempt, in the standby if there is one that fits. Afterwards there is none: it was used, or its memory is wanted."""
    standby = run.standby
    why = _why_unfit(run, standby, attempt) if standby else ""
    if standby and why:
        run = _give_up(run, standby, f"it does not fit attempt {attempt.number}: {why}")
    elif standby:
        attempt = replace(attempt, standby=standby.group.number)
    return start(replace(run, standby=None), attempt)


def _order(run: Run, phase: phases.Training) -> Run:
    """Once per attempt."""
    attempt = phase.attempt
    run = replace(run, standby_of=attempt.number)
    why = next(filter(None, (_why_not(run, node) for node in attempt.seats)), "")
    if phase.departure is not None or phase.finished or run.stop:
        return run
    if why:
        return say(run, "no-standby", f"attempt {attempt.number} has no standby: {why}")
    record, number = attempt.record, run.standbys + 1
    group = Group(number=number, seats=attempt.seats, world_size=record.world_size, overrides=record.overrides)
    run = replace(run, standby=Standby(group=group), standbys=number, revision=run.revision + 1)
    return say(run, "standby-ordered", f"standby {number} is to form: {record.world_size} ranks on {names(attempt.seats)}")


def _why_not(run: Run, node: str) -> str:
    if why := _why_useless(run, node):
        return why
    report = run.members.report_of(node)
    if report is None or not all(rank.stands_by for rank in report.ranks):
        return f"the script on {node} never called standby() of what attach() gave it"
    return ""


def _why_useless(run: Run, node: str) -> str:
    """Why there will be no attempt with this node, whatever happens."""
    if why := membership.why_going(run.members, node):
        return f"{node} goes: {why}"
    if why := membership.absence(run.members, run.policy, node, run.now, run.opened_at):
        return f"lost {node}: {why}"
    return ""


def _note(run: Run, standby: Standby, report: AgentReport) -> Run:
    """What a node says of its part."""
    group, told = standby.group, report.standby
    if report.node not in group.seats:
        return run
    is_ours = told is not None and (told.term, told.number) == (run.term, group.number)
    if is_ours and told is not None and told.state == "failed":
        return _give_up(run, standby, f"{report.node}: {told.why}")
    is_ready = is_ours and told is not None and told.state == "ready"
    if is_ready == (report.node in standby.ready):
        return run
    ready = standby.ready.set(report.node, None) if is_ready else standby.ready.delete(report.node)
    run = replace(run, standby=replace(standby, ready=ready))
    if len(ready) < len(group.seats):
        return run
    return say(run, "standby-ready", f"standby {group.number} is ready: the next attempt can begin in it at once")


def _give_up(run: Run, standby: Standby, why: str) -> Run:
    run = replace(run, standby=None, revision=run.revision + 1)
    return say(run, "standby-lost", f"standby {standby.group.number} is given up: {why}") if why else run


def _why_unfit(run: Run, standby: Standby, attempt: phases.Attempt) -> str:
    """Why the attempt cannot be launched into it; "" if it can."""
    group, record = standby.group, attempt.record
    if tuple(group.seats.items()) != tuple(attempt.seats.items()):
        return f"it has the seats of {_seated(group.seats)}, not of {_seated(attempt.seats)}"
    if group.world_size != record.world_size:
        return f"it has {group.world_size} ranks, not {record.world_size}"
    if group.overrides != record.overrides:
        return "other overrides are in force"
    late = [node for node in group.seats if node not in standby.ready]
    return f"it is not ready on {names(late)}" if late else ""


def _seated(seats: Mapping[str, phases.Seat]) -> str:
    return names(f"{node} ({seat.num_ranks})" for node, seat in seats.items())
