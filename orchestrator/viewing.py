"""What people ask of a run from outside: its status and its story; and the few things that they may tell it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from keepstep.storage.errors import StorageError
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store

from .archive import read_events
from .client import CoordinatorClient, CoordinatorRefused, CoordinatorUnreachable
from .errors import InputError
from .lines import event_line, time_table
from .roots import ENV_TOKEN, known_token
from .status import status_without_coordinator
from .wire import Message

FOLLOW_PERIOD_S = 0.5
PIPED_WIDTH = 400


def is_coordinator(where: str) -> bool:
    return where.startswith(("http://", "https://"))


def visit(root: str) -> tuple[Store, RunLog]:
    """A run from outside. Raises InputError where there is none."""
    try:
        store = Store.open(root)
        log = RunLog.open(store)
    except (ValueError, StorageError) as error:
        raise InputError(f"{root}: {error}") from error
    if not log.count:
        raise InputError(f"{root}: no run lives there; check the path, or start one with `keepstep run`")
    if log.newest_opened() is None:
        raise InputError(f"{root}: its run log is damaged, none of its records can be believed: {log.alarms[0] if log.alarms else ''}")
    return store, log


def coordinator_of(where: str) -> CoordinatorClient:
    """A client for a URL, or for the newest coordinator that a root's log names. Needs a running loop."""
    if is_coordinator(where):
        return CoordinatorClient(where, os.environ.get(ENV_TOKEN, ""))
    store, log = visit(where)
    opened = log.newest_opened()
    assert opened
    return CoordinatorClient(opened.url, known_token(store))


async def _call(where: str, method: str, path: str, message: Message | None, **params: str) -> bytes:
    try:
        async with coordinator_of(where) as client:
            if message is not None:
                return await client.send(path, message)
            return await (client.post(path, **params) if method == "POST" else client.get(path, **params))
    except CoordinatorRefused as error:
        raise InputError(str(error)) from error


def call(where: str, method: str, path: str, message: Message | None = None, **params: str) -> bytes:
    """The coordinator's answer. Raises InputError when it refuses, CoordinatorUnreachable when there is none.

    Args:
        message: what is posted, instead of parameters, where it may be longer than a URL.
    """
    return asyncio.run(_call(where, method, path, message, **params))


def post(where: str, path: str, **params: str) -> str:
    """Tells the coordinator something. Raises InputError when none is there to hear it."""
    try:
        return call(where, "POST", path, None, **params).decode()
    except CoordinatorUnreachable as error:
        raise InputError(f"{where}: no coordinator answers ({error}); start one with `keepstep run` or `keepstep coordinator`") from error


def read_status(where: str) -> dict[str, Any]:
    """From the coordinator, or, while none answers, what the run log says."""
    try:
        status: dict[str, Any] = json.loads(call(where, "GET", "/v1/status"))
    except CoordinatorUnreachable as error:
        if is_coordinator(where):
            raise InputError(f"{where}: {error}") from error
        return status_without_coordinator(*visit(where))
    return status


def print_status(where: str, *, as_json: bool) -> None:
    status = read_status(where)
    if as_json:
        print(json.dumps(status))
        return
    console = open_console()
    console.print(f"{status['run']}: {status['phase']}: {status['why']}", markup=False)
    console.print(f"attempt {status['attempt']}, step {status['step']}/{status['steps']}, {status['world_size']} ranks", markup=False)
    if changes := _changes(status):
        console.print(changes, markup=False)
    if trouble := status["degraded"]:
        console.print(f"DEGRADED for {trouble['since_s']:.0f} s: {trouble['why']}", markup=False)
    commit, share = status["last_commit"], status["goodput"]
    console.print(f"last commit: step {commit['step']}, {commit['age_s']:.0f} s ago" if commit else "no commit yet")
    console.print(f"goodput {100 * share['ratio']:.1f} %, steps computed again {share['lost_steps']}")
    if recovery := status["recovery"]:
        console.print(f"last recovery: {recovery['why']}", markup=False)
    for line in time_table(share["seconds"]):
        console.print(line, markup=False)
    if status["nodes"]:
        console.print(_node_table(status["nodes"]))


def _changes(status: Mapping[str, Any]) -> str:
    """What rewinds have brought; "" where there were none."""
    left_out = f"without the samples at {', '.join(status['skips'])}" if status["skips"] else ""
    changed = f"with {', '.join(status['overrides'])}" if status["overrides"] else ""
    number = f"{status['rewinds']} time{'s' if status['rewinds'] > 1 else ''} for a bad step" if status["rewinds"] else ""
    told = ", ".join(filter(None, (left_out, changed, number)))
    return f"rewound: {told}" if told else ""


def open_console() -> Console:
    """As wide as the terminal; where there is none, as wide as what is printed: a script that reads it must not find "..."."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPED_WIDTH)


def _node_table(nodes: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("node", "state", "pid", "ranks (pid, phase, step)")
    for node in nodes:
        ranks = ", ".join(f"{rank['rank']} ({rank['pid']}, {rank['phase']}, {rank['step']})" for rank in node["ranks"])
        table.add_row(node["id"], node["state"], str(node["pid"]), ranks)
    return table


def print_events(where: str, *, as_json: bool, follow: bool) -> None:
    store, log = visit(where)
    shown = read_events(store)
    if as_json and not follow:
        print(json.dumps(shown))
        return
    show = json.dumps if as_json else event_line
    for event in shown:
        print(show(event), flush=True)
    while follow and log.lineage.outcome is None:
        time.sleep(FOLLOW_PERIOD_S)
        log.refresh()
        for event in (events := read_events(store))[len(shown) :]:
            print(show(event), flush=True)
        shown = events
