"""One rank as its agent sees it: how far it is, how it ended, and what is reported of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepstep.trainer.contract import Phase

from . import stacks
from .exits import Exit
from .patience import Watch
from .progress import ProgressPage
from .stacks import Stacks
from .wire import RankReport

REMARKABLE = "TtD"  # states of a process: stopped, traced, in uninterruptible sleep


@dataclass(frozen=True, slots=True)
class Pace:
    """What makes a report worth sending."""

    phase: Phase
    step: int
    is_overdue: bool  # silent for longer than its agent expects


@dataclass(slots=True, kw_only=True)
class LocalRank:
    number: int
    pid: int
    page: ProgressPage
    watch: Watch
    log: Path
    log_start: int  # bytes that were in the log before
    answers: Path
    stacks: Stacks | None = None
    process: str = ""  # its state when its stacks were taken: what comes afterwards is our doing
    tail: tuple[str, ...] = ()
    exit: Exit | None = None
    ended_at: float = 0.0
    order: int | None = None
    stopped: bool = False
    blame: tuple[str, str] | None = None  # kind and reason, when the agent knows better than the exit code


def autopsy_text(rank: LocalRank, node: str) -> str:
    seen, silence = rank.page.read(), rank.watch.silence
    expected = f", {silence.limit_s:g} s were expected at most" if silence.limit_s else ""
    quiet = f"silent for {silence.quiet_s:.1f} s{expected}"
    where = f"rank {rank.number} on {node}: phase {seen.phase.name} at step {seen.step}, {quiet}, collective {seen.collective}"
    return f"{where}\n{rank.stacks.text if rank.stacks else ''}\n"


def look(rank: LocalRank, now: float) -> Pace:
    seen = rank.page.read()
    is_overdue = rank.exit is None and rank.watch.look(seen, now).is_too_long
    return Pace(seen.phase, seen.step, is_overdue)


def _since(ordered_at: float, at: float) -> float | None:
    """None for what has not happened."""
    return round(at - ordered_at, 4) if at else None


def report(rank: LocalRank, local_rank: int, step_s: float, ordered_at: float) -> RankReport:
    seen, silence = rank.page.read(), rank.watch.silence
    common = {"rank": rank.number, "local_rank": local_rank, "pid": rank.pid}
    pace = {
        "phase": int(seen.phase),
        "step": seen.step,
        "beats": seen.beats,
        "quiet_s": silence.quiet_s,
        "limit_s": silence.limit_s,
        "step_s": round(step_s, 4),
        "collective": seen.collective,
        "pulse_s": round(max(0.0, time.monotonic() - seen.pulse_at), 3) if seen.pulse_at else -1.0,
        "marks_s": tuple(_since(ordered_at, at) for at in rank.page.marks()),
        "stepped_s": _since(ordered_at, seen.stepped_at),
        "stalled_s": round(seen.stalled_s, 4),
        "costs": rank.page.costs(),
        "stands_by": rank.page.stands_by,
        "ended_s": _since(ordered_at, rank.ended_at),
    }
    process = rank.process or (stacks.state(rank.pid) if rank.exit is None else "")
    stood: dict[str, Any] = {"process": process if process in REMARKABLE else ""}
    if rank.stacks:
        stood |= {"where": rank.stacks.where, "waits": rank.stacks.waits}
    if rank.exit is None:
        return RankReport(**common, **pace, **stood, state="running")
    kind, why = rank.blame or (rank.exit.kind, rank.exit.why)
    return RankReport(
        **common,
        **pace,
        **stood,
        state="exited",
        exit_code=rank.exit.exit_code,
        exit_order=rank.order,
        stopped_by_agent=rank.stopped and rank.blame is None,
        kind=kind,
        why=why,
        damaged=rank.exit.damaged,
        bad_step=rank.exit.bad_step,
        bad_ranks=rank.exit.bad_ranks,
        skips=rank.exit.skips,
        tail=rank.tail,
    )
