"""What `keepstep trace` shows of a training: curves and findings on the terminal, one JSON document, one page, files for other tools."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keepstep.storage.errors import StorageError
from keepstep.storage.runlog import RunLog
from keepstep.storage.steps import read_steps
from keepstep.storage.store import Store
from keepstep.trainer.columns import Course, Evaluation, Steps
from keepstep.trainer.contract import EXIT_FAILED, EXIT_OK
from keepstep.trainer.course import read_course
from keepstep.trainer.diagnosis import diagnose, unjudged
from keepstep.trainer.findings import Finding, Severity, nothing_found

from .config import overridden
from .curves import AXIS, Line, chart, figure, lane
from .errors import InputError
from .roots import stored_config
from .sections import RunConfig
from .viewing import visit

if TYPE_CHECKING:
    from keepstep.trainer.ledger import Ledger

NARROWEST: Final = 40  # below that nothing could be read
_EVERY_STEP: Final = 2**62
WIDEST: Final = 140
PIPED: Final = 80  # where there is neither a terminal nor COLUMNS
TABLE: Final = 72  # narrower, and a table of attempts is all line breaks
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


def trace(root: str, wanted: Wanted) -> int:
    """The whole of the command; its exit code: 3 where the ledger was asked for and not proved. Raises InputError."""
    store, log = visit(root)
    config = overridden(stored_config(store), log.lineage.overrides)
    if wanted.ledger and config.train.script:
        raise InputError(
            f"{root}: --ledger: train.script = {config.train.script!r} trained here, and only keepstep's own trainer keeps one"
        )
    try:
        whole = replace(read_course(store, wanted.attempt or None), config=config)
    except (ValueError, StorageError) as error:
        raise InputError(f"{root}: {error}") from error
    _check_span(root, wanted, whole, log)
    ledger = _ledger(root, store, log, config) if wanted.ledger else None
    first, last = wanted.first, wanted.last or _EVERY_STEP
    course = whole.within(first, last)
    findings = [finding for finding in diagnose(whole) if first <= finding.since <= last]
    shown = _Shown(course=course, findings=findings, unjudged=unjudged(whole), ledger=ledger.sentence if ledger else "")
    written = _write(shown, wanted)
    if wanted.as_json:
        proof = {"proved": not ledger.problems, "samples": ledger.samples, "sentence": ledger.sentence} if ledger else None
        print(json.dumps(document(course, findings) | {"unjudged": shown.unjudged, "ledger": proof}))
    elif written:
        print("\n".join([*written, *([shown.ledger] if ledger else [])]))
    else:
        show(_console(), course, findings, shown.ledger, shown.unjudged)
    return EXIT_FAILED if ledger and ledger.problems else EXIT_OK


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """What is written, wherever it goes."""

    course: Course
    findings: Sequence[Finding]
    unjudged: Sequence[str]
    ledger: str


def _check_span(root: str, wanted: Wanted, whole: Course, log: RunLog) -> None:
    """Raises InputError where nothing would be shown."""
    if not len(whole.steps):
        script = whole.config.train.script
        own = f"; train.script = {script!r} trains here, and a script's steps are its own affair: only what it records itself is shown"
        damage = f"; its run log is damaged: {log.alarms[0]}" if log.alarms else ""
        raise InputError(f"{root}: no step was recorded yet{own if script else ''}{damage}")
    least, most = int(whole.steps.step[0]), int(whole.steps.step[-1])
    there = f"there are steps {least} to {most}"
    for option, value in (("--from", wanted.first), ("--to", wanted.last)):
        if value < 0:
            raise InputError(f"{option} {value}: a step is 1 or more; {there}")
    if wanted.last and wanted.first > wanted.last:
        raise InputError(f"--from {wanted.first} is behind --to {wanted.last}; {there}")
    if wanted.first > most:
        raise InputError(f"--from {wanted.first}: {there}")
    if wanted.last and wanted.last < least:
        raise InputError(f"--to {wanted.last}: {there}")
    if not len(whole.within(wanted.first, wanted.last or _EVERY_STEP).steps):
        raise InputError(f"--from {wanted.first} --to {wanted.last}: no step between these was recorded; {there}")


def _ledger(root: str, store: Store, log: RunLog, config: RunConfig) -> Ledger:
    """The newest history's; every sample of it is read again."""
    from keepstep.trainer.ledger import prove

    try:
        records = [step.record for step in log.lineage.history(read_steps(store))]
        return prove(store, config, records, skips=log.lineage.skips)
    except (ValueError, StorageError) as error:
        raise InputError(f"{root}: {error}") from error


def _write(shown: _Shown, wanted: Wanted) -> list[str]:
    """What was written, one sentence each."""
    if wanted.html and str(wanted.html) == "-":
        raise InputError("--html -: a page goes into a file; give its name, for example trace.html")
    ways = ((wanted.html, _write_html), (wanted.parquet, _write_parquet), (wanted.tensorboard, _write_tensorboard))
    return [_written(shown, target, way) for target, way in ways if target]


def _written(shown: _Shown, target: Path, way: Callable[[_Shown, Path], str]) -> str:
    try:
        return way(shown, target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {_reason(error)}") from error
    except (ValueError, ImportError) as error:
        raise InputError(str(error)) from error


def _reason(error: OSError) -> str:
    match error:
        case FileNotFoundError():
            return "no such folder"
        case IsADirectoryError():
            return "it is a folder"
        case NotADirectoryError() | FileExistsError():
            return "a file stands where a folder is needed"
        case _:
            return (error.strerror or str(error)).lower()


def _write_html(shown: _Shown, target: Path) -> str:
    from .tracepage import page

    target.write_text(page(shown.course, shown.findings, shown.ledger, shown.unjudged))
    return f"{target}: one page, {target.stat().st_size} bytes, opens without a network"


def _write_parquet(shown: _Shown, target: Path) -> str:
    from keepstep.trainer.exports import write_parquet

    write_parquet(shown.course, target)
    return f"{target}: {len(shown.course.steps) + len(shown.course.lost)} rows, one for each computed step"


def _write_tensorboard(shown: _Shown, target: Path) -> str:
    from keepstep.trainer.exports import write_tensorboard

    write_tensorboard(shown.course, target)
    return f"{target}: look with `tensorboard --logdir {target}`"


def _console() -> Console:
    console = Console(highlight=False)
    width = console.width if console.is_terminal or os.environ.get("COLUMNS", "").isdigit() else PIPED
    return Console(highlight=False, width=max(NARROWEST, min(WIDEST, width)))


# For people.


def show(console: Console, course: Course, findings: Sequence[Finding], ledger: str = "", unlooked: Sequence[str] = ()) -> None:
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
        for told in _attempts(course, console.width):
            console.print(told)
    console.print()
    if ledger:
        console.print(ledger, markup=False)
    if course.config.train.script:
        console.print(
            f"train.script = {course.config.train.script!r}: its steps are its own affair; this is what it recorded itself", markup=False
        )
    show_findings(console, findings, unlooked)


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


def _attempts(course: Course, width: int) -> Iterator[Table | Text]:
    """A table; where that would be all line breaks, a paragraph each."""
    table = Table("attempt", "ranks", "from", "steps", "lost", "why it ended", box=None, padding=(0, 2, 0, 0))
    for attempt in course.attempts:
        steps = f"{attempt.first_step}-{attempt.last_step}" if attempt.last_step else "none"
        source = "scratch" if attempt.resume_step < 0 else f"step {attempt.resume_step}"
        why = "; ".join(course.endings(attempt.attempt))
        if width < TABLE:
            lost = f", {attempt.lost_steps} lost" if attempt.lost_steps else ""
            yield Text(f"attempt {attempt.attempt} from {source}: steps {steps}{lost}{f'; {why}' if why else ''}")
        table.add_row(str(attempt.attempt), str(attempt.world_size), source, steps, str(attempt.lost_steps or ""), Text(why))
    if width >= TABLE:
        yield table


def show_findings(console: Console, findings: Sequence[Finding], unlooked: Sequence[str] = ()) -> None:
    if not findings:
        console.print(nothing_found(unlooked), style="" if unlooked else "green", markup=False)
    for finding in findings:
        where = f" in {', '.join(finding.layers[:3])}{' ...' if len(finding.layers) > 3 else ''}" if finding.layers else ""
        heading = f"{finding.severity.name}: {finding.name}, since step {finding.since}{where}"
        console.print(Text(heading, style=_STYLES[finding.severity]))
        for label, text in (("evidence", finding.evidence), ("remedy", finding.remedy)):
            grid = Table.grid(padding=(0, 1, 0, 0))
            grid.add_row(Text(f"  {label:<8}", style="dim"), Text(text))
            console.print(grid)
    for sentence in unlooked:
        console.print(Text(f"not looked at: {sentence}", style="dim"))


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
        "evaluations": [_evaluation_fields(evaluation) for evaluation in course.evaluations],
        "incidents": [asdict(incident) for incident in course.incidents],
        "findings": [described(finding) for finding in findings],
    }


def described(finding: Finding) -> dict[str, Any]:
    return asdict(finding) | {"severity": finding.severity.name.lower()}


def columns(steps: Steps) -> dict[str, list[Any]]:
    return {column.name: [_finite(value) for value in getattr(steps, column.name).tolist()] for column in fields(Steps)}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _evaluation_fields(evaluation: Evaluation) -> dict[str, Any]:
    fields = asdict(evaluation)
    others = fields.pop("others")
    return _plain(fields | others)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _finite(value) for name, value in values.items()}
