"""The end of an attempt: ranks are stopped for certain, evidence is weighed, a save in flight may land, a verdict is reached. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from keepstep.trainer.contract import BAD_STEP_KIND, DAMAGED_KIND

from . import asking, hangs, membership, pacing, phases, saves, verdict
from .events import Commit, Event, LogQuarantine, Reported
from .policy import restart_pause_s
from .rewinds import is_wanted, rewind_past
from .run import Failure, Run, ask, concerned, end, heard, progress_sentence, say, say_verdict, stop_now, wait
from .running import lost_evidence
from .verdict import Evidence


def advance_draining(run: Run, phase: phases.Draining, event: Event) -> Run:
    phase = _weigh(run, _mourn(run, phase, event.report.buried), event) if isinstance(event, Reported) else _look_around(run, phase, event)
    run = run if phase is run.phase else replace(run, phase=phase)
    if not _are_unseen(run, phase) or _may_still_commit(run, phase):
        return run
    return _conclude(run, phase)


def _are_unseen(run: Run, phase: phases.Draining) -> bool:
    """Whether only nodes that cannot be observed may still run older ranks."""
    suspects = run.members.suspects
    return len(suspects) <= len(phase.unseen) and all(node in phase.unseen for node in suspects)


def _weigh(run: Run, phase: phases.Draining, event: Reported) -> phases.Draining:
    """A report may hold better evidence than what ended the attempt."""
    report = event.report
    seen_again = phase.unseen & {report.node}
    if seen_again:
        phase = replace(phase, unseen=phase.unseen - seen_again)
    if report.attempt != phase.record.attempt or report.node not in (phase.seats or phase.record.gang):
        return phase
    if phase.stood:
        phase = replace(phase, stood=hangs.updated(phase.stood, report))
    promises, resume_step = run.policy.needs_final_commit, phase.record.resume_step
    return _with(phase, verdict.of_report(report, run.now, keeps_promises=promises, resume_step=resume_step))


def _mourn(run: Run, phase: phases.Draining, buried: Iterable[str]) -> phases.Draining:
    """A successor found a node of the gang dead: that is known at once, and only now, even if its silence was still too short to count."""
    for node in buried:
        if node in phase.record.gang:
            phase = _with(phase, lost_evidence(run, node))
    return phase


def _look_around(run: Run, phase: phases.Draining, event: Event) -> phases.Draining:
    """Which nodes cannot be observed any more? Losing one explains more than a victim's complaint."""
    lost = {node: found for node in concerned(event, phase.record.gang) if (found := lost_evidence(run, node))}
    looked_at = concerned(event, run.members.suspects)
    missing = frozenset(node for node in looked_at if node in lost or lost_evidence(run, node))
    unseen = missing if looked_at is run.members.suspects else phase.unseen.difference(looked_at) | missing
    if unseen != phase.unseen:
        phase = replace(phase, unseen=unseen)
    for found in lost.values():
        phase = _with(phase, found)
    return phase


def _with(phase: phases.Draining, found: Evidence | None) -> phases.Draining:
    """Stopped ranks are our own doing by now: they explain nothing."""
    if found is None or found.kind == "stopped" or verdict.better(found, phase.culprit) is phase.culprit:
        return phase
    if phase.culprit.kind == "move":
        return phase  # an orderly leave: what breaks on the way out was going to end anyway
    return replace(phase, culprit=found, why=found.why)


def _may_still_commit(run: Run, phase: phases.Draining) -> bool:
    """A commit under way must be settled before a checkpoint is chosen; one that lacks a few parts gets a little time."""
    if asking.pending(run.asks, Commit):
        return True
    awaited = saves.until(run.saves, run.rewind.to) if run.rewind else run.saves  # what is newer leaves the history anyway
    missing = saves.missing_ranks(awaited, phase.record.world_size)
    if not missing or run.now - phase.since >= run.policy.commit_wait_s:
        return False
    step = max(awaited.parts)[0]
    return all(_may_come(run, phase, rank, step) for rank in missing)


def _may_come(run: Run, phase: phases.Draining, rank: int, step: int) -> bool:
    """The rank had finished the step that is being saved, and the node whose persister holds its part is there."""
    node = _node_of(phase, rank)
    report = run.members.report_of(node)
    if report is None or node in phase.unseen | run.members.buried:
        return False
    return any(found.rank == rank and found.step >= step for found in report.ranks)


# The verdict and what follows from it.


def _conclude(run: Run, phase: phases.Draining) -> Run:
    culprit = _culprit(run, phase)
    others = verdict.alike(culprit, _all_evidence(run, phase))
    culprit = verdict.with_others(culprit, others)
    kind = "moved" if culprit.kind == "move" else "failure"
    run = pacing.ended(say_verdict(run, kind, culprit), phase.record, culprit)
    if culprit.kind == DAMAGED_KIND:
        run = _quarantine(run, phase)
    if culprit.kind != "move":
        run = replace(run, failed=(*run.failed, Failure(attempt=phase.record.attempt, culprit=culprit)))
    if culprit.kind == BAD_STEP_KIND and not run.stop:
        return rewind_past(run, culprit)
    if not culprit.blameless:
        return _charge(run, culprit, {culprit.node, *(other.node for other in others)})
    return stop_now(run) if run.stop and not is_wanted(run) else wait(run, f"after attempt {run.attempt}: {culprit.why}")


def _culprit(run: Run, phase: phases.Draining) -> Evidence:
    """The best evidence, seen in the light of all of it."""
    if phase.culprit.kind == "stall":
        return hangs.culprit_of(phase.stood, run.now)
    if phase.culprit.kind == "peer-lost":
        leavers = (verdict.early_leaver(report, run.now) for report, _ in heard(run, phase.record))
        return next((found for found in leavers if found), phase.culprit)
    if phase.culprit.kind == BAD_STEP_KIND and not phase.culprit.node:
        return replace(phase.culprit, node=_node_of(phase, phase.culprit.rank))
    return phase.culprit


def _node_of(phase: phases.Draining, rank: int) -> str:
    """Where a rank runs; "" where the seats were never known."""
    seats = phase.seats.items()
    return next((node for node, seat in seats if seat.first_rank <= rank < seat.first_rank + seat.num_ranks), "")


def _all_evidence(run: Run, phase: phases.Draining) -> Iterator[Evidence]:
    for report, _ in heard(run, phase.record):
        promises, resume_step = run.policy.needs_final_commit, phase.record.resume_step
        yield from verdict.all_of_report(report, run.now, keeps_promises=promises, resume_step=resume_step)


def _quarantine(run: Run, phase: phases.Draining) -> Run:
    """Only what the attempt was told to resume from can have been found damaged."""
    resume = phase.record.resume
    if resume is None or resume.directory in run.saves.quarantined:
        return run
    run = replace(run, saves=saves.quarantine(run.saves, resume.directory))
    run = say(run, "quarantined", f"{resume.directory} (step {resume.step}) is damaged: {phase.culprit.detail}", step=resume.step)
    return ask(run, LogQuarantine(resume.directory, phase.culprit.why))


def _strike(run: Run, culprit: Evidence, nodes: set[str]) -> Run:
    """What fails on several `nodes` alike is no node's fault."""
    if not culprit.node or len(nodes) > 1:
        return run
    run = replace(run, members=membership.strike(run.members, culprit.node, run.now))
    host, policy = membership.host_of(culprit.node), run.policy
    if membership.num_strikes(run.members, policy, host, run.now) != policy.strikes:
        return run
    limits = f"it gets no ranks while {policy.min_nodes} other nodes are fit (`keepstep readmit` ends that)"
    return say(run, "node-quarantined", f"{host} caused {policy.strikes} failures: {limits}", node=culprit.node)


def _charge(run: Run, culprit: Evidence, nodes: set[str]) -> Run:
    """A failure costs one of the budget, and its node a strike."""
    again = run.policy.stop_at_same_error and culprit.sameness() is not None and culprit.sameness() == run.last_error
    run = _strike(replace(run, failures=run.failures + 1, last_error=culprit.sameness()), culprit, nodes)
    if is_wanted(run):
        return wait(run, f"after attempt {run.attempt}: {culprit.why}")
    if run.stop:
        return stop_now(run)
    if again:
        why = f"the same error at the same step twice in a row: {culprit.why}; it would happen again"
        return end(run, "failed", why, requeue=False)
    if run.failures > run.policy.max_failures:
        spent = f"{run.failures} failures in a row without a commit between them, {run.policy.max_failures} are forgiven"
        why = f"{spent}; the last: {culprit.why}"
        return end(run, "failed", why, requeue=True)
    pause_s = restart_pause_s(run.policy, run.failures)
    pause = f"; pausing {pause_s:g} s after {run.failures} failures in a row" if pause_s else ""
    return wait(run, f"after attempt {run.attempt}: {culprit.why}{pause} ({progress_sentence(run)})", pause_s)
