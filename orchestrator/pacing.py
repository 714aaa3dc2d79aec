"""Where the machine learns what the interval between saves follows from, and gives it to the ranks (interval.py decides). Pure.

Rank 0's node alone is listened to: its steps wait for all others, so what it measures is what a save costs everybody.
"""

from __future__ import annotations

from keepstep.trainer.contract import DAMAGED_KIND

from . import interval
from .changing import replace
from .events import AttemptRecord
from .run import Run, say
from .verdict import Evidence
from .wire import AgentReport

_OF_NODES = frozenset({"lost", "lease", "problem"})
_NO_FAILURES = frozenset({"move", "stopped", "fenced", DAMAGED_KIND})  # bad steps cost what a crash costs


def begun(run: Run, record: AttemptRecord) -> Run:
    """An attempt begins with what is known by then."""
    return _decided(replace(run, pace=replace(run.pace, age_s=0.0, steps=0)), record, told=run.pace.steps)


def followed(run: Run, record: AttemptRecord, report: AgentReport) -> Run:
    """A node of the attempt has reported."""
    if not run.policy.save_share or report.node != record.gang[0]:
        return run
    first = min(report.ranks, key=lambda rank: rank.rank)
    pace = replace(run.pace, age_s=report.ordered_s, costs=first.costs or run.pace.costs)
    return _decided(replace(run, pace=pace), record, told=pace.steps)


def ended(run: Run, record: AttemptRecord, culprit: Evidence) -> Run:
    """The verdict on an attempt is reached."""
    gained = run.saves.committed_step - record.resume_step
    pace = run.pace.ended(_kind_of(culprit), ranks=record.world_size, nodes=len(record.gang), gained=gained)
    return replace(run, pace=pace)


def _kind_of(culprit: Evidence) -> interval.Kind | None:
    if culprit.kind in _NO_FAILURES:
        return None
    return "node" if culprit.kind in _OF_NODES else "process"


def _decided(run: Run, record: AttemptRecord, *, told: int) -> Run:
    """`told`: the interval that people know of. At an attempt's beginning the new one holds as it is, later where it differs enough."""
    pace, share = run.pace, run.policy.save_share
    if not share or pace.costs is None:
        return run
    ranks, nodes = record.world_size, len(record.gang)
    found = interval.decide(pace.costs, pace.so_far(ranks=ranks, nodes=nodes), ranks=ranks, nodes=nodes, max_share=share)
    if pace.steps and not found.is_news(pace.steps):
        return run
    run = replace(run, pace=replace(pace, steps=found.steps), revision=run.revision + 1)
    return say(run, "interval", found.why) if found.is_news(told) else run
