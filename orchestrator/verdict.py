"""Who was first: evidence from all nodes, ordered by how much it explains. Pure.

A rank that dies takes its peers with it within milliseconds: their collectives fail ("peer-lost"), then we stop the rest. Both are
victims. The order of reports says little, and clocks of different machines are never compared; so kinds of evidence are ranked first,
and arrival only decides between equals.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from keepstep.storage import skips
from keepstep.trainer.contract import BAD_STEP_KIND, DAMAGED_KIND, Phase

from .wire import AgentReport, RankReport

# The smaller, the more it explains. A lost node stands behind what ranks did themselves: its loss cannot make another rank raise
# anything but "peer-lost", while a failing rank can well take its node along. SIGABRT is how libraries give up when a peer is gone.
_WEIGHT: Final = {
    DAMAGED_KIND: 0,
    "signal": 1,
    "oom": 1,
    "exception": 2,
    BAD_STEP_KIND: 2,
    "persister": 2,
    "abort": 2,
    "exit": 2,
    "lost": 3,
    "lease": 4,
    "fenced": 4,
    "stopped": 4,
    "stall": 5,
    "start-timeout": 6,
    "commit-timeout": 6,
    "departure": 6,
    "problem": 6,
    "peer-lost": 7,
    "move": 8,
}
_UNKNOWN_WEIGHT: Final = 2  # a kind that this version does not know: a rank's own failure

# Nobody's fault: these cost neither budget nor strikes.
_BLAMELESS: Final = frozenset({DAMAGED_KIND, BAD_STEP_KIND, "move", "stopped", "fenced"})
# A program does these by itself; anybody may send SIGKILL, SIGTERM and SIGINT, so they prove nothing when they come twice.
_OWN_DOING: Final = frozenset({"exception", "exit", "signal", "abort"})
_OWN_FAILURE: Final = frozenset({"exception", "exit", "signal", "abort", "oom"})  # of single ranks, so that they can be counted
_FROM_OUTSIDE: Final = frozenset({"SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One thing that went wrong, as seen from one place."""

    kind: str
    why: str  # the whole sentence
    node: str = ""
    rank: int = -1
    step: int = -1
    detail: str = ""  # the error alone, e.g. "ValueError: bad batch"
    seen_at: float = 0.0
    order: int = 0  # of the exits on its node
    tail: tuple[str, ...] = ()  # the last lines that it printed
    skips: tuple[str, ...] = ()  # of a bad step: the positions to leave out

    @property
    def blameless(self) -> bool:
        return self.kind in _BLAMELESS

    def sameness(self) -> tuple[str, str, int] | None:
        """Equal for two failures that are the same error at the same step; None where repetition proves nothing."""
        if self.kind not in _OWN_DOING or self.detail in _FROM_OUTSIDE:
            return None
        return self.kind, _normalised(self.detail), self.step


def better(one: Evidence, other: Evidence) -> Evidence:
    """The one that explains more; of equals the one seen first, then the one that its node saw first."""
    return min(one, other, key=_explains)


def _explains(evidence: Evidence) -> tuple[int, float, int, int]:
    return _WEIGHT.get(evidence.kind, _UNKNOWN_WEIGHT), evidence.seen_at, evidence.order, evidence.rank


def of_report(report: AgentReport, now: float, *, keeps_promises: bool, resume_step: int = 0) -> Evidence | None:
    """The best evidence among a node's ranks; None if all are well.

    Args:
        keeps_promises: the trainer reports its phases, so that leaving with 0 before the end is a failure too.
        resume_step: the attempt began after it. Whoever refuses a step up to it counts otherwise than the history: no way back follows.
    """
    return min(all_of_report(report, now, keeps_promises=keeps_promises, resume_step=resume_step), key=_explains, default=None)


def all_of_report(report: AgentReport, now: float, *, keeps_promises: bool, resume_step: int = 0) -> Iterator[Evidence]:
    for rank in report.ranks:
        if rank.state == "exited" and (found := _of_exit(report.node, _plain(rank, resume_step), now, keeps_promises)):
            yield found


def _plain(rank: RankReport, resume_step: int) -> RankReport:
    """A bad step that nobody can go back from was an exception like any other."""
    if rank.kind != BAD_STEP_KIND or (rank.bad_step > max(resume_step, 0) and _says_what_to_leave_out(rank)):
        return rank
    return rank.model_copy(update={"kind": "exception"})  # nothing would change the next time


def early_leaver(report: AgentReport, now: float) -> Evidence | None:
    """A script's rank that left with 0. Only where the others complain of lost peers was that too early: scripts promise nothing."""
    left = (rank for rank in report.ranks if rank.state == "exited" and rank.exit_code == 0)
    how = "left with exit code 0 while others still needed it"
    return min((_exit_evidence(report.node, rank, now, "exit", how) for rank in left), key=_explains, default=None)


def alike(culprit: Evidence, found: Iterable[Evidence]) -> tuple[Evidence, ...]:
    """The others that failed in the same way at the same step: one error, seen several times."""
    kind, detail, step = culprit.kind, _normalised(culprit.detail), culprit.step
    if kind not in _OWN_FAILURE:
        return ()
    return tuple(
        each
        for each in found
        if (each.kind, _normalised(each.detail), each.step) == (kind, detail, step) and each.rank != culprit.rank >= 0
    )


def with_others(culprit: Evidence, others: tuple[Evidence, ...]) -> Evidence:
    """The verdict's sentence for a whole group."""
    if not others:
        return culprit
    ranks = sorted(other.rank for other in others)
    named = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
    return replace(culprit, why=f"{culprit.why}; {named} failed alike")


def _of_exit(node: str, rank: RankReport, now: float, keeps_promises: bool) -> Evidence | None:
    if rank.stopped_by_agent:
        return _exit_evidence(node, rank, now, "stopped", "was stopped by its own agent")
    if rank.exit_code == 0:
        left_early = keeps_promises and rank.phase not in (Phase.DONE, Phase.STOPPED)
        how = f"left in phase {phase_name(rank.phase)} with exit code 0, before it had finished"
        return _exit_evidence(node, rank, now, "exit", how) if left_early else None
    kind = _kind_of(rank)
    if kind == BAD_STEP_KIND:
        return _bad_step(node, rank, now)
    return _exit_evidence(node, rank, now, kind, _how(kind, rank))


def _bad_step(node: str, rank: RankReport, now: float) -> Evidence:
    """All ranks refuse it with the same words, which say where it was found: that rank is named, whoever says it."""
    evidence = _exit_evidence(node, rank, now, BAD_STEP_KIND, "refused it")
    where = rank.bad_ranks[0] if rank.bad_ranks else rank.rank
    sentence = rank.why.partition(": ")[2] or rank.why  # without the exception's name
    node = node if where == rank.rank else ""
    return replace(evidence, why=sentence, node=node, rank=where, step=rank.bad_step, skips=rank.skips, tail=())  # a traceback says no more


def _exit_evidence(node: str, rank: RankReport, now: float, kind: str, how: str) -> Evidence:
    return Evidence(
        kind=kind,
        why=f"rank {rank.rank} on {node} {how} at step {rank.step}",
        node=node,
        rank=rank.rank,
        step=rank.step,
        detail=rank.why or how,
        seen_at=now,
        order=rank.exit_order or 0,
        tail=rank.tail,
    )


def _kind_of(rank: RankReport) -> str:
    kind = rank.kind or ("signal" if (rank.exit_code or 0) < 0 else "exit")
    return "abort" if kind == "signal" and rank.why == "SIGABRT" else kind


def _says_what_to_leave_out(rank: RankReport) -> bool:
    """A script may say anything."""
    try:
        return bool(skips.ranges(rank.skips))
    except ValueError:
        return False


def _how(kind: str, rank: RankReport) -> str:
    match kind:
        case "signal" | "abort":
            return f"was killed by {rank.why or f'signal {-(rank.exit_code or 0)}'}"
        case "oom":
            return f"was killed for want of memory ({rank.why})"
        case "exit":
            return f"ended with {rank.why or f'exit code {rank.exit_code}'}"
        case "peer-lost":
            return f"lost a peer ({rank.why})"
        case "lease" | "fenced" | "persister":
            return f"was stopped by its own agent ({rank.why})"
        case _ if kind == DAMAGED_KIND:
            return f"found a damaged checkpoint ({rank.why})"
        case _:
            return f"raised {rank.why}"


def phase_name(phase: int) -> str:
    return Phase(phase).name if phase in Phase._value2member_map_ else str(phase)


def _normalised(detail: str) -> str:
    """Without what differs from one occurrence to the next: addresses, pids, ports."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", detail.lower())
