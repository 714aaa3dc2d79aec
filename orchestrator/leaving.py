"""Leaving at a step boundary: for people who want the run to stop, and for nodes that must go, or may come. Pure.

One order for all ranks: save after the step that you are in, and leave. Nothing is lost, and no failure is counted. Where a node's notice
leaves no time for that, the ranks are stopped at once: what is committed counts, and a checkpoint that cannot be finished only costs time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce

from . import membership, phases
from .events import Committed, Event
from .run import Run, concerned, drain, progress_sentence, say
from .verdict import Evidence


def depart(run: Run, phase: phases.Starting | phases.Training, event: Event) -> Run:
    """Asks the ranks to save and leave where somebody wants that; past the deadline they are stopped."""
    known, attempt = phase.departure, phase.attempt
    departure = _merged(known, _wanted(run, phase, event))
    if departure is None:
        return run
    if known is None and (why := _too_late(run, attempt, departure)):
        return drain(run, attempt.record, moved(run, why), attempt.seats)
    if departure is not known:
        run = _order(run, phase, departure)
    if run.policy.needs_final_commit and run.now <= departure.until:
        return run
    return drain(run, attempt.record, moved(run, departure.why), attempt.seats)


def moved(run: Run, why: str) -> Evidence:
    """The end of an attempt that is nobody's fault."""
    return Evidence(kind="move", why=why, step=run.reached, seen_at=run.now)


def _order(run: Run, phase: phases.Starting | phases.Training, departure: phases.Departure) -> Run:
    known = phase.departure
    run = replace(run, phase=replace(phase, departure=departure))
    if known is not None and known.aim == departure.aim:
        return run  # only the time became shorter
    run = replace(run, revision=run.revision + 1)
    return say(run, "departure", f"asked all ranks to save and leave: {departure.why}")


def _merged(known: phases.Departure | None, wanted: Iterator[phases.Departure]) -> phases.Departure | None:
    """To end the run outranks to move it; the shortest time counts."""

    def merge(one: phases.Departure | None, other: phases.Departure) -> phases.Departure:
        if one is None:
            return other
        first = other if (one.aim, other.aim) == ("move", "stop") else one
        return replace(first, until=other.until) if other.until < first.until else first

    return reduce(merge, wanted, known)


def _wanted(run: Run, phase: phases.Starting | phases.Training, event: Event) -> Iterator[phases.Departure]:
    known, gang = phase.departure, phase.attempt.seats
    patient = run.now + run.policy.stop_grace_s
    if run.stop and (known is None or known.aim == "move"):
        yield phases.Departure(aim="stop", why=run.stop, until=patient)
    for node in concerned(event, gang):
        if why := membership.why_going(run.members, node):
            left_s = membership.leaves_in_s(run.members, node, run.now)
            yield phases.Departure(aim="move", why=f"{node}: {why}", until=patient if left_s is None else run.now + left_s)
    if known is None and (why := _why_resize(run, len(gang), event)):
        yield phases.Departure(aim="move", why=why, until=patient)


def _why_resize(run: Run, num_nodes: int, event: Event) -> str:
    """A gang that is too large shrinks at the next step, one that is too small grows at a commit. A user's script keeps checkpoints of
    its own, so it grows only when something else ends the attempt."""
    policy = run.policy
    if num_nodes > policy.nodes:
        return f"shrinking from {num_nodes} to {policy.nodes} nodes"
    if num_nodes == policy.nodes or not policy.needs_final_commit or not isinstance(event, Committed):
        return ""
    possible = min(len(membership.sound(run.members, policy, run.now)), policy.nodes)
    if possible == policy.nodes or (possible > num_nodes and run.now - run.phase.since >= policy.wait_for_nodes_s):
        return f"growing from {num_nodes} to {possible} nodes"
    return ""


def _too_late(run: Run, attempt: phases.Attempt, departure: phases.Departure) -> str:
    """Why a notice leaves no time for a checkpoint; "" if it does, or if nobody knows yet how long one takes."""
    reports = [report for node in attempt.seats if (report := run.members.report_of(node))]
    if not run.policy.needs_final_commit or all(report.leaves_in_s is None for report in reports):
        return ""
    step_s = max((rank.step_s for report in reports for rank in report.ranks), default=0.0)
    save_s = max((report.save_s for report in reports), default=0.0)
    left_s = departure.until - run.now
    if left_s >= 2 * step_s + save_s:
        return ""
    need = f"a step ({step_s:.1f} s) and a save ({save_s:.1f} s) do not fit into the {max(0.0, left_s):.1f} s that are left"
    return f"{departure.why}; {need}, so nothing is saved ({progress_sentence(run)})"
