"""No orphans: whichever process is killed, nothing of what it started survives, nothing that has a name stays, and no start is hindered."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.live import NO_HANG, LiveRun, Outcome, command_of, gates, poll_until
from keepstep.orchestrator.processes import is_alive

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]
Node = dict[str, Any]


def parent_of(pid: int) -> int:
    """0 when it is gone."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def children_of(run: LiveRun, parent: int, command: str = "") -> list[int]:
    return [pid for pid in run.marked() if parent_of(pid) == parent and command in command_of(pid)]


def helper(run: LiveRun, node: Node, command: str) -> int:
    """The agent's child with this in its command line."""
    (pid,) = children_of(run, node["pid"], command)
    return pid


def forked(run: LiveRun, node: Node, *, launches: bool) -> list[int]:
    """By the node's forkserver: the launcher, whose children are the ranks, or the stores that it hosts."""
    return [pid for pid in children_of(run, helper(run, node, "multiprocessing.forkserver")) if bool(children_of(run, pid)) is launches]


def launcher_of(run: LiveRun, node: Node) -> int:
    """Of the ranks that train; another one has ranks that wait for the next attempt."""
    return parent_of(node["ranks"][0]["pid"])


def reserve_of(run: LiveRun, node: Node) -> int:
    """The launcher of the ranks that wait, once all of them are forked."""
    found: list[int] = []

    def is_ready() -> bool:
        others = (pid for pid in forked(run, node, launches=True) if pid != launcher_of(run, node))
        found[:] = [pid for pid in others if len(children_of(run, pid)) == 2]
        return bool(found)

    poll_until(is_ready, "ranks are forked ahead", run.said)
    return found[0]


def attempt_of(run: LiveRun, status: dict[str, Any]) -> list[int]:
    """All ranks and their loader workers."""
    ranks = [rank["pid"] for node in status["nodes"] for rank in node["ranks"]]
    return [*ranks, *(worker for rank in ranks for worker in children_of(run, rank))]


def names_in_shared_memory(run: LiveRun) -> Iterator[str]:
    """What a SIGKILL of everything would leave in /dev/shm: what is mapped or open there and has a name still."""
    for pid in run.marked():
        with contextlib.suppress(OSError):
            mapped = (line.split(maxsplit=5)[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
            opened = (os.readlink(descriptor) for descriptor in Path(f"/proc/{pid}/fd").iterdir())
            yield from (name for name in (*mapped, *opened) if name.startswith("/dev/shm/") and not name.endswith("(deleted)"))


def left_in(temporary: Path) -> list[Path]:
    """All but the cache of torch's compiler, which is kept on purpose, by torch."""
    return [path for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]


def test_nothing_survives_whichever_process_is_killed(start: Start, undisturbed: Outcome, tmp_path: Path, short_folder: Path) -> None:
    """A loader worker, a store and a resource tracker, a rank, a launcher, a persister, a forkserver, an agent; then all at once.

    A rank that is killed is replaced by one that was forked ahead; where the launcher of those is killed first, they die with it.

    Between the last two a scratch directory is cleared away under its agent.
    """
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    root, faults = str(tmp_path / "root"), gates(tmp_path, 2, 3, 4, 7, 8, 9, 13, 14, 19)
    environment = {"TMPDIR": str(temporary), "KEEPSTEP_SCRATCH_BASE": str(short_folder)}
    run = start("train.loader_workers=2", NO_HANG, root=root, faults=faults, environment=environment)

    def at_gate(find: Callable[[Node, Node], int], *, first: Callable[[], None] = lambda: None, opens: bool = False) -> None:
        """Kills what `find` finds on one of the two nodes; the whole attempt must be gone before the next begins.

        The gate is opened where somebody must run to notice. `first` is done before the kill.
        """
        status = run.wait_at_gate()
        attempt = attempt_of(run, status)
        assert len(attempt) == 4 + 4 * 2, "four ranks with two loader workers each"
        victim = find(*status["nodes"])
        poll_until(lambda: not list(names_in_shared_memory(run)), "no name is left (a semaphore has one while it is made)", run.said)
        first()
        run.kill(victim)
        if opens:
            run.open_gate()
        poll_until(lambda: not any(map(is_alive, attempt)), f"nothing survives {command_of(victim)}", run.said)

    at_gate(lambda first, second: children_of(run, second["ranks"][0]["pid"])[0], opens=True)
    status = run.wait_at_gate()
    waiting = [children_of(run, reserve_of(run, node)) for node in status["nodes"]]
    run.kill(*forked(run, status["nodes"][0], launches=False), helper(run, status["nodes"][0], "multiprocessing.resource_tracker"))
    run.open_gate()  # nobody needs them now
    at_gate(lambda first, second: int(first["ranks"][1]["pid"]))
    status = run.wait_at_gate()
    assert [[rank["pid"] for rank in node["ranks"]] for node in status["nodes"]] == [sorted(pids) for pids in waiting]
    waiting = [children_of(run, reserve_of(run, status["nodes"][1]))]
    run.kill(reserve_of(run, status["nodes"][1]))
    poll_until(lambda: not any(map(is_alive, waiting[0])), "they die with their launcher", run.said)
    at_gate(lambda first, second: launcher_of(run, second))
    at_gate(lambda first, second: helper(run, first, "keepstep.storage.persister"))
    at_gate(lambda first, second: helper(run, first, "multiprocessing.forkserver"))
    at_gate(lambda first, second: int(second["pid"]))
    scratch = next(short_folder.glob("*/*/node1"))
    at_gate(lambda first, second: int(first["ranks"][1]["pid"]), first=lambda: shutil.rmtree(scratch))  # its agent ends with its next order
    run.wait_at_gate()
    run.kill_everything()
    run.check_what_always_holds()
    assert left_in(temporary) == []

    (scratch / "incarnations.json").write_text('["node1#0')
    again = start("train.loader_workers=2", NO_HANG, root=root, faults=faults, environment=environment)
    assert again.wait() == 0, again.said()
    again.check_what_always_holds()
    assert again.outcome() == undisturbed
    assert left_in(temporary) == left_in(short_folder / f"keepstep-{os.getuid()}") == []
