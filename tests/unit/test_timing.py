"""When what happened to an attempt: the machine's sentences and the nodes' own relative instants, on one clock."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import pytest
from machine_parts import rank, report

from keepstep.orchestrator import events as ev
from keepstep.orchestrator.ledger import Ledger, even_share, fold, settled, totals
from keepstep.orchestrator.machine import begin, step
from keepstep.orchestrator.policy import Policy
from keepstep.orchestrator.timing import Timekeeper, Timing
from keepstep.orchestrator.wire import AgentReport, RankReport

NODES = ("node0#a", "node1#b")
CHECKPOINT = ev.Checkpoint(step=20, directory="data/a000001/s000000020", manifest_sha256="sha")


class Told:
    """A coordinator without its shell: events in, what it writes out."""

    def __init__(self) -> None:
        self.run = begin(Policy(steps=100, nodes=2, ranks_per_node=1))
        self.times = Timekeeper()
        self.events: list[dict[str, Any]] = []
        self.sequence = 0

    def play(self, *events: ev.Event) -> None:
        for event in events:
            self.run, requests = step(self.run, event)
            for request in requests:
                if isinstance(request, ev.Say):
                    self.say(request)

    def say(self, said: ev.Say) -> None:
        beside = self.times.hear(said, self.run)
        at = datetime.fromtimestamp(1e9 + self.run.now, UTC).isoformat()
        self.events.append({"at": at, "term": 1, "at_s": self.run.now, **asdict(said), **beside})
        if again := self.times.recovered(said, self.run):
            self.say(again)

    def report(self, node: str, **fields: Any) -> AgentReport:
        self.sequence += 1
        return report(node, self.sequence, obeyed=self.run.revision, **fields)

    def told(self, kind: str) -> dict[str, Any]:
        return [event for event in self.events if event["kind"] == kind][-1]

    def launch(self, at: float, attempt: int, resume: ev.Checkpoint | None) -> None:
        record = ev.AttemptRecord(attempt=attempt, gang=NODES, world_size=2, nonce="n", resume=resume)
        self.play(ev.Found(at, resume), ev.Logged(at + 0.25, record))


def stepping(number: int, marks: tuple[float, ...], stepped_s: float, step: int, **fields: Any) -> RankReport:
    return rank(number, marks_s=marks, stepped_s=stepped_s, step=step, beats=step, **fields)


@pytest.fixture
def told() -> Told:
    """Two nodes whose clocks have nothing to do with ours; at 40 rank 1 dies, the verdict comes 0.25 s later."""
    told = Told()
    told.play(ev.Opened(at=0, term=1))
    told.play(*(ev.Reported(10.0, told.report(node)) for node in NODES))
    told.launch(10.5, 1, None)  # launched at 10.75
    first = (0.25, 0.5, 1.0, 1.25, 2.25)  # the order came at 11
    told.play(
        ev.Reported(14.0, told.report(NODES[0], attempt=1, ordered_s=3.0, ranks=(stepping(0, first, 2.25, 1),))),
        ev.Reported(14.0, told.report(NODES[1], attempt=1, ordered_s=3.0, ranks=(stepping(1, first, 2.25, 1),))),
    )
    saved = ev.Committed(at=30, attempt=1, step=20, directory=CHECKPOINT.directory, manifest_sha256="sha")
    told.play(saved)
    dead = {"exit_code": -9, "kind": "signal", "why": "SIGKILL", "ended_s": 29.0, "exit_order": 0, "stalled_s": 0.5}
    told.play(
        ev.Reported(39.8, told.report(NODES[0], attempt=1, ordered_s=28.8, ranks=(stepping(0, first, 28.5, 28),))),
        ev.Reported(40.25, told.report(NODES[1], attempt=1, ordered_s=29.25, ranks=(stepping(1, first, 28.5, 28, **dead),))),
    )
    stopped = {"exit_code": -9, "stopped_by_agent": True, "kind": "signal", "why": "SIGKILL", "exit_order": 0}
    told.play(
        ev.Reported(40.5, told.report(NODES[0], attempt=1, ordered_s=29.5, ranks=(stepping(0, first, 28.5, 28, **stopped),))),
        ev.Reported(40.5, told.report(NODES[1], attempt=1, ordered_s=29.5, ranks=(stepping(1, first, 28.5, 28, **dead),))),
    )
    return told


def test_the_timing_of_an_attempt_lies_on_the_coordinators_clock(told: Told) -> None:
    timing = Timing.from_fields(told.told("waiting")["timing"])
    assert (timing.launched, timing.forked, timing.joined, timing.built, timing.loaded) == (10.75, 11.25, 11.5, 12.0, 12.25)
    assert (timing.stepped, timing.last_step, timing.step, timing.stalled_s) == (13.25, 39.5, 28, 0.5)
    assert (timing.ended, timing.verdict, timing.is_orderly) == (40.0, 40.25, False)


def test_a_recovery_is_told_span_by_span_with_the_rank_that_came_last(told: Told) -> None:
    told.launch(41.0, 2, CHECKPOINT)
    slow, fast = (0.0625, 0.125, 0.25, 1.25, 1.5), (0.0625, 0.125, 0.25, 0.375, 1.5)  # ordered at 41.5
    told.play(
        ev.Reported(44.0, told.report(NODES[0], attempt=2, ordered_s=2.5, ranks=(stepping(0, slow, 1.5, 21),))),
        ev.Reported(44.0, told.report(NODES[1], attempt=2, ordered_s=2.5, ranks=(stepping(1, fast, 1.5, 21),))),
    )
    recovery = told.times.recovery
    assert recovery is not None
    before = {"detect": 0.25, "stop": 0.25, "wait": 0.0, "choose": 0.75, "fence": 0.0}
    after = {"launch": 0.3125, "join": 0.0625, "build": 0.125, "restore": 1.0, "step": 0.25}
    assert {span.name: span.seconds for span in recovery.spans} == before | after
    assert {span.name: span.rank for span in recovery.spans}["restore"] == 0
    assert recovery.seconds == pytest.approx(sum(span.seconds for span in recovery.spans))
    event = told.told("trains-again")
    assert event["why"] == (
        "attempt 2 trains again 3.00 s after rank 1 died: "
        "detect 0.25, stop 0.25, choose 0.75, launch 0.31, join 0.06, build 0.12, restore 1.00, step 0.25"
    )
    assert event["recovery"]["seconds"] == 3.0


def test_the_ledger_reads_what_the_timekeeper_writes(told: Told) -> None:
    ledger = Ledger()
    for event in told.events:
        ledger = fold(ledger, event)
    found = totals(settled(ledger, None, 40.5), {1: 20}, even_share)
    trained_s = 39.5 - 12.25 - 0.5
    assert found["wait"] == 10.0
    assert found["start"] == pytest.approx(12.25 - 10.0)
    assert found["stall"] == 0.5
    assert found["productive"] == pytest.approx(trained_s * 20 / 28)
    assert found["redone"] == pytest.approx(trained_s * 8 / 28 + 0.5)
    assert (found["detect"], found["stop"]) == (0.25, 0.25)


def test_a_script_that_marks_nothing_trains_from_its_launch_to_its_end() -> None:
    told = Told()
    told.run = begin(Policy(steps=100, nodes=2, ranks_per_node=1, needs_final_commit=False))
    told.play(ev.Opened(at=0, term=1))
    told.play(*(ev.Reported(10.0, told.report(node)) for node in NODES))
    told.launch(10.5, 1, None)
    silent = {"marks_s": (None,) * 5, "beats": 0, "step": 0, "phase": 0}
    told.play(
        *(ev.Reported(11.0, told.report(node, attempt=1, ordered_s=0.25, ranks=(rank(i, **silent),))) for i, node in enumerate(NODES))
    )
    dead = {**silent, "exit_code": 1, "kind": "exit", "why": "exit code 1", "ended_s": 49.25, "exit_order": 0}
    told.play(
        *(ev.Reported(60.5, told.report(node, attempt=1, ordered_s=49.75, ranks=(rank(i, **dead),))) for i, node in enumerate(NODES)),
        *(ev.Reported(60.5, told.report(node, attempt=1, ordered_s=49.75, ranks=(rank(i, **dead),))) for i, node in enumerate(NODES)),
    )
    ledger = Ledger()
    for event in told.events:
        ledger = fold(ledger, event)
    found = totals(settled(ledger, None, 60.5), {}, even_share)
    assert (found["productive"], found["redone"], found["detect"]) == (49.0, 0.0, 0.5)
