"""The document of `keepstep status --json`: what the machine knows, as people and scripts read it."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Any, Final

from keepstep.storage.lineage import Lineage
from keepstep.storage.records import Opened
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store
from keepstep.trainer.contract import Phase

from . import membership, phases
from .archive import outcome_name
from .books import read_books
from .config import overridden
from .machine import Run, describe
from .roots import stored_config
from .sections import RunConfig
from .wire import AgentReport, RankReport

UNKNOWN: Final = "UNKNOWN"


def live_status(run: Run, config: RunConfig, *, url: str) -> dict[str, Any]:
    """What the machine knows now; cheap."""
    phase, why = describe(run)
    attempt = getattr(run.phase, "attempt", None)
    record = attempt.record if isinstance(attempt, phases.Attempt) else getattr(run.phase, "record", None)
    nodes = [_node(run, name) for name in _in_order(run, record.gang if record else ())]
    return {
        "run": config.run.name,
        "phase": phase,
        "why": why,
        "attempt": run.attempt,
        "step": slowest_step(run),
        "steps": config.run.steps,
        "world_size": record.world_size if record else 0,
        "coordinator": {"pid": os.getpid(), "url": url, "term": run.term},
        "degraded": {"why": run.degraded.why, "since_s": round(run.now - run.degraded.since, 1)} if run.degraded else None,
        "nodes": nodes,
        "skips": run.skips,
        "overrides": run.overrides,
        "rewinds": run.rewinds,
    }


def live_age_s(run: Run) -> float | None:
    """Seconds since the newest commit by the coordinator's own clock; None for one of an earlier term."""
    return None if run.committed_at is None else run.now - run.committed_at


def slowest_step(run: Run) -> int:
    """Steps that every rank of the current attempt has finished; between attempts, the newest that any rank had."""
    ranks = [rank for node in run.members.nodes.values() if node.report.attempt == run.attempt for rank in node.report.ranks]
    return min((rank.step for rank in ranks), default=max(run.reached, run.saves.committed_step, 0))


def _in_order(run: Run, gang: tuple[str, ...]) -> list[str]:
    """Those that are lost, the gang by its seats, then who waits: the map of members has no order of its own."""
    others = sorted(set(run.members.nodes) - set(gang))
    lost = [name for name in others if membership.absence(run.members, run.policy, name, run.now, run.opened_at)]
    seated = [name for name in gang if name in run.members.nodes]
    return [*lost, *seated, *(name for name in others if name not in lost)]


def _node(run: Run, name: str) -> dict[str, Any]:
    report = run.members.nodes[name].report
    state, why = _state(run, name, report)
    return {
        "id": name,
        "host": report.host,
        "pid": report.pid,
        "state": state,
        "why": why,
        "ranks": [_rank(rank) for rank in report.ranks],
        "standby": report.standby.model_dump(include={"number", "state", "why", "pids"}) if report.standby else {},
    }


def _state(run: Run, name: str, report: AgentReport) -> tuple[str, str]:
    if why := membership.absence(run.members, run.policy, name, run.now, run.opened_at):
        return "lost", why
    if any(rank.state == "running" for rank in report.ranks):
        return "running", ""
    why = membership.why_unfit(run.members, run.policy, name, run.now)
    return ("unfit", why) if why else ("ready", "")


def _rank(rank: RankReport) -> dict[str, Any]:
    phase = Phase(rank.phase).name.lower() if rank.state == "running" else "exited"
    return {"rank": rank.rank, "local_rank": rank.local_rank, "pid": rank.pid, "step": rank.step, "phase": phase}


def last_commit(lineage: Lineage, age_s: float | None = None) -> dict[str, Any] | None:
    """`age_s`: where the caller knows it; otherwise by the wall clocks of two machines, for want of something better."""
    commit = lineage.newest_committed()
    if commit is None:
        return None
    if age_s is None:
        age_s = (datetime.now(UTC) - datetime.fromisoformat(commit.at)).total_seconds()
    return {"step": commit.step, "attempt": commit.attempt, "age_s": round(max(0.0, age_s), 1), "tier": "root"}


def status_without_coordinator(store: Store, log: RunLog) -> dict[str, Any]:
    """What the log alone says: nobody reigns, which says nothing about the ranks."""
    lineage = log.lineage
    config = overridden(stored_config(store), lineage.overrides)
    opened, newest, commit = lineage.opened, lineage.newest_attempt(), lineage.newest_committed()
    assert opened
    over = lineage.outcome
    return {
        "run": config.run.name,
        "phase": outcome_name(over).upper() if over else UNKNOWN,
        "why": over.why if over else _why_alone(lineage, opened),
        "attempt": newest.attempt if newest else 0,
        "step": commit.step if commit else 0,
        "steps": config.run.steps,
        "world_size": newest.world_size if newest else 0,
        "coordinator": {"pid": opened.pid, "url": opened.url, "term": opened.term},
        "degraded": None,
        "nodes": [],
        "skips": lineage.skips,
        "overrides": lineage.overrides,
        "rewinds": lineage.num_bad_steps,
        "last_commit": last_commit(lineage),
        **read_books(store, lineage),
    }


def _why_alone(lineage: Lineage, opened: Opened) -> str:
    """Nobody answers: after a rewind by the command alone there is nobody yet."""
    if lineage.rewound and not opened.url:
        where = f"step {lineage.rewound.step}" if lineage.rewound.directory else "the beginning"
        return f"rewound to {where}; nobody coordinates the run, `keepstep run` goes on"
    return f"the coordinator of term {opened.term} ({opened.url or 'no address'}) does not answer"
