"""An attempt that runs or may run: ADOPTING, STARTING, TRAINING. Pure.

Per report the work is in proportion to that report; only ticks look at the whole gang.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from keepstep.trainer.contract import Phase as RankPhase

from . import asking, hangs, membership, pacing, phases, saves, verdict
from .changing import replace
from .events import AttemptRecord, Commit, Event, Reported
from .forming import seats
from .leaving import depart, moved
from .run import Run, concerned, drain, end, enter, heard, launch_sentence, names, say, start
from .verdict import Evidence
from .wire import AgentReport, RankReport

# ADOPTING


def advance_adopting(run: Run, phase: phases.Adopting, event: Event) -> Run:
    """A predecessor's attempt goes on if every node of its gang says so in time, and nothing speaks against it."""
    record = phase.record
    if phase.is_rewound:
        return drain(run, record, moved(run, f"attempt {record.attempt} was rewound"), {})
    if run.rewind:
        return drain(run, record, moved(run, run.rewind.why), {})
    if trouble := _trouble(run, record, event, phase.places):
        return drain(run, record, trouble, {})
    nodes = run.members.nodes
    if len(nodes) < len(record.gang) or any(node not in nodes for node in record.gang):
        return run
    attempt = phases.Attempt(record=record, seats=seats(run, record))
    num_ranks = sum(seat.num_ranks for seat in attempt.seats.values())
    if num_ranks != record.world_size:
        why = f"attempt {record.attempt} was logged with {record.world_size} ranks, its nodes now offer {num_ranks}"
        return drain(run, record, Evidence(kind="move", why=why, seen_at=run.now), attempt.seats)
    return _adopt(run, attempt)


def _adopt(run: Run, attempt: phases.Attempt) -> Run:
    """Whoever was launched is proof that the predecessor had made sure of the older ranks' deaths."""
    launched = [node for node in attempt.record.gang if _runs(run.members.nodes[node].report, attempt.number)]
    if run.members.suspects and not launched:
        older = names(sorted(run.members.suspects))
        why = f"attempt {attempt.number} is adopted, nobody runs it yet; {older} may still run an older one"
        return enter(run, phases.Fencing(since=run.now, why=why, attempt=attempt))
    run = replace(run, members=membership.clear(run.members, run.members.suspects))
    adopted = f"adopted {launch_sentence(attempt.record)}; running on {len(launched)} of {len(attempt.seats)} nodes"
    run = pacing.begun(say(start(run, attempt), "adopted", adopted), attempt.record)
    for node in attempt.record.gang:
        run = _follow(run, run.members.nodes[node].report)
    return run


def _runs(report: AgentReport, attempt: int) -> bool:
    return report.attempt == attempt and bool(report.ranks)


# STARTING and TRAINING


def advance_running(run: Run, phase: phases.Starting | phases.Training, event: Event) -> Run:
    if isinstance(event, Reported):
        run = _follow(run, event.report)
        assert isinstance(run.phase, (phases.Starting, phases.Training))
        phase = run.phase
    attempt = phase.attempt
    if run.rewind:
        return drain(run, attempt.record, moved(run, run.rewind.why), attempt.seats)
    if trouble := _trouble(run, attempt.record, event, attempt.seats):
        return drain(run, attempt.record, trouble, attempt.seats)
    if isinstance(phase, phases.Starting) and len(phase.stepped) == len(attempt.seats):
        why = f"all {attempt.record.world_size} ranks of attempt {attempt.number} run"
        return enter(run, phases.Training(since=run.now, why=why, attempt=attempt, finished=phase.finished, departure=phase.departure))
    if len(phase.finished) == len(attempt.seats):
        return _finish(run, phase)
    return depart(run, phase, event)


def _follow(run: Run, report: AgentReport) -> Run:
    """Notes how far a node of the gang has come."""
    phase = run.phase
    if not isinstance(phase, (phases.Starting, phases.Training)) or report.node not in phase.attempt.seats:
        return run
    if not _runs(report, phase.attempt.number):
        return run
    run = pacing.followed(run, phase.attempt.record, report)
    reached = max(rank.step for rank in report.ranks)
    if reached > run.reached:
        run = replace(run, reached=reached)
    if report.node not in phase.finished and all(rank.state == "exited" and rank.exit_code == 0 for rank in report.ranks):
        phase = replace(phase, finished=phase.finished.set(report.node, None))
    if isinstance(phase, phases.Starting) and report.node not in phase.stepped and _have_stepped(run, phase, report):
        phase = replace(phase, stepped=phase.stepped.set(report.node, None))
    return run if phase is run.phase else replace(run, phase=phase)


def _have_stepped(run: Run, phase: phases.Starting, report: AgentReport) -> bool:
    keeps_promises = run.policy.needs_final_commit
    return all(_has_stepped(rank, phase.attempt.resume_step, keeps_promises=keeps_promises) for rank in report.ranks)


def _has_stepped(rank: RankReport, resume_step: int, *, keeps_promises: bool) -> bool:
    """A script that reports no progress at all counts as stepping while it runs."""
    if not keeps_promises and rank.beats == 0:
        return True
    return rank.phase > RankPhase.STEP or (rank.phase == RankPhase.STEP and rank.step > resume_step)


# What speaks against going on.


def _trouble(run: Run, record: AttemptRecord, event: Event, gang: Collection[str]) -> Evidence | None:
    if _is_all_persisted(run):
        return None  # what is left of the attempt needs no node any more
    if isinstance(event, Reported):
        return _trouble_in(run, record, event.report, gang)
    return _absent(run, concerned(event, gang)) or _late(run)


def _is_all_persisted(run: Run) -> bool:
    """Every rank has left, and every part of the final checkpoint is durable."""
    phase = run.phase
    if not isinstance(phase, phases.Training) or len(phase.finished) < len(phase.attempt.seats):
        return False
    is_whole = saves.newest_whole(run.saves, phase.attempt.record.world_size) >= run.reached
    return is_whole or asking.pending(run.asks, Commit)


def _trouble_in(run: Run, record: AttemptRecord, report: AgentReport, gang: Collection[str]) -> Evidence | None:
    if report.buried and (found := _absent(run, (node for node in report.buried if node in gang))):
        return found
    if report.node not in gang:
        return None
    if report.attempt == record.attempt:
        promises = run.policy.needs_final_commit
        failed = verdict.of_report(report, run.now, keeps_promises=promises, resume_step=record.resume_step)
        return failed or _hanging(run, record, report)
    if report.attempt > record.attempt:
        why = f"{report.node} ran attempt {report.attempt}, the log knows of {record.attempt} only: a record was lost"
        return Evidence(kind="move", why=why, node=report.node, seen_at=run.now)
    if report.problem:
        return Evidence(kind="problem", why=f"{report.node} cannot run ranks: {report.problem}", node=report.node, seen_at=run.now)
    return None


def _absent(run: Run, nodes: Iterable[str]) -> Evidence | None:
    return next((lost for node in nodes if (lost := lost_evidence(run, node))), None)


def lost_evidence(run: Run, node: str) -> Evidence | None:
    """ "lost node1#ab12: silent for over 5 s"; None while the node is there."""
    why = membership.absence(run.members, run.policy, node, run.now, run.opened_at)
    return Evidence(kind="lost", why=f"lost {node}: {why}", node=node, step=run.reached, detail=why, seen_at=run.now) if why else None


def _hanging(run: Run, record: AttemptRecord, report: AgentReport) -> Evidence | None:
    """A rank that is silent for too long; but while a node cannot be heard, that node may be why: its lease decides."""
    if not any(hangs.is_overdue(rank, run.policy.stall_s) for rank in report.ranks):
        return None
    reports = heard(run, record)
    if len(reports) < len(record.gang) or any(run.now - heard_at > hangs.SILENT_NODE_S for _, heard_at in reports):
        return None
    stood = hangs.stood_still(reports, run.now)
    return hangs.culprit_of(stood, run.now) if hangs.is_hang(stood, run.policy.stall_s) else None


def _late(run: Run) -> Evidence | None:
    phase, policy = run.phase, run.policy
    if isinstance(phase, phases.Starting) and run.now - phase.since > policy.start_timeout_s:
        slow = names(node for node in phase.attempt.seats if node not in phase.stepped)
        why = f"no first step within {policy.start_timeout_s:g} s on {slow}"
        return Evidence(kind="start-timeout", why=why, step=run.reached, detail="no first step in time", seen_at=run.now)
    if isinstance(phase, phases.Training) and phase.finished_at is not None and run.now - phase.finished_at > policy.stall_s:
        why = f"the checkpoint of step {run.reached} was not committed within {policy.stall_s:g} s after all ranks had left"
        return Evidence(kind="commit-timeout", why=why, step=run.reached, detail="final commit missing", seen_at=run.now)
    return None


# The end.


def _finish(run: Run, phase: phases.Starting | phases.Training) -> Run:
    """All ranks have left with 0; success needs what they left behind to be committed."""
    policy, committed = run.policy, run.saves.committed_step
    if not policy.needs_final_commit:
        return end(run, "succeeded", "all ranks ended with exit code 0", requeue=False)
    if committed >= policy.steps:
        return end(run, "succeeded", f"all {policy.steps} steps are done and committed", requeue=False)
    if committed >= run.reached:
        return _end_early(run) if _is_done(run, phase) else _leave(run, phase)
    if isinstance(phase, phases.Training) and phase.finished_at is None:
        run = replace(run, phase=replace(phase, finished_at=run.now))
        return say(run, "committing", f"all ranks have left at step {run.reached}; waiting for its commit")
    return run


def _is_done(run: Run, phase: phases.Starting | phases.Training) -> bool:
    """Ranks agree on how they leave: the word of one is that of all."""
    reports = (run.members.nodes[node].report for node in phase.attempt.seats if node in run.members.nodes)
    return any(rank.phase == RankPhase.DONE for report in reports if report.attempt == phase.attempt.number for rank in report.ranks)


def _end_early(run: Run) -> Run:
    """The training itself said that more steps would be of no use; result.json says why."""
    step = run.saves.committed_step
    why = f"the training ended by itself at step {step} of {run.policy.steps}, which is committed: its evaluations got no better"
    return end(run, "succeeded", why, requeue=False)


def _leave(run: Run, phase: phases.Starting | phases.Training) -> Run:
    """They left at a step boundary before the last step. Without an order to stop (our predecessor may have taken it along), go on."""
    if run.stop:
        return end(run, "stopped", f"{run.stop}; step {run.saves.committed_step} of {run.policy.steps} is committed", requeue=True)
    why = phase.departure.why if phase.departure else f"all ranks left at step {run.reached}, nobody wants the run to stop"
    return drain(run, phase.attempt.record, moved(run, why), phase.attempt.seats)
