"""All benchmarks, one after the other, and at the end one table: every target with its result beside it.

    python benchmarks/bench.py                  make bench: results/*.json and results/summary.md, under 45 minutes
    python benchmarks/bench.py --quick          make bench-quick: fewer rounds, figures to look at; nothing below results/ changes; under 5
    python benchmarks/bench.py --only recovery storage
    python benchmarks/bench.py --show           the table of what lies in results/, nothing is run

A script that breaks or overruns is named in the table with its last lines, and the exit code is 1. A target that is missed is a result,
not a failure: the exit code stays 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from common import ENV_OUT, HERE, RESULTS, Verdict, machine, parser
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

LOGS: Final = HERE.parent / ".build" / "bench"
PATIENCE: Final = 3.0  # times the expected minutes, then a script has overrun
LEAVE_S: Final = 20.0  # to end what it started, after SIGINT
LAST_LINES: Final = 6
MARKS: Final = {True: "met", False: "MISSED", None: "-"}
BROKE: Final = "BROKE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """One benchmark of the suite."""

    name: str
    minutes: float  # that it takes in a full run of the suite, on 2 cores
    options: tuple[str, ...] = ()  # in a full run; what takes longer by itself is there in short form
    quick_s: float = 0.0  # seconds that --quick takes; 0: not part of a quick run


SHORT: Final = ("--quick",)
OURS: Final = ("--rounds", "2", "--only", "keepstep-2x2", "keepstep-hot-2x2", "keepstep-1x4")  # torchrun is one of the peers
SUITE: Final = (
    Script(name="recovery", minutes=3.3, options=OURS, quick_s=35),
    Script(name="nodes", minutes=2.8, quick_s=55),
    Script(name="peers", minutes=11, options=("--rounds", "1")),
    Script(name="throughput", minutes=3.4),
    Script(name="storage", minutes=1.5, quick_s=40),
    Script(name="storage_s3", minutes=2.2, quick_s=55),
    Script(name="slowdown", minutes=1.8, quick_s=35),
    Script(name="goodput", minutes=2.7),
    Script(name="interval", minutes=4.7),
    Script(name="coordinator_scale", minutes=2.1, quick_s=50),
    Script(name="runlog", minutes=2.1, quick_s=15),
    Script(name="s3_clients", minutes=0.4, options=SHORT),
    Script(name="exact_reduction", minutes=0.5, options=SHORT),
    Script(name="layers", minutes=0.3, options=SHORT),
    Script(name="bad_steps", minutes=0.6, options=SHORT),
    Script(name="data", minutes=0.1, options=SHORT),
    Script(name="prepare", minutes=0.7, options=("--rounds", "3", "--megabytes", "4"), quick_s=14),
    Script(name="models", minutes=1.0, options=SHORT),
    Script(name="false_alarms", minutes=0.9, options=SHORT),
    Script(name="faults", minutes=0.5, options=SHORT),
    Script(name="preemption", minutes=1.2, options=SHORT),
    Script(name="coordinator_kills", minutes=0.8, options=SHORT),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one script."""

    name: str
    verdicts: tuple[Verdict, ...] = ()
    date: str = ""
    broke: str = ""  # how it ended, and its last lines; "": it ended well
    minutes: float = 0.0


def read(path: Path) -> Outcome:
    """What a script published; nothing of it where its results are of another form."""
    document: Mapping[str, Any] = json.loads(path.read_text())
    verdicts = tuple(Verdict(**each) for each in document.get("verdicts", ()))
    return Outcome(name=path.stem, verdicts=verdicts, date=document.get("date", ""))


def run(script: Script, *, quick: bool, out: Path) -> Outcome:
    """Runs one script to its end, however that is."""
    expected_s = (quick and script.quick_s) or 60 * script.minutes
    command = [sys.executable, str(HERE / f"{script.name}.py"), *(SHORT if quick else script.options)]
    log, result = LOGS / f"{script.name}.log", out / f"{script.name}.json"
    result_before = result.stat().st_mtime_ns if result.exists() else 0
    began = time.monotonic()
    with log.open("wb") as output:
        environment = {**os.environ, ENV_OUT: str(out)}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            code: int | None = process.wait(PATIENCE * expected_s + 30)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    minutes = (time.monotonic() - began) / 60
    fresh = result.exists() and result.stat().st_mtime_ns > result_before
    found = read(result) if fresh else Outcome(name=script.name)
    how = {None: f"overran {minutes:.0f} minutes", 0: "" if fresh else "published nothing"}.get(code, f"exit code {code}")
    broke = f"{how}\n{last_lines(log.read_text(errors='replace'))}" if how else ""
    return Outcome(name=script.name, verdicts=found.verdicts, date=found.date, broke=broke, minutes=minutes)


def end(process: subprocess.Popen[bytes]) -> None:
    """By Ctrl-C first: a benchmark ends what it started."""
    for signal_ in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.killpg(process.pid, signal_)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LEAVE_S)


def last_lines(log: str) -> str:
    return "\n".join(line[:160] for line in log.splitlines()[-LAST_LINES:])


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """Targets and results of all scripts; those that broke last, with their last lines."""
    table = Table("script", "what", "target", "result", "", "note", title="Targets and results", title_justify="left")
    for outcome in outcomes:
        for each in outcome.verdicts:
            table.add_row(outcome.name, each.what, each.target, each.result, MARKS[each.met], each.note)
        if outcome.verdicts:
            table.add_section()
    for outcome in broken(outcomes):
        table.add_row(outcome.name, "", "", outcome.broke, BROKE, f"whole output: {(LOGS / outcome.name).relative_to(HERE.parent)}.log")
    return table


def broken(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.broke]


def count(outcomes: Sequence[Outcome]) -> str:
    """ "31 targets: 25 met, 4 missed, 2 not measured; 1 script broke" """
    met = [each.met for outcome in outcomes for each in outcome.verdicts]
    sentence = f"{len(met)} targets: {met.count(True)} met, {met.count(False)} missed, {met.count(None)} not measured"
    return f"{sentence}; {len(broken(outcomes))} scripts broke" if broken(outcomes) else sentence


def markdown(outcomes: Sequence[Outcome], on: Mapping[str, Any]) -> str:
    """The same table for a README: what was missed and why below it."""
    dates = sorted({outcome.date for outcome in outcomes if outcome.date})
    rows, notes = list[str](), list[str]()
    for outcome in outcomes:
        for each in outcome.verdicts:
            rows.append(f"| {each.what} | {each.target} | {each.result} | {MARKS[each.met]} | [{outcome.name}.py](../{outcome.name}.py) |")
            if each.note:
                notes.append(f"* {each.what}: {each.note}")
        if outcome.broke:
            rows.append(f"| {outcome.name}.py | | {outcome.broke.splitlines()[0]} | {BROKE} | |")
    where = f"{on['cores']} cores, {on['cpu']}, torch {on.get('torch', '')}, {' to '.join(dict.fromkeys((*dates[:1], *dates[-1:])))}."
    head = ["| what | target | result | | script |", "|---|---|---|---|---|"]
    return "\n".join(["# Targets and results", "", where, "", *head, *rows, "", *notes]).rstrip() + "\n"


def run_all(scripts: Sequence[Script], *, quick: bool, out: Path) -> list[Outcome]:
    """Shows where it is and how long it will take."""
    expected = {script.name: (quick and script.quick_s / 60) or script.minutes for script in scripts}
    outcomes = []
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("of about {task.fields[all]:.0f} min"))
    with bar:
        task = bar.add_task("", total=sum(expected.values()), all=sum(expected.values()))
        for number, script in enumerate(scripts, start=1):
            name = script.name
            bar.update(task, description=f"{number} of {len(scripts)}: {name}, about {expected[name]:.1f} min")
            outcomes.append(outcome := run(script, quick=quick, out=out))
            bar.advance(task, expected[name])
            told = outcome.broke.partition("\n")[0] or count([outcome])
            bar.console.print(f"{name}: {outcome.minutes:.1f} min, {told}", highlight=False)
    return outcomes


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--only", nargs="+", choices=[script.name for script in SUITE], help="these scripts alone")
    made.add_argument("--show", action="store_true", help="the table of what lies in results/")
    options = made.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    out = LOGS if options.quick else RESULTS
    chosen = [script for script in SUITE if (script.name in options.only if options.only else script.quick_s or not options.quick)]
    if options.show:
        outcomes = [read(path) for script in chosen if (path := out / f"{script.name}.json").exists()]
    else:
        began_on = machine()
        outcomes = run_all(chosen, quick=options.quick, out=out)
        (out / "summary.md").write_text(markdown(outcomes, began_on))
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table_of(outcomes))
    console.print(count(outcomes), highlight=False)
    return 1 if broken(outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
