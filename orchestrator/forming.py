"""From no attempt to one that may be launched: WAITING, CHOOSING, FENCING. Pure."""

from __future__ import annotations

from dataclasses import replace

from . import asking, membership, pacing, phases, saves
from .events import (
    AttemptRecord,
    Checkpoint,
    Commit,
    DrainAsked,
    Event,
    FindAlone,
    FindCheckpoint,
    Found,
    FoundAlone,
    LogAttempt,
    LogQuarantine,
    LogRewind,
    Reported,
)
from .rewinds import ask_rewind
from .run import Run, ask, drop_asks, end, enter, names, progress_sentence, say, stop_now, wait
from .standby import launch
from .standing import standing

_MANY = 64  # nodes

# WAITING


def advance_waiting(run: Run, phase: phases.Waiting, event: Event) -> Run:
    if asking.pending(run.asks, Commit) or asking.pending(run.asks, LogRewind):
        return run
    if run.rewind:
        return ask_rewind(run)
    if run.stop:
        return stop_now(run)
    if not isinstance(event, Reported) and (why := _why_give_up(run)):
        return end(run, "stopped", f"{why}; {progress_sentence(run)}", requeue=True)
    if run.now < phase.not_before or _is_old_news(run, phase, event):
        return run
    ready = membership.candidates(run.members, run.policy, run.now)
    run = _note_shortage(run, len(ready))
    size = _gang_size(run, len(ready))
    if not size:
        return _explain_waiting(run, phase, ready)
    return enter(run, phases.Choosing(since=run.now, why=f"enough nodes are ready: {_names(ready)}"))


def _is_old_news(run: Run, phase: phases.Waiting, event: Event) -> bool:
    """A report that changes nobody's fitness needs no look at all the others; where there are many of them, ticks look."""
    if not isinstance(event, Reported) or event.report.node not in run.members.nodes:
        return False
    if len(run.members.nodes) > _MANY and run.now > phase.since:
        return True
    fit = not membership.why_unfit(run.members, run.policy, event.report.node, run.now)
    return fit == (event.report.node in phase.ready)


def _why_give_up(run: Run) -> str:
    """The machines are being taken away, and those that stay are too few: whoever queues the run again gives it new ones."""
    policy, noticed = run.policy, membership.noticed(run.members)
    if policy.waits_when_preempted or not noticed:
        return ""
    staying = membership.staying(run.members, policy, run.now, run.opened_at)
    if len(staying) >= policy.min_nodes:
        return ""
    reasons = "; ".join(f"{node} leaves ({report.leaving})" for node in noticed if (report := run.members.report_of(node)))
    return f"{reasons}: {len(staying)} nodes stay, {policy.min_nodes} are needed"


def _note_shortage(run: Run, num_ready: int) -> Run:
    if num_ready >= run.policy.nodes:
        return run if run.short_since is None else replace(run, short_since=None)
    return run if run.short_since is not None else replace(run, short_since=run.now)


def _gang_size(run: Run, num_ready: int) -> int:
    """How many nodes an attempt would have now; 0 while it pays to wait for more."""
    policy = run.policy
    if num_ready >= policy.nodes:
        return policy.nodes
    patient = run.short_since is None or run.now - run.short_since < policy.wait_for_nodes_s
    return 0 if patient or num_ready < policy.min_nodes else num_ready


def _explain_waiting(run: Run, phase: phases.Waiting, ready: frozenset[str]) -> Run:
    policy = run.policy
    why = f"{len(ready)} of {policy.nodes} nodes are ready ({_names(ready) or 'none'})"
    if policy.min_nodes < policy.nodes:
        why += f"; {policy.min_nodes} or more are enough after {policy.wait_for_nodes_s:g} s"
    if why == phase.why and ready == phase.ready:
        return run
    return say(replace(run, phase=replace(phase, why=why, ready=ready)), "waiting", why)


def _names(nodes: frozenset[str]) -> str:
    return names(sorted(nodes))


# CHOOSING


def advance_choosing(run: Run, phase: phases.Choosing) -> Run:
    """Nothing but the log's answer leads on once the attempt is asked for: it may be in the log already."""
    if phase.wanted is not None:
        return run
    if run.rewind:
        return wait(drop_asks(run, FindCheckpoint), f"another checkpoint is to be chosen: {run.rewind.why}")
    if run.stop:
        return stop_now(drop_asks(run, FindCheckpoint))
    busy = asking.pending(run.asks, FindCheckpoint) or asking.pending(run.asks, LogQuarantine)
    return run if busy else ask(run, FindCheckpoint())


def take_found(run: Run, phase: phases.Choosing, found: Found) -> Run:
    """The log's answer to "from where?"."""
    resume = found.resume
    if phase.wanted is not None or not asking.pending(run.asks, FindCheckpoint):
        return run  # said twice
    run = replace(run, saves=saves.quarantine(run.saves, *found.quarantined))
    if why := saves.objection(run.saves, resume):
        return replace(run, asks=asking.refused(run.asks, FindCheckpoint(), why, run.policy, run.now))
    run = drop_asks(run, FindCheckpoint)
    if resume and found.rolled_forward:
        why = f"step {resume.step} was whole in storage, only its commit record was missing; it is committed now ({resume.directory})"
        run = say(run, "rolled-forward", why, step=resume.step)
    if resume is None and run.saves.ever_committed:
        why = "every committed checkpoint is quarantined; a run never starts from scratch silently: restore one, or use a new root"
        return end(run, "failed", why, requeue=False)
    return _ask_for_attempt(run, phase, resume)


def _ask_for_attempt(run: Run, phase: phases.Choosing, resume: Checkpoint | None) -> Run:
    ready = membership.candidates(run.members, run.policy, run.now)
    size = _gang_size(_note_shortage(run, len(ready)), len(ready))
    if not size:
        return wait(_note_shortage(run, len(ready)), f"only {len(ready)} of {run.policy.nodes} nodes are still ready")
    gang = membership.seat(run.members, run.policy, ready, size, run.now)
    wanted = LogAttempt(
        attempt=max(run.attempt, run.taken) + 1,
        gang=gang,
        world_size=sum(_num_ranks(run, node) for node in gang),
        resume=resume,
        unconfirmed=tuple(sorted(run.members.suspects)),
        standing=standing(run),
        skips=run.skips,
        overrides=run.overrides,
    )
    source = f"step {resume.step}" if resume else "scratch"
    why = f"attempt {wanted.attempt} is to run on {names(gang)} from {source}"
    return ask(replace(run, phase=replace(phase, why=why, wanted=wanted)), wanted)


def _num_ranks(run: Run, node: str) -> int:
    return membership.num_ranks(run.members.nodes[node].report, run.policy)


def take_logged_attempt(run: Run, phase: phases.Choosing, record: AttemptRecord) -> Run:
    """The attempt is in the log: every older one is fenced, every older save is void."""
    if phase.wanted is None or record.attempt != phase.wanted.attempt:
        return run
    run = replace(
        drop_asks(run, LogAttempt),
        attempt=record.attempt,
        reached=record.resume.step if record.resume else 0,
        saves=saves.begin_attempt(run.saves, record.attempt, record.resume),
        members=replace(
            membership.fence(run.members, run.now),
            seats=tuple(membership.host_of(node) for node in record.gang),
        ),
    )
    attempt = phases.Attempt(record=record, seats=seats(run, record))
    run = enter(run, phases.Fencing(since=run.now, why=_fencing_sentence(run, record), attempt=attempt))
    return pacing.begun(run, record)


def take_void_attempt(run: Run, phase: phases.Choosing, attempt: int, why: str) -> Run:
    """The log would not count it: another checkpoint must be found."""
    if phase.wanted is None or phase.wanted.attempt != attempt:
        return run
    run = say(drop_asks(run, LogAttempt), "choosing-again", f"attempt {attempt} would be void: {why}")
    resume = phase.wanted.resume
    run = replace(run, saves=saves.quarantine(run.saves, resume.directory)) if resume else run
    return replace(run, phase=replace(phase, wanted=None))


def seats(run: Run, record: AttemptRecord) -> dict[str, phases.Seat]:
    """Who has which ranks: in seat order, each node as many as it has slots."""
    taken: dict[str, phases.Seat] = {}
    first = 0
    for place, node in enumerate(record.gang):
        report = run.members.report_of(node)
        count = membership.num_ranks(report, run.policy) if report else run.policy.ranks_per_node
        if report and report.attempt == record.attempt and report.ranks:
            count = len(report.ranks)
        taken[node] = phases.Seat(group_rank=place, first_rank=first, num_ranks=count)
        first += count
    return taken


# FENCING


def _fencing_sentence(run: Run, record: AttemptRecord) -> str:
    if not run.members.suspects:
        return f"attempt {record.attempt} is logged"
    return f"attempt {record.attempt} is logged and fences the older ones; {names(sorted(run.members.suspects))} may still run one"


def advance_fencing(run: Run, phase: phases.Fencing, event: Event) -> Run:
    if run.rewind:
        return wait(run, f"attempt {run.attempt} was not launched: {run.rewind.why}")
    if run.stop:
        return stop_now(run)
    if why := _why_not_launch(run, phase, event):
        return wait(run, f"attempt {run.attempt} was not launched: {why}")
    run = _ask_who_goes_alone(run)
    outlasted = membership.outlasted(run.members, run.policy, run.now)
    for node in sorted(outlasted):
        run = say(run, "fenced-off", f"{node} has outlasted its lease: no rank of an older attempt lives on it", node=node)
    if outlasted:
        run = replace(run, members=membership.clear(run.members, outlasted))
    return run if run.members.suspects else launch(run, phase.attempt)


def _ask_who_goes_alone(run: Run) -> Run:
    suspects = membership.unasked(run.members, run.now)
    if not suspects or asking.pending(run.asks, FindAlone):
        return run
    return ask(run, FindAlone(fence=run.attempt, suspects=suspects))


def take_found_alone(run: Run, found: FoundAlone) -> Run:
    run = replace(run, asks=asking.without(run.asks, lambda request: request == found.request))
    members = membership.note_alone(run.members, found.request.suspects, found.nodes, run.now)
    ended = [node for node, attempt in found.request.suspects if node in found.ended and _may_run(members, node, attempt)]
    return replace(run, members=membership.clear(members, ended))


def _may_run(members: membership.Members, node: str, attempt: int) -> bool:
    suspect = members.suspects.get(node)
    return suspect is not None and suspect.attempt == attempt


def _why_not_launch(run: Run, phase: phases.Fencing, event: Event) -> str:
    """A node of the gang that went away before it was told anything costs nothing but a number."""
    if isinstance(event, Reported) and event.report.node not in phase.attempt.seats and not event.report.buried:
        return ""
    for node in phase.attempt.seats:
        if why := membership.absence(run.members, run.policy, node, run.now, run.opened_at):
            return f"lost {node}: {why}"
        if isinstance(event, (Reported, DrainAsked)) and (why := membership.why_going(run.members, node)):
            return f"{node} goes: {why}"
    return ""
