"""Which rank hangs when all stand still: the others only wait for it. Pure.

A hang is a silence that is longer than the rank's agent has learnt to expect (`RankReport.limit_s`). One rank's hang silences all of
them within a step, so the first to complain says nothing. What tells them apart, the strongest first: the kernel has stopped its process;
its interpreter runs no thread any more; it has begun fewer collectives than the others, who wait in the next one; its stack does not wait
for anybody; it has finished fewer steps; it has been silent for longer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from .verdict import Evidence, phase_name
from .wire import AgentReport, RankReport

NO_PULSE_S: Final = 2.0  # a pulse comes ten times a second
SILENT_NODE_S: Final = 2.5  # nodes report once a second at the least: one that does not may be the cause, and its lease will tell


@dataclass(frozen=True, slots=True)
class Stood:
    """A rank at the moment at which the hang was noticed."""

    node: str
    rank: RankReport
    quiet_s: float

    @property
    def is_stopped(self) -> bool:
        return self.rank.process in ("T", "t")

    @property
    def has_no_pulse(self) -> bool:
        return self.rank.pulse_s > NO_PULSE_S


def is_overdue(rank: RankReport, stall_s: float) -> bool:
    """`stall_s`: the limit where the agent knows none."""
    return rank.state == "running" and rank.beats > 0 and rank.quiet_s > (rank.limit_s or stall_s)


def is_hang(stood: tuple[Stood, ...], stall_s: float) -> bool:
    """Whether one of those that all others wait for is silent for too long. A rank that evaluates or reads for minutes, and says so, makes
    the others silent: they are not at fault, and it is none."""
    behind = min((one.rank.collective for one in stood), default=-1)
    return any(
        one.rank.beats > 0 and one.quiet_s > (_limit_s(one.rank, stood) or stall_s) for one in stood if one.rank.collective == behind
    )


def _limit_s(rank: RankReport, stood: tuple[Stood, ...]) -> float:
    """A node that has seen too little to know a limit goes by those that step along with it."""
    return rank.limit_s or max(
        (one.rank.limit_s for one in stood if (one.rank.phase, one.rank.step) == (rank.phase, rank.step)), default=0.0
    )


def stood_still(reports: Iterable[tuple[AgentReport, float]], now: float) -> tuple[Stood, ...]:
    """Every rank that runs. `reports`: each with the instant at which it was heard."""
    return tuple(
        Stood(report.node, rank, rank.quiet_s + now - heard_at)
        for report, heard_at in reports
        for rank in report.ranks
        if rank.state == "running"
    )


def updated(stood: tuple[Stood, ...], report: AgentReport) -> tuple[Stood, ...]:
    """The same, with what a later report says. Of ranks that are stopped by now only what their end does not change."""
    later = {rank.rank: rank for rank in report.ranks}

    def learn(one: Stood) -> Stood:
        rank = later.get(one.rank.rank) if one.node == report.node else None
        if rank is None:
            return one
        if rank.state == "running":
            return replace(one, rank=rank, quiet_s=rank.quiet_s)
        if rank.stopped_by_agent:
            lasting = {"phase": rank.phase, "step": rank.step, "collective": rank.collective, "where": rank.where, "waits": rank.waits}
            return replace(one, rank=one.rank.model_copy(update=lasting))
        return replace(one, rank=one.rank.model_copy(update={"waits": True})) if rank.kind == "peer-lost" else one

    return tuple(map(learn, stood))


def culprit_of(stood: tuple[Stood, ...], now: float) -> Evidence:
    """The rank that the others wait for; nobody where all of them wait."""
    if _all_wait(stood):
        return _nobody(stood, now)
    found = min(stood, key=_innocence)
    rank, others = found.rank, [one for one in stood if one is not found]
    what = f"no progress for {found.quiet_s:.1f} s in phase {phase_name(rank.phase)} at step {rank.step}"
    reason = _reason(found, others)
    place = f" (at {rank.where})" if rank.where else ""
    return Evidence(
        kind="stall",
        why=f"rank {rank.rank} on {found.node} hangs: {what}{'; ' if reason else ''}{reason}{place}",
        node=found.node,
        rank=rank.rank,
        step=rank.step,
        detail=reason or f"no progress for {found.quiet_s:.1f} s",
        seen_at=now,
    )


def _nobody(stood: tuple[Stood, ...], now: float) -> Evidence:
    first = stood[0].rank
    quiet_s = max(one.quiet_s for one in stood)
    waiting = f"all {len(stood)} ranks have been waiting for each other in collective {first.collective} for {quiet_s:.1f} s"
    why = f"{waiting}, is the network between their nodes cut? (rank {first.rank} at {first.where})"
    return Evidence(kind="stall", why=why, step=max(one.rank.step for one in stood), detail="all ranks wait", seen_at=now)


def _innocence(one: Stood) -> tuple[bool, bool, int, int, int, float, int]:
    rank = one.rank
    waits = 2 if rank.waits else 0 if rank.where else 1  # nobody knows where no stack could be taken
    return not one.is_stopped, not one.has_no_pulse, rank.collective, waits, rank.step, -one.quiet_s, -rank.rank


def _all_wait(stood: tuple[Stood, ...]) -> bool:
    numbers = {one.rank.collective for one in stood}
    return len(stood) > 1 and len(numbers) == 1 and all(one.rank.waits and not one.is_stopped and not one.has_no_pulse for one in stood)


def _reason(found: Stood, others: list[Stood]) -> str:
    ahead = max((one.rank.collective for one in others), default=-1)
    if found.is_stopped:
        return "its process is stopped (SIGSTOP, or a debugger)"
    if found.has_no_pulse:
        return f"its interpreter has run nothing for {found.rank.pulse_s:.1f} s (native code that holds the lock, or no processor time)"
    if found.rank.collective < ahead:
        return f"it has begun {found.rank.collective} collectives, others are in number {ahead} and wait for it"
    if found.rank.where and not found.rank.waits and any(one.rank.waits for one in others):
        return "the others wait for it"
    return "it is in uninterruptible sleep" if found.rank.process == "D" else ""
