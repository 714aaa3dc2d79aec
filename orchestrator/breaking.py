"""Inflicts faults on a live run: signals to its processes, triggers of its fault points, damage to its files, harm to its hosts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store

from .cgroups import Cgroup
from .faultkinds import KINDS, Fault
from .processes import strays
from .scratch import default_scratch
from .victims import CannotBreak, Status, close, hold, name_of, resume, send, victim, words

if TYPE_CHECKING:
    from .lab import Host

ACTIONS: Final = tuple(kind.action for kind in KINDS.values() if kind.action)
TRIGGER_S: Final = 60.0  # a rank that trains passes its fault point long before that
TRIGGER_POLL_S: Final = 0.001
LOOK_S: Final = 0.1  # at the run log
MEMORY_LEFT: Final = 256 << 20  # what a node may still take before the kernel looks for the rank that eats
WITNESS_S: Final = 0.5  # the limit stays so long: the agent reads it when it says what killed the rank
NO_LIMIT: Final = 1 << 62
LOSS_PERCENT: Final = 10.0
CLI: Final = "keepstep.orchestrator.cli"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A run on this machine, as somebody who breaks it must know it."""

    root: str
    store: Store
    triggers: Path = Path()  # where the ranks' fault points look, see `fault_points`
    hosts: Mapping[str, Host] = field(default_factory=dict)  # by node name; empty: the nodes are processes
    groups: Mapping[str, Cgroup] = field(default_factory=dict)  # by node name; empty: nobody's memory can be limited

    def mark(self, node: str) -> bytes:
        """What all processes of a node carry, and nobody else does."""
        return os.fsencode(default_scratch(self.root, node))


@dataclass(frozen=True, slots=True, kw_only=True)
class Struck:
    """Who was hit, and when."""

    at_s: float  # monotonic
    node: str = ""  # id
    rank: int = -1
    pids: tuple[int, ...] = ()
    heal: Callable[[], None] | None = None  # ends the fault


def fault_points(triggers: Path) -> str:
    """KEEPSTEP_FAULTS of a run whose ranks are to fail from within."""
    return ";".join(f"rank.step:action={action}:when={triggers}/{action}-{{rank}}" for action in ACTIONS)


async def strike(fault: Fault, status: Status, scene: Scene) -> Struck:
    """Inflicts one fault on the run that `status` describes. Raises CannotBreak where the victim is gone."""
    match fault.kind.aim:
        case "rank":
            return await _strike_rank(fault, status, scene)
        case "node":
            return await _strike_node(fault, status, scene)
        case "coordinator":
            pid = int(status["coordinator"]["pid"])
            held = hold(pid, b"coordinator", os.fsencode(CLI))
            at_s = send([held], signal.SIGKILL)
            os.close(held)
            return Struck(at_s=at_s, pids=(pid,))
        case "root":
            return _take_root_away(scene)


# Ranks.


async def _strike_rank(fault: Fault, status: Status, scene: Scene) -> Struck:
    node, rank = victim(fault, status)
    if rank is None:
        raise CannotBreak(f"{fault}: name a rank, not a node")
    pid = int(rank["pid"])
    held = hold(pid, scene.mark(name_of(node)))
    struck = Struck(at_s=0.0, node=node["id"], rank=rank["rank"], pids=(pid,))
    if fault.kind.action:
        return await _trigger(fault, struck, held, scene)
    at_s = send([held], signal.Signals[fault.kind.signal])
    if fault.kind.signal == "SIGSTOP":
        return replace(struck, at_s=at_s, heal=partial(resume, [held]))
    os.close(held)
    return replace(struck, at_s=at_s)


async def _trigger(fault: Fault, struck: Struck, held: int, scene: Scene) -> Struck:
    """It happens when the rank passes its fault point and takes the trigger away; an OOM kill when the kernel has acted."""
    name = struck.node.partition("#")[0]
    trigger = scene.triggers / f"{fault.kind.action}-{struck.rank}"
    heal = _limit_memory(scene, name) if fault.kind.action == "eat" else None
    trigger.touch()
    at_s = await _await(lambda: not trigger.exists(), f"rank {struck.rank} did not pass its fault point")
    if fault.kind.action == "eat":
        assert heal
        at_s = await _await(lambda: _has_ended(held), f"rank {struck.rank} was not killed by the kernel")
        await asyncio.sleep(WITNESS_S)
        heal()
    os.close(held)
    return replace(struck, at_s=at_s)


def _has_ended(pidfd: int) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return True
    return False


async def _await(holds: Callable[[], bool], otherwise: str, period_s: float = TRIGGER_POLL_S) -> float:
    """When that was so (monotonic)."""
    deadline = time.monotonic() + TRIGGER_S
    while not holds():
        if time.monotonic() > deadline:
            raise CannotBreak(f"{otherwise} within {TRIGGER_S:g} s")
        await asyncio.sleep(period_s)
    return time.monotonic()


def _limit_memory(scene: Scene, node: str) -> Callable[[], None]:
    if node not in scene.groups:
        raise CannotBreak("memory can be limited only where cgroups can be made: as root")
    group = scene.groups[node]
    group.limit_memory(group.memory_bytes() + MEMORY_LEFT)
    return lambda: group.limit_memory(NO_LIMIT)


# Nodes.


async def _strike_node(fault: Fault, status: Status, scene: Scene) -> Struck:
    node, rank = victim(fault, status)
    number = rank["rank"] if rank else -1
    if fault.kind.needs_hosts:
        at_s, heal = _strike_host(fault, name_of(node), scene)
        return Struck(at_s=at_s, node=node["id"], rank=number, heal=heal)
    if fault.kind.name == "damage-checkpoint":
        await _flip_a_bit(scene, max(0, number))
    pids = _pids_of(fault, node, scene.mark(name_of(node)))
    held = [hold(pid, scene.mark(name_of(node))) for pid in pids]
    at_s = send(held, _SIGNALS.get(fault.kind.name, signal.SIGKILL))
    struck = Struck(at_s=at_s, node=node["id"], rank=number, pids=pids)
    if fault.kind.name == "stop-node":
        return replace(struck, heal=partial(resume, held))
    close(held)
    return struck


_SIGNALS: Final = {"stop-node": signal.SIGSTOP, "preempt-node": signal.SIGTERM}


def _pids_of(fault: Fault, node: Mapping[str, Any], mark: bytes) -> tuple[int, ...]:
    """In the order in which they are hit; the agent first, so that it cannot speak about its ranks."""
    match fault.kind.name:
        case "kill-agent" | "preempt-node":
            return (node["pid"],)
        case "kill-persister":
            return tuple(pid for pid in strays(os.fsdecode(mark)) if b"keepstep.storage.persister" in words(pid))
        case "stop-node":
            return (node["pid"], *(pid for pid in strays(os.fsdecode(mark)) if pid != node["pid"]))
        case _:
            return (node["pid"], *(rank["pid"] for rank in node["ranks"] if rank["phase"] != "exited"))


async def _flip_a_bit(scene: Scene, rank: int) -> None:
    """In the middle of a rank's largest file of the newest committed checkpoint, once there is an older one to fall back to."""
    log = RunLog(scene.store)
    await _await(lambda: _num_good(log) > 1, "there were not two checkpoints", LOOK_S)
    commit = log.lineage.newest_committed()
    folder = scene.store.local_path(commit.directory) if commit else None
    if folder is None:
        raise CannotBreak(f"{scene.root} is not a local folder")
    path = max(folder.glob(f"__{rank}_*"), key=lambda found: found.stat().st_size)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def _num_good(log: RunLog) -> int:
    log.refresh()
    return sum(commit.directory not in log.lineage.quarantined for commit in log.lineage.commits)


def _take_root_away(scene: Scene) -> Struck:
    """The folder is renamed and a file takes its place: nothing can be read, nothing made, nothing found empty. What was open stays so."""
    folder = scene.store.local_path("")
    if folder is None:
        raise CannotBreak(f"{scene.root} is not a local folder")
    away = folder.with_name(f"{folder.name}.away")
    at_s = time.monotonic()
    folder.rename(away)
    folder.touch()

    def bring_back() -> None:
        folder.unlink()
        away.rename(folder)

    return Struck(at_s=at_s, heal=bring_back)


# Hosts of the laboratory.


def _strike_host(fault: Fault, node: str, scene: Scene) -> tuple[float, Callable[[], None]]:
    if node not in scene.hosts:
        raise CannotBreak(f"{node} has no host of its own")
    host, at_s = scene.hosts[node], time.monotonic()
    match fault.kind.name:
        case "cut":
            host.cut()
            return at_s, host.heal
        case "cut-one-way":
            host.drop()
            return at_s, host.clear
        case "cut-between":
            return at_s, _part(host, _next(node, scene))
        case "freeze-host":
            host.freeze()
            return at_s, host.thaw
        case "kill-host":
            host.kill()
            return at_s, host.boot
        case "loss":
            host.loss(LOSS_PERCENT)
            return at_s, host.clear
        case _:
            assert fault.kind.name == "memory-limit"
            return at_s, _starve(host)


def _next(node: str, scene: Scene) -> Host:
    names = sorted(scene.hosts)
    return scene.hosts[names[(names.index(node) + 1) % len(names)]]


def _part(one: Host, other: Host) -> Callable[[], None]:
    one.drop(to=other)
    other.drop(to=one)

    def join() -> None:
        one.clear()
        other.clear()

    return join


def _starve(host: Host) -> Callable[[], None]:
    """Down to what it needs at this moment, or below (the kernel of cgroup 1 refuses a limit that it cannot keep)."""
    limit = 8 << 30
    with contextlib.suppress(OSError):
        while limit > MEMORY_LEFT:
            host.memory_limit(limit)
            limit = limit * 9 // 10
    return lambda: host.memory_limit(NO_LIMIT)
