"""Reports and runs for the machine's unit tests."""

from __future__ import annotations

from typing import Any

from keepstep.orchestrator import events as ev
from keepstep.orchestrator.machine import Run, begin, step
from keepstep.orchestrator.policy import Policy
from keepstep.orchestrator.wire import AgentReport, RankReport
from keepstep.trainer.contract import Phase


def rank(number: int, **fields: Any) -> RankReport:
    """A running rank unless `exit_code` is given."""
    state = "exited" if "exit_code" in fields else "running"
    return RankReport(**({"rank": number, "local_rank": 0, "pid": 1, "state": state, "phase": Phase.STEP, "step": 5, "beats": 6} | fields))


def report(node: str, sequence: int = 1, **fields: Any) -> AgentReport:
    host = node.partition("#")[0]
    return AgentReport(
        **({"node": node, "host": host, "pid": 1, "address": host, "slots": 0, "sequence": sequence, "term": 1, "ready": True} | fields)
    )


def play(run: Run, *events: ev.Event) -> tuple[Run, tuple[ev.Request, ...]]:
    """The run after the events, and the last one's requests."""
    requests: tuple[ev.Request, ...] = ()
    for event in events:
        run, requests = step(run, event)
    return run, requests


def starting(nodes: tuple[str, ...] = ("node0#a", "node1#b"), **options: Any) -> Run:
    """A run whose first attempt is being launched."""
    run = begin(Policy(**({"steps": 100, "nodes": len(nodes)} | options)))
    opened = (ev.Opened(at=0, term=1), *(ev.Reported(0.1, report(node)) for node in nodes), ev.Found(0.2, None))
    record = ev.AttemptRecord(attempt=1, gang=nodes, world_size=len(nodes), nonce="n", resume=None)
    return play(run, *opened, ev.Logged(0.3, record))[0]
