"""What a chaos found out: one line per fault, what must hold for the run as a whole, and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from keepstep.storage.steps import read_steps
from keepstep.storage.store import Store
from keepstep.trainer.contract import EXIT_OK

from . import faultplan, faultverdict
from .archive import read_result
from .conducting import Conductor
from .faultkinds import Fault
from .faultverdict import Event, History, Judgement
from .processes import command_line
from .viewing import open_console


@dataclass(frozen=True, slots=True)
class Check:
    """Something that must hold, and what was found."""

    what: str
    holds: bool
    found: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    judgements: tuple[Judgement, ...]
    redone: tuple[int, ...]  # steps that each fault cost
    checks: tuple[Check, ...]
    lost_steps: int
    goodput: float
    root: str

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.checks)


def report_of(
    conductor: Conductor,
    events: Sequence[Event],
    store: Store,
    *,
    undisturbed: History,
    broken: History,
    exit_code: int,
    orphans: Sequence[int],
) -> Report:
    judgements = faultverdict.judge(conductor.episodes, events)
    result = read_result(store) or {"why": "there is no result.json", "lost_steps": 0, "goodput": 0.0}
    checks = (
        Check("the run succeeded", exit_code == EXIT_OK, f"exit code {exit_code}: {result['why']}"),
        _all_inflicted(conductor),
        _all_right(judgements),
        _no_false_alarms(faultverdict.false_alarms(judgements, events)),
        _same_history(broken, undisturbed),
        Check("no orphans", not orphans, "; ".join(f"{pid} {command_line(pid)}" for pid in orphans) or "no process is left"),
    )
    return Report(
        judgements=judgements,
        redone=faultverdict.redone([judgement.episode for judgement in judgements], _lost_by_attempt(store)),
        checks=checks,
        lost_steps=result["lost_steps"],
        goodput=result["goodput"],
        root=store.name,
    )


def _all_inflicted(conductor: Conductor) -> Check:
    missing = [*conductor.failed, *(f"{fault} at {fault.moment}: the run was over before" for fault in conductor.left)]
    return Check("every fault was inflicted", not missing, "; ".join(missing) or f"{len(conductor.episodes)} faults")


def _all_right(judgements: Sequence[Judgement]) -> Check:
    wrong = [f"{judgement.episode.fault}: {judgement.wrong}" for judgement in judgements if judgement.wrong]
    return Check("every verdict is right", not wrong, "; ".join(wrong) or f"{len(judgements)} of {len(judgements)}")


def _no_false_alarms(found: Sequence[str]) -> Check:
    return Check("no false alarms", not found, "; ".join(found) or "every failure was inflicted")


def _same_history(broken: History, undisturbed: History) -> Check:
    if not undisturbed.losses and undisturbed.state_sha256 is None:
        return Check("the history is the undisturbed one", True, "the script keeps its own history: nothing to compare")
    difference = faultverdict.difference(broken, undisturbed)
    same = f"{len(broken.losses)} losses equal to the last bit, state sha256 {broken.state_sha256}"
    return Check("the history is the undisturbed one", not difference, difference or same)


def _lost_by_attempt(store: Store) -> dict[int, int]:
    """Attempt -> steps that it computed and that another attempt had to compute again."""
    from keepstep.storage.runlog import RunLog

    records = read_steps(store)
    kept = [step.attempt for step in RunLog.open(store).lineage.history(records)]
    return {attempt: len(steps) - kept.count(attempt) for attempt, steps in records.items()}


# For people, and for scripts.


def print_plan(console: Console, seed: int, faults: Sequence[Fault]) -> None:
    table = Table("#", "when", "fault", "what that is", title=f"{len(faults)} faults of seed {seed}", title_justify="left")
    for row in faultplan.table(faults):
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)


def print_report(report: Report, *, reused: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps(document(report, reused=reused)))
        return
    console = open_console()
    console.print(_table(report))
    for check in report.checks:
        console.print(f"{'ok   ' if check.holds else 'WRONG'} {check.what}: {check.found}", markup=False)
    console.print(f"lost steps {report.lost_steps}, goodput {100 * report.goodput:.1f} %; root: {report.root}", markup=False)
    console.print("chaos: everything held" if report.holds else "chaos: NOT everything held")


def _table(report: Report) -> Table:
    table = Table("fault", "at step", "noticed s", "steps again s", "redone", "verdict", "said")
    for row in _rows(report):
        verdict = row["wrong"] or "right"
        table.add_row(
            row["fault"], str(row["step"]), _seconds(row["noticed_s"]), _seconds(row["stepped_s"]), str(row["redone"]), verdict, row["said"]
        )
    return table


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _rows(report: Report) -> Iterator[dict[str, Any]]:
    for judgement, redone in zip(report.judgements, report.redone, strict=True):
        episode = judgement.episode
        yield {
            "fault": str(episode.fault),
            "kind": episode.fault.kind.name,
            "node": episode.node,
            "rank": episode.rank,
            "step": episode.step,
            "noticed_s": judgement.noticed_s,
            "stepped_s": judgement.stepped_s,
            "redone": redone,
            "said": judgement.said,
            "right": not judgement.wrong,
            "wrong": judgement.wrong,
        }


def document(report: Report, *, reused: bool) -> dict[str, Any]:
    """Of `keepstep chaos --json`."""
    return {
        "holds": report.holds,
        "faults": list(_rows(report)),
        "checks": [{"what": check.what, "holds": check.holds, "found": check.found} for check in report.checks],
        "lost_steps": report.lost_steps,
        "goodput": report.goodput,
        "undisturbed_reused": reused,
        "root": report.root,
    }
