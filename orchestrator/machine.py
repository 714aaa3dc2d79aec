"""The machine: `step(run, event) -> (run, requests)` and `directive(run, node)`. Pure: no I/O, clock, thread or randomness.

One event at a time: it is taken in (what do we know now?), then the phase's rule looks at what we know and moves on as far as it can.
The rules live with their phases: forming.py, running.py, draining.py. Every move is one of `phases.TRANSITIONS`.
"""

from __future__ import annotations

import dataclasses
from typing import assert_never

from . import asking, membership, phases, saves
from .changing import replace
from .degraded import note_storage
from .directives import directive, may_answer
from .draining import advance_draining
from .events import (
    AttemptRecord,
    AttemptVoid,
    Checkpoint,
    Commit,
    CommitFailed,
    Committed,
    Damaged,
    Died,
    Disconnected,
    DrainAsked,
    EndRecord,
    Event,
    Fenced,
    FindCheckpoint,
    Found,
    FoundAlone,
    LogEnd,
    LogFailed,
    Logged,
    LogQuarantine,
    LogRead,
    Opened,
    QuarantineRecord,
    ReadmitAsked,
    Reconfigured,
    Record,
    Reported,
    Request,
    ResizeAsked,
    RewindAsked,
    RewindRecord,
    RewindVoid,
    SaveAsked,
    StopAsked,
    Tick,
)
from .forming import (
    advance_choosing,
    advance_fencing,
    advance_waiting,
    take_found,
    take_found_alone,
    take_logged_attempt,
    take_void_attempt,
)
from .leaving import moved
from .policy import Policy
from .rewinds import take_logged_rewind, take_rewind_asked, take_void_rewind
from .run import Run, ask, drain, drop_asks, emit, enter, is_clean, names, say, wait
from .running import advance_adopting, advance_running
from .standby import advance_standby
from .standing import resize, restored
from .wire import AgentReport

__all__ = ["Run", "begin", "describe", "directive", "may_answer", "step"]


def begin(policy: Policy) -> Run:
    """A coordinator before its term: the first event is Opened."""
    return Run(policy=policy, phase=phases.Opening(since=0.0, why="opening the run log"))


def step(run: Run, event: Event) -> tuple[Run, tuple[Request, ...]]:
    """The next state, and what the shell is asked to do. After the end, and after a newer coordinator's term, nothing happens any more."""
    if isinstance(run.phase, phases.TERMINAL):
        return run, ()
    run = replace(_excuse(run, event), now=max(run.now, event.at), out=())
    if isinstance(event, Reported) and _is_overtaken(run, event.report):
        return run, ()
    run = advance_standby(_advance(_take(run, event), event), event)
    return run, run.out


def _is_overtaken(run: Run, report: AgentReport) -> bool:
    """A newer report of this incarnation is known, or its death is."""
    known = run.members.nodes.get(report.node)
    return report.node in run.members.buried or (known is not None and report.sequence <= known.report.sequence)


def _excuse(run: Run, event: Event) -> Run:
    """Ticks come several times a second. Where none came for long, it was we who could not hear: nobody's silence counts for that time."""
    deaf_s = event.at - run.now
    if deaf_s <= run.policy.lease_s / 2 or isinstance(run.phase, phases.Opening):
        return run
    return replace(run, members=membership.excuse(run.members, deaf_s), opened_at=run.opened_at + deaf_s)


def describe(run: Run) -> tuple[str, str]:
    """The phase's name and the reason for it, e.g. ("WAITING", "1 of 2 nodes are ready (node0#1f2e)")."""
    return phases.name_of(run.phase), run.phase.why


# What do we know now?


def _take(run: Run, event: Event) -> Run:
    match event:
        case Opened():
            return _take_opened(run, event)
        case Tick():
            return _take_tick(run)
        case Reported(report=report):
            return _take_report(run, report)
        case Disconnected(node=node):
            return replace(run, members=membership.lose_connection(run.members, node, run.now))
        case Died(node=node):
            return replace(run, members=membership.prove_dead(run.members, node))
        case Found():
            return take_found(run, run.phase, event) if isinstance(run.phase, phases.Choosing) else drop_asks(run, FindCheckpoint)
        case FoundAlone():
            return take_found_alone(run, event)
        case Logged(record=record):
            return _take_record(run, record)
        case LogFailed(request=request, why=why):
            return _take_refusal(run, request, why)
        case AttemptVoid(attempt=attempt, why=why):
            return take_void_attempt(run, run.phase, attempt, why) if isinstance(run.phase, phases.Choosing) else run
        case RewindVoid():
            return take_void_rewind(run, event)
        case Reconfigured(policy=policy):
            return replace(run, policy=dataclasses.replace(policy, nodes=run.policy.nodes, min_nodes=run.policy.min_nodes))
        case LogRead(began=began):
            return replace(run, read_at=began)
        case Committed():
            return _take_commit(run, event)
        case CommitFailed():
            return _take_failed_commit(run, event)
        case Damaged(directory=directory, why=why):
            return _take_damage(run, directory, why)
        case Fenced(term=term, by=by):
            return _give_way(run, term, f"term {term} was opened by {by}")
        case StopAsked(why=why):
            return run if run.stop else say(replace(run, stop=why), "stop-asked", why)
        case SaveAsked():
            return _take_save_asked(run)
        case DrainAsked(node=node, why=why):
            members = replace(run.members, drained={**run.members.drained, node: why})
            return say(replace(run, members=members), "drain-asked", why, node=node)
        case ReadmitAsked(node=node):
            return say(replace(run, members=membership.readmit(run.members, node)), "readmitted", f"{node} is trusted again", node=node)
        case ResizeAsked(nodes=nodes):
            return say(resize(run, nodes), "resize-asked", f"a full gang has {nodes} nodes from now on, not {run.policy.nodes}")
        case RewindAsked():
            return take_rewind_asked(run, event)
        case _:
            assert_never(event)


def _take_opened(run: Run, event: Opened) -> Run:
    assert isinstance(run.phase, phases.Opening), "a term is opened once"
    run = replace(
        run,
        term=event.term,
        opened_at=event.at,
        attempt=event.last_attempt,
        taken=max(event.last_attempt, event.attempts_below - 1),
        reached=event.last_resume.step if event.last_resume else 0,
        saves=_saves_of(event),
        skips=event.skips,
        overrides=event.overrides,
        rewinds=event.rewinds,
        members=replace(run.members, seats=tuple(membership.host_of(node) for node in event.last_gang)),
    )
    run = restored(run, event)
    if not event.last_attempt or event.ended:
        return wait(run, f"term {event.term} begins, no attempt is unfinished")
    return _begin_adoption(run, event)


def _saves_of(event: Opened) -> saves.Saves:
    commits = (event.newest_commit,) if event.newest_commit else ()
    attempt = 0 if event.rewound else event.last_attempt
    return saves.Saves(commits=commits, ever_committed=bool(commits) or event.ever_committed, attempt=attempt)


def _begin_adoption(run: Run, event: Opened) -> Run:
    """Our predecessor may have been waiting for older ranks: so must we, until somebody runs its attempt."""
    record = AttemptRecord(
        attempt=event.last_attempt,
        gang=event.last_gang,
        world_size=event.last_world_size,
        nonce=event.last_nonce,
        resume=event.last_resume,
        unconfirmed=event.last_unconfirmed,
        standing=event.last_standing,
        skips=event.skips,
        overrides=event.overrides,
    )
    why = f"term {event.term} begins, attempt {record.attempt} may be running on {names(record.gang)}"
    places = {node: place for place, node in enumerate(record.gang)}
    run = enter(run, phases.Adopting(since=run.now, why=why, record=record, places=places, is_rewound=event.rewound))
    older = membership.Suspect(attempt=record.attempt - 1, since=run.now, revision=run.revision, listens=False, fenced_at=run.now)
    return replace(run, members=membership.suspect(run.members, dict.fromkeys(record.unconfirmed, older)))


def _take_tick(run: Run) -> Run:
    run = note_storage(run)
    asks, again = asking.due(run.asks, run.policy, run.now)
    members = membership.forget_long_gone(run.members, run.policy, run.now)
    if asks is run.asks and members is run.members:
        return run
    return emit(replace(run, asks=asks, members=members), *again)


def _take_report(run: Run, report: AgentReport) -> Run:
    if report.term > run.term:
        return _give_way(run, report.term, f"{report.node} obeys term {report.term}, ours is {run.term}")
    known = run.members.nodes.get(report.node)
    if report.attempt > run.taken:
        run = replace(run, taken=report.attempt)
    if known is None:
        run = say(run, "node-joined", f"{report.node} at {report.address} joined", node=report.node)
    run = _clear_suspicion(replace(run, members=membership.hear(run.members, report, run.now)), report)
    if known is not None and known.report.persisted == report.persisted:
        return run
    return _take_parts(run, report)


def _clear_suspicion(run: Run, report: AgentReport) -> Run:
    suspect = run.members.suspects.get(report.node)
    if suspect is None:
        return run
    if is_clean(run, report.node, suspect):
        return replace(run, members=membership.clear(run.members, [report.node]))
    listens = suspect.listens or report.term == run.term
    return replace(run, members=membership.suspect(run.members, {report.node: replace(suspect, listens=listens)}))


def _take_parts(run: Run, report: AgentReport) -> Run:
    return _commit_what_is_complete(replace(run, saves=saves.note(run.saves, report.persisted)))


def _commit_what_is_complete(run: Run) -> Run:
    """One commit at a time, the newest first; none once a newer attempt may be in the log."""
    match run.phase:
        case phases.Adopting(record=record) | phases.Draining(record=record):
            pass
        case phases.Starting(attempt=attempt) | phases.Training(attempt=attempt):
            record = attempt.record
        case _:
            return run
    request = None if asking.pending(run.asks, Commit) else saves.complete(run.saves, record.world_size)
    return ask(run, request) if request else run


# Answers.


def _take_record(run: Run, record: Record) -> Run:
    match record:
        case AttemptRecord():
            return take_logged_attempt(run, run.phase, record) if isinstance(run.phase, phases.Choosing) else run
        case QuarantineRecord(directory=directory):
            asks = asking.without(run.asks, lambda request: isinstance(request, LogQuarantine) and request.directory == directory)
            return replace(run, asks=asks)
        case RewindRecord():
            return take_logged_rewind(run, record)
        case EndRecord():
            return _take_end(run, record)
        case _:
            assert_never(record)


def _take_end(run: Run, record: EndRecord) -> Run:
    if not isinstance(run.phase, phases.Ending):
        return run
    return enter(drop_asks(run, LogEnd), _outcome(run, record))


def _outcome(run: Run, record: EndRecord) -> phases.Phase:
    match record.outcome:
        case "succeeded":
            return phases.Succeeded(since=run.now, why=record.why, end=record)
        case "stopped":
            return phases.Stopped(since=run.now, why=record.why, end=record)
        case "failed":
            return phases.Failed(since=run.now, why=record.why, end=record)
        case _:
            assert_never(record.outcome)


def _take_refusal(run: Run, request: Request, why: str) -> Run:
    asks = tuple(ask for ask in run.asks if ask.request == request)
    if not asks:
        return run
    return replace(run, asks=asking.refused(run.asks, asks[0].request, why, run.policy, run.now))


def _take_commit(run: Run, event: Committed) -> Run:
    run = replace(run, asks=asking.without(run.asks, lambda request: isinstance(request, Commit) and request.directory == event.directory))
    if event.attempt != run.saves.attempt or event.step <= run.saves.committed_step:
        return run
    if event.directory in run.saves.quarantined:
        return _lose_commit(run, event)
    checkpoint = Checkpoint(step=event.step, directory=event.directory, manifest_sha256=event.manifest_sha256)
    fulfilled = run.save_above is not None and event.step > run.save_above
    run = replace(run, saves=saves.commit(run.saves, checkpoint), failures=0, committed_at=run.now)
    run = replace(run, save_above=None if fulfilled else run.save_above)
    return _commit_what_is_complete(say(run, "committed", f"step {event.step} is committed ({event.directory})", step=event.step))


def _lose_commit(run: Run, event: Committed) -> Run:
    """It was found damaged before we heard that it exists. Ranks that train save again; those that have left must compute it again."""
    run = replace(run, saves=saves.discard(run.saves, event.step, event.directory))
    match run.phase:
        case phases.Training(attempt=attempt, finished=finished) if len(finished) == len(attempt.seats):
            why = f"the last checkpoint, of step {event.step}, was found damaged at once: its steps are computed again"
            return drain(run, attempt.record, moved(run, why), attempt.seats)
        case _:
            return run


def _take_failed_commit(run: Run, event: CommitFailed) -> Run:
    """A storage that is in the way is asked again while the attempt lives, and for a moment afterwards; parts that do not fit never."""
    found = [ask.request for ask in run.asks if isinstance(ask.request, Commit) and ask.request.directory == event.directory]
    if not found:
        return run
    if not event.damaged and _has_time_to_commit(run):
        return _take_refusal(run, found[0], event.why)
    run = replace(run, asks=asking.without(run.asks, lambda request: request == found[0]))
    run = replace(run, saves=saves.discard(run.saves, event.step, event.directory))
    why = f"step {event.step} was not committed ({event.directory}): {event.why}"
    return _commit_what_is_complete(say(run, "commit-failed", why, step=event.step))


def _take_damage(run: Run, directory: str, why: str) -> Run:
    """Found while nobody needs it: it is quarantined now, and where it was the newest, ranks that run save a fresh one at once."""
    if directory in run.saves.quarantined:
        return run
    runs = isinstance(run.phase, (phases.Starting, phases.Training))
    was_newest = run.saves.newest is not None and run.saves.newest.directory == directory
    run = say(replace(run, saves=saves.quarantine(run.saves, directory)), "quarantined", f"{directory} is damaged: {why}")
    run = ask(run, LogQuarantine(directory, why))
    run = replace(run, committed_at=None) if was_newest else run  # when the one before it was committed, only the log knows
    return _take_save_asked(run) if runs and was_newest else run


def _has_time_to_commit(run: Run) -> bool:
    match run.phase:
        case phases.Draining(since=since):
            return run.now - since < run.policy.commit_wait_s
        case phases.Adopting() | phases.Starting() | phases.Training():
            return True
        case _:
            return False


# People and rivals.


def _take_save_asked(run: Run) -> Run:
    above = max(run.reached, run.saves.committed_step)
    run = replace(run, save_above=above, revision=run.revision + 1)
    return say(run, "save-asked", f"asked for a checkpoint after step {above}", step=above)


def _give_way(run: Run, term: int, why: str) -> Run:
    run = enter(replace(run, asks=()), phases.Superseded(since=run.now, why=why, term=term))
    return say(run, "fenced", f"a newer coordinator decides: {why}")


# And what follows?


def _advance(run: Run, event: Event) -> Run:
    """Lets the phases' rules move on until none does. Each round leaves a phase for good, so there are few."""
    while True:
        phase = run.phase
        run = _advance_once(run, phase, event)
        if type(run.phase) is type(phase):
            return run


def _advance_once(run: Run, phase: phases.Phase, event: Event) -> Run:
    match phase:
        case phases.Waiting():
            return advance_waiting(run, phase, event)
        case phases.Adopting():
            return advance_adopting(run, phase, event)
        case phases.Choosing():
            return advance_choosing(run, phase)
        case phases.Fencing():
            return advance_fencing(run, phase, event)
        case phases.Starting() | phases.Training():
            return advance_running(run, phase, event)
        case phases.Draining():
            return advance_draining(run, phase, event)
        case phases.Opening() | phases.Ending() | phases.Succeeded() | phases.Stopped() | phases.Failed() | phases.Superseded():
            return run
        case _:
            assert_never(phase)
