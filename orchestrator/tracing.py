"""What `keepstep trace` shows of a training: curves and findings on the terminal, one JSON document, one page, files for other tools."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keepstep.storage.errors import StorageError
from keepstep.storage.runlog import RunLog
from keepstep.storage.steps import read_steps
from keepstep.storage.store import Store
from keepstep.trainer.columns import Course, Steps
from keepstep.trainer.course import read_course
from keepstep.trainer.diagnosis import diagnose
from keepstep.trainer.findings import Finding, Severity

from .config import overridden
from .curves import AXIS, Line, chart, figure, lane
from .errors import InputError
from .roots import stored_config
from .sections import RunConfig
from .viewing import visit

NARROWEST: Final = 40  # below that nothing could be read
_EVERY_STEP: Final = 2**62
WIDEST: Final = 140
PIPED: Final = 100  # where there is no terminal
CURVES: Final = (("gradient norm", "grad_norm"), ("update ratio", "update_ratio"), ("learning rate", "lr"), ("tokens/s", "tokens_per_s"))
_STYLES: Final = {Severity.NOTE: "cyan", Severity.WARNING: "yellow", Severity.CRITICAL: "bold red"}
_TRAIN, _HELD_OUT, _LOST = "bright_blue", "bright_yellow", "red"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the command line asks for. 0: the newest attempt, from the first step, to the last one."""

    attempt: int = 0
    first: int = 0
    last: int = 0
    ledger: bool = False
    html: Path | None = None
    parquet: Path | None = None
    tensorboard: Path | None = None
    as_json: bool = False


def trace(root: str, wanted: Wanted) -> None:
    """The whole of the command. Raises InputError."""
    store, log = visit(root)
    config = overridden(stored_config(store), log.lineage.overrides)
    try:
        whole = replace(read_course(store, wanted.attempt or None), config=config)
        ledger = _ledger(store, log, config) if wanted.ledger else ""
    except (ValueError, StorageError) as error:
        raise InputError(f"{root}: {error}") from error
    first, last = wanted.first, wanted.last or _EVERY_STEP
    course = whole.within(first, last)
    if not len(course.steps):
        raise InputError(f"{root}: no step was recorded{' between these' if wanted.first or wanted.last else ' yet'}")
    findings = [finding for finding in diagnose(whole) if first <= finding.since <= last]
    written = _write(course, findings, ledger, wanted)
    if wanted.as_json:
        print(json.dumps(document(course, findings) | {"ledger": ledger or None}))
    elif written:
        print("\n".join([*written, *([ledger] if ledger else [])]))
    else:
        show(_console(), course, findings, ledger)


def _ledger(store: Store, log: RunLog, config: RunConfig) -> str:
    """The newest history's; every sample of it is read again."""
    from keepstep.trainer.ledger import prove

    records = [step.record for step in log.lineage.history(read_steps(store))]
    return prove(store, config, records, skips=log.lineage.skips).sentence


def _write(course: Course, findings: Sequence[Finding], ledger: str, wanted: Wanted) -> list[str]:
    """What was written, one sentence each."""
    written = []
    try:
        if wanted.html:
            from .tracepage import page

            wanted.html.write_text(page(course, findings, ledger))
            written.append(f"{wanted.html}: one page, {wanted.html.stat().st_size} bytes, opens without a network")
        if wanted.parquet or wanted.tensorboard:
            from keepstep.trainer.exports import write_parquet, write_tensorboard

            if wanted.parquet:
                write_parquet(course, wanted.parquet)
                written.append(f"{wanted.parquet}: {len(course.steps) + len(course.lost)} rows, one for each computed step")
            if wanted.tensorboard:
                write_tensorboard(course, wanted.tensorboard)
                written.append(f"{wanted.tensorboard}: look with `tensorboard --logdir {wanted.tensorboard}`")
    except (OSError, ValueError, ImportError) as error:
        raise InputError(str(error)) from error
    return written


def _console() -> Console:
    console = Console(highlight=False)
    width = console.width if console.is_terminal else PIPED
    return Console(highlight=False, width=max(NARROWEST, min(WIDEST, width)))


# For people.


def show(console: Console, course: Course, findings: Sequence[Finding], ledger: str = "") -> None:
    """Curves, attempts and lost work, findings; as wide as the console."""
    for line in headline(course):
        console.print(line, markup=False)
    first, last = span_of(course)
    size: dict[str, Any] = {"width": console.width, "ascii_only": not console.encoding.lower().startswith("utf")}
    for row in chart(*_loss(course, "o" if size["ascii_only"] else "●"), first, last, height=10, **size):
        console.print(row)
    for title, name in CURVES:
        values = getattr(course.steps, name)
        heading = Text(title, style="bold") + Text(_from_to(values), style="dim")
        for row in chart(heading, [Line(x=course.steps.step, y=values, style=_TRAIN)], first, last, height=4, **size):
            console.print(row)
    for row in _lanes(course, first, last, **size):
        console.print(row)
    if len(course.attempts) > 1:
        console.print(_attempts(course))
    console.print()
    if ledger:
        console.print(ledger, markup=False)
    show_findings(console, findings)


def headline(course: Course) -> list[str]:
    steps, lost = course.steps, len(course.lost)
    state = course.outcome or "not over"
    counted = f"steps {steps.step[0]} to {steps.step[-1]} of {course.config.run.steps} ({state})"
    again = f"{lost} computed again or given up" if lost else "none computed again"
    epochs = f", {course.epochs:.2f} epochs" if course.epochs else ""
    attempts = "1 attempt" if len(course.attempts) == 1 else f"{len(course.attempts)} attempts"
    lines = [f"{course.run}: {counted}, {attempts}, {again}{epochs}"]
    if course.evaluations:
        newest = course.evaluations[-1]
        lines.append(f"held-out loss {newest.nats:.4f} nats per token, perplexity {figure(newest.perplexity)}, at step {newest.step}")
    return lines


def span_of(course: Course) -> tuple[int, int]:
    """First and last step that anything is drawn of."""
    everything = np.concatenate([course.steps.step, course.lost.step])
    return int(everything.min()), int(everything.max())


def _loss(course: Course, mark: str) -> tuple[Text, list[Line]]:
    title = Text("loss", style="bold") + Text(_from_to(course.steps.loss), style="dim") + Text("  train", style=_TRAIN)
    lines = [
        Line(x=part.step, y=part.loss, style=_LOST)
        for part in (course.lost.where(course.lost.attempt == a) for a in np.unique(course.lost.attempt))
    ]
    lines.append(Line(x=course.steps.step, y=course.steps.loss, style=_TRAIN))
    if course.evaluations:
        title += Text(f"  held-out {mark}", style=_HELD_OUT)
        nats = np.array([evaluation.nats for evaluation in course.evaluations])
        lines.append(Line(x=np.array([e.step for e in course.evaluations]), y=nats, style=_HELD_OUT, is_dotted=True))
    if len(course.lost):
        title += Text("  lost", style=_LOST)
    return title, lines


def _from_to(values: Any) -> str:
    known = values[np.isfinite(values)]
    return f"  {figure(float(known[0]))} to {figure(float(known[-1]))}" if len(known) else ""


def _lanes(course: Course, first: int, last: int, *, width: int, ascii_only: bool) -> list[Text]:
    """Below the curves: which attempt computed what, what was lost, and the steps' numbers."""
    steps = course.steps
    line, gone, ends = ("-", "x", "|") if ascii_only else ("─", "▒", "│")
    kept = [(a.attempt, steps.step[steps.attempt == a.attempt]) for a in course.attempts]
    spans = [(int(part.min()), int(part.max()), line, f"{ends}{attempt}") for attempt, part in kept if len(part)]
    rows = [lane("attempt", spans, first, last, width=width)]
    if len(course.lost):
        lost = [course.lost.step[course.lost.attempt == a] for a in np.unique(course.lost.attempt)]
        rows.append(lane("lost", [(int(part.min()), int(part.max()), gone, "") for part in lost], first, last, width=width))
    right = f"{last}".rjust(width - AXIS - len(f"{first}"))
    return [*rows, Text(f"{'step':>{AXIS - 1}} {first}{right}", style="dim")]


def _attempts(course: Course) -> Table:
    table = Table("attempt", "ranks", "from", "steps", "lost", "why it ended", box=None, padding=(0, 2, 0, 0))
    for attempt in course.attempts:
        ended = [incident.why for incident in course.incidents if incident.kind == "failure" and incident.attempt == attempt.attempt]
        steps = f"{attempt.first_step}-{attempt.last_step}" if attempt.last_step else "none"
        source = "scratch" if attempt.resume_step < 0 else f"step {attempt.resume_step}"
        why = Text(ended[-1] if ended else "")
        table.add_row(str(attempt.attempt), str(attempt.world_size), source, steps, str(attempt.lost_steps or ""), why)
    return table


def show_findings(console: Console, findings: Sequence[Finding]) -> None:
    if not findings:
        console.print("no findings: every rule was looked at, none applies", style="green")
        return
    for finding in findings:
        where = f" in {', '.join(finding.layers[:3])}{' ...' if len(finding.layers) > 3 else ''}" if finding.layers else ""
        heading = f"{finding.severity.name}: {finding.name}, since step {finding.since}{where}"
        console.print(Text(heading, style=_STYLES[finding.severity]))
        for label, text in (("evidence", finding.evidence), ("remedy", finding.remedy)):
            grid = Table.grid(padding=(0, 1, 0, 0))
            grid.add_row(Text(f"  {label:<8}", style="dim"), Text(text))
            console.print(grid)


# For scripts.


def document(course: Course, findings: Sequence[Finding]) -> dict[str, Any]:
    """Of `keepstep trace --json`; null where a number is unknown. Layer statistics go to Parquet."""
    first, last = span_of(course)
    return {
        "run": course.run,
        "root": course.root,
        "outcome": course.outcome or None,
        "first_step": first,
        "last_step": last,
        "epochs": course.epochs,
        "steps": columns(course.steps),
        "lost": columns(course.lost),
        "attempts": [asdict(attempt) for attempt in course.attempts],
        "evaluations": [_plain(asdict(evaluation)) for evaluation in course.evaluations],
        "incidents": [asdict(incident) for incident in course.incidents],
        "findings": [described(finding) for finding in findings],
    }


def described(finding: Finding) -> dict[str, Any]:
    return asdict(finding) | {"severity": finding.severity.name.lower()}


def columns(steps: Steps) -> dict[str, list[Any]]:
    return {column.name: [_finite(value) for value in getattr(steps, column.name).tolist()] for column in fields(Steps)}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _finite(value) for name, value in values.items()}
