"""What a node should be doing now. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from keepstep.trainer.contract import Pacing, Request

from . import phases
from .events import AttemptRecord
from .run import Group, Run
from .wire import AgentReport, Directive, Launch, ResumeFrom, Standby, StoreAddress

_OVER: Final = (phases.Succeeded, phases.Stopped, phases.Failed)


def may_answer(run: Run, now: float) -> bool:
    """Whether agents may be answered: an answer prolongs their lease, so it needs proof that nobody has succeeded us.

    False until the log's end was read in this term, and whenever that was last done over `outage_s` ago. An agent without an answer
    reads the log itself; so does one whose answer is `unproven`.
    """
    if isinstance(run.phase, (phases.Opening, phases.Superseded)):
        return False
    return run.read_at is not None and now - run.read_at <= run.policy.outage_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """All that directives of one moment have in common, and what tells them apart. Equal orders make equal directives.

    Compared after every event, so it is made of what the run holds anyway: comparing what did not change costs a glance each.
    """

    term: int
    revision: int
    record: AttemptRecord | None  # of the attempt that is to run
    seats: Mapping[str, phases.Seat] | None  # None: each node keeps the seat that it has, which its own report says
    places: Mapping[str, int]  # of nodes in the gang, where they keep their seats
    store: StoreAddress | None
    into: int  # the standby that becomes the attempt's ranks
    standby: Group | None
    standby_store: StoreAddress | None
    request: Request
    request_why: str
    pacing: Pacing
    autopsy: int
    committed_step: int
    settled_attempt: int
    unproven: bool
    over: bool
    buried: frozenset[str]

    @property
    def is_common(self) -> bool:
        """Whether no node's own report is needed to make its directive."""
        return self.record is None or self.seats is not None


def orders(run: Run) -> Orders:
    """What nodes should be doing now."""
    phase = run.phase
    record, seats, places = _launched(phase)
    request, why = _request(run) if record else (Request.NONE, "")
    return Orders(
        term=run.term,
        revision=run.revision,
        record=record,
        seats=seats,
        places=places,
        store=_store(run, record) if record else None,
        into=phase.attempt.standby if isinstance(phase, (phases.Starting, phases.Training)) else 0,
        standby=run.standby.group if run.standby else None,
        standby_store=_standby_store(run, run.standby.group) if run.standby else None,
        request=request,
        request_why=why,
        pacing=Pacing(run.pace.steps, run.pace.soon),
        autopsy=phase.record.attempt if isinstance(phase, phases.Draining) and phase.stood else 0,
        committed_step=run.saves.committed_step,
        settled_attempt=run.attempt,
        unproven=run.read_at is None or run.now - run.read_at > run.policy.lease_s,
        over=isinstance(phase, _OVER),
        buried=run.members.buried,
    )


def _launched(phase: phases.Phase) -> tuple[AttemptRecord | None, Mapping[str, phases.Seat] | None, Mapping[str, int]]:
    match phase:
        case phases.Starting(attempt=attempt) | phases.Training(attempt=attempt):
            return attempt.record, attempt.seats, {}
        case phases.Adopting(record=record, places=places):
            return record, None, places
        case _:
            return None, None, {}


def directive(run: Run, node: str) -> Directive:
    """What this node should be doing now."""
    return directive_of(orders(run), run, node)


def directive_of(told: Orders, run: Run, node: str) -> Directive:
    """The same, where the orders of the moment are known."""
    return Directive(
        term=told.term,
        revision=told.revision,
        launch=_launch(told, run, node),
        standby=_standby(told, node),
        autopsy=told.autopsy,
        committed_step=told.committed_step,
        settled_attempt=told.settled_attempt,
        unproven=told.unproven,
        over=told.over,
        forget=node in told.buried,
    )


def _launch(told: Orders, run: Run, node: str) -> Launch | None:
    record = told.record
    if record is None:
        return None
    if told.seats is not None:
        seat = told.seats.get(node)
    else:
        seat = _seat_held(run.members.report_of(node), record, told.places)
    return _make(told, record, seat) if seat else None


def _seat_held(report: AgentReport | None, record: AttemptRecord, places: Mapping[str, int]) -> phases.Seat | None:
    """While adopting, a node that runs the attempt keeps the seat that it has; the others are told when all are known."""
    if report is None or report.node not in places or report.attempt != record.attempt or not report.ranks:
        return None
    first_rank = min(rank.rank for rank in report.ranks)
    return phases.Seat(group_rank=places[report.node], first_rank=first_rank, num_ranks=len(report.ranks))


def _make(told: Orders, record: AttemptRecord, seat: phases.Seat) -> Launch:
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
        store=told.store,
        resume=ResumeFrom(step=resume.step, directory=resume.directory, manifest_sha256=resume.manifest_sha256) if resume else None,
        skips=record.skips,
        overrides=record.overrides,
        request=told.request,
        request_why=told.request_why,
        pacing=told.pacing,
        standby=told.into,
    )


def _standby(told: Orders, node: str) -> Standby | None:
    group = told.standby
    if group is None or node not in group.seats:
        return None
    seat = group.seats[node]
    return Standby(
        number=group.number,
        first_rank=seat.first_rank,
        num_ranks=seat.num_ranks,
        group_rank=seat.group_rank,
        num_nodes=len(group.seats),
        world_size=group.world_size,
        store_node=next(iter(group.seats)),
        store=told.standby_store,
        overrides=group.overrides,
    )


def _standby_store(run: Run, group: Group) -> StoreAddress | None:
    report = run.members.report_of(next(iter(group.seats)))
    told = report.standby if report else None
    return told.store if told is not None and (told.term, told.number) == (run.term, group.number) else None


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
