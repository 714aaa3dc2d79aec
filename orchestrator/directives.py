"""What a node should be doing now. Pure."""

from __future__ import annotations

from typing import Final

from keepstep.trainer.contract import Request

from . import phases
from .events import AttemptRecord
from .run import Run
from .wire import AgentReport, Directive, Launch, ResumeFrom, StoreAddress

_OVER: Final = (phases.Succeeded, phases.Stopped, phases.Failed)


def may_answer(run: Run, now: float) -> bool:
    """Whether agents may be answered: an answer prolongs their lease, so it needs proof that nobody has succeeded us.

    False until the log's end was read in this term, and whenever that was last done over `outage_s` ago. An agent without an answer
    reads the log itself; so does one whose answer is `unproven`.
    """
    if isinstance(run.phase, (phases.Opening, phases.Superseded)):
        return False
    return run.read_at is not None and now - run.read_at <= run.policy.outage_s


def directive(run: Run, node: str) -> Directive:
    phase = run.phase
    return Directive(
        term=run.term,
        revision=run.revision,
        launch=_launch(run, node),
        autopsy=phase.record.attempt if isinstance(phase, phases.Draining) and phase.stood else 0,
        committed_step=run.saves.committed_step,
        settled_attempt=run.attempt,
        unproven=run.read_at is None or run.now - run.read_at > run.policy.lease_s,
        over=isinstance(phase, _OVER),
        forget=node in run.members.buried,
        why=phase.why,
    )


def _launch(run: Run, node: str) -> Launch | None:
    match run.phase:
        case phases.Starting(attempt=attempt) | phases.Training(attempt=attempt) if node in attempt.seats:
            return _make(run, attempt.record, attempt.seats[node])
        case phases.Adopting(record=record) if node in record.gang:
            seat = _seat_held(run.members.report_of(node), record)
            return _make(run, record, seat) if seat else None
        case _:
            return None


def _seat_held(report: AgentReport | None, record: AttemptRecord) -> phases.Seat | None:
    """While adopting, a node that runs the attempt keeps the seat that it has; the others are told when all are known."""
    if report is None or report.attempt != record.attempt or not report.ranks:
        return None
    first_rank = min(rank.rank for rank in report.ranks)
    return phases.Seat(group_rank=record.gang.index(report.node), first_rank=first_rank, num_ranks=len(report.ranks))


def _make(run: Run, record: AttemptRecord, seat: phases.Seat) -> Launch:
    request, why = _request(run)
    resume = record.resume
    return Launch(
        attempt=record.attempt,
        nonce=record.nonce,
        first_rank=seat.first_rank,
        num_ranks=seat.num_ranks,
        group_rank=seat.group_rank,
        num_nodes=len(record.gang),
        world_size=record.world_size,
        store_node=record.gang[0],
        store=_store(run, record),
        resume=ResumeFrom(step=resume.step, directory=resume.directory, manifest_sha256=resume.manifest_sha256) if resume else None,
        skips=record.skips,
        overrides=record.overrides,
        request=request,
        request_why=why,
    )


def _store(run: Run, record: AttemptRecord) -> StoreAddress | None:
    report = run.members.report_of(record.gang[0])
    store = report.store if report else None
    return store if store is not None and store.attempt == record.attempt else None


def _request(run: Run) -> tuple[Request, str]:
    match run.phase:
        case phases.Starting(departure=departure) | phases.Training(departure=departure) if departure is not None:
            return Request.STOP, departure.why
        case _ if run.save_above is not None:
            return Request.SAVE, "asked to save"
        case _:
            return Request.NONE, ""
