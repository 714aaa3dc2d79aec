"""`keepstep run --demo`: breaks a run on purpose, twice, and says how long it stood still and whether the bits stayed the same."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

from keepstep.storage.errors import StorageError
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store

from .archive import read_steps
from .client import CoordinatorClient, CoordinatorRefused, CoordinatorUnreachable
from .errors import InputError
from .roots import known_token

POLL_S = 0.02
RANK_DIES_AT = 0.35  # of the run's steps
NODE_DIES_AT = 0.7

Say = Callable[[str], None]
Status = Mapping[str, Any]


async def break_things(store: Store, steps: int, say: Say) -> None:
    """Kills one rank, later one whole node. Ends by itself; the caller cancels it when the run is over."""
    await _break(store, int(steps * RANK_DIES_AT), say, _kill_last_rank)
    await _break(store, int(steps * NODE_DIES_AT), say, _kill_last_node)


async def _break(store: Store, at_step: int, say: Say, kill: Callable[[Status, Say], None]) -> None:
    status = await _status_when(store, lambda status: status["phase"] == "TRAINING" and status["step"] >= at_step)
    kill(status, say)
    began, attempt, step = time.monotonic(), status["attempt"], status["step"]
    after = await _status_when(store, lambda status: status["attempt"] > attempt and _all_stepped(status))
    say(f"demo: all ranks step again, {time.monotonic() - began:.2f} s after the kill at step {step} (now at step {after['step']})")


def _all_stepped(status: Status) -> bool:
    return bool(status["phase"] == "TRAINING")


def _busy_nodes(status: Status) -> list[Mapping[str, Any]]:
    """Those that run ranks of the current attempt; a spare has none."""
    return [node for node in status["nodes"] if node["state"] == "running"]


def _kill_last_rank(status: Status, say: Say) -> None:
    rank = _busy_nodes(status)[-1]["ranks"][-1]
    say(f"demo: kill -9 of rank {rank['rank']} (pid {rank['pid']}) at step {status['step']}")
    _kill(rank["pid"])


def _kill_last_node(status: Status, say: Say) -> None:
    node = _busy_nodes(status)[-1]
    say(f"demo: kill -9 of the whole node {node['id']}: its agent (pid {node['pid']}) and its {len(node['ranks'])} ranks")
    for pid in (node["pid"], *(rank["pid"] for rank in node["ranks"])):
        _kill(pid)


def _kill(pid: int) -> None:
    assert pid > 1, "0 and 1 would be far more than a rank"
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


async def _status_when(store: Store, holds: Callable[[Status], bool]) -> Status:
    while True:
        try:
            async with await _client(store) as client:
                while not holds(status := json.loads(await client.get("/v1/status"))):
                    await asyncio.sleep(POLL_S)
                return dict(status)
        except (CoordinatorUnreachable, CoordinatorRefused, StorageError, InputError):  # not there yet, or not at the moment
            await asyncio.sleep(POLL_S)


async def _client(store: Store) -> CoordinatorClient:
    opened = (await asyncio.to_thread(RunLog.open, store)).newest_opened()
    if opened is None:
        raise CoordinatorUnreachable("no coordinator yet")
    return CoordinatorClient(opened.url, known_token(store))


def same_bits(store: Store) -> str:
    """The steps that were computed more than once, compared bit by bit with what the first computation gave."""
    losses: dict[int, list[str]] = {}
    for records in read_steps(store).values():
        for record in records:
            losses.setdefault(record["step"], []).append(record["loss_hex"])
    again = {step: seen for step, seen in losses.items() if len(seen) > 1}
    differing = [step for step, seen in again.items() if len(set(seen)) > 1]
    if differing:
        return f"demo: steps {differing} gave other losses when they were computed again: this is a bug"
    return f"demo: {len(again)} steps were computed twice; every loss came out equal to the last bit"
