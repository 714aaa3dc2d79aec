"""The ranks of one attempt on one node, launched by torchrun's own library.

From the forkserver comes, for each attempt, one *launcher*, in which torch.distributed.elastic starts the ranks; its restart logic is not
used: one `RankGroup` is one attempt, and a group that lost a rank is killed whole. A launcher may be forked long before its attempt is
known (reserve.py): its ranks wait for their orders, which bring torchrun's environment. What runs in these processes is in forked.py.
"""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Final

from keepstep.storage.store import ENV_OPTIONS
from keepstep.trainer.contract import ENV_NODE, ENV_SPEC, RankSpec

from . import stacks
from .exits import Exit, explain
from .forked import ROLE, Begin, Program, launch
from .forkserver import CONTEXT, forkserver_pid
from .processes import kill_group, kill_session

ENV_INTERFACE: Final = "GLOO_SOCKET_IFNAME"
UNKNOWN_CODE: Final = 255  # the launcher died, and nobody can say how its child ended
FORK_S: Final = 120.0  # for forking ranks and, before, importing what a script's owner wants to be imported ahead


class LauncherDied(RuntimeError):
    """Or it was not ready in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSpec:
    """One node's share of an attempt."""

    specs: tuple[RankSpec, ...]  # by local rank
    log_paths: tuple[str, ...]
    program: Program
    node: str
    first_rank: int
    group_rank: int
    num_nodes: int
    world_size: int
    master_addr: str
    master_port: int
    interface: str = ""  # where the other nodes reach this one; "": gloo looks the host name up, as under torchrun


class Launcher:
    """A launcher and its ranks, forked and waiting for their orders: nothing in them belongs to an attempt yet.

    They die with the agent, like everything that it starts; a rank whose pipe closes before its last order leaves by itself.
    Blocks until they are forked. Raises LauncherDied.
    """

    def __init__(self, num_ranks: int, program: Program, scratch: str, *, ahead: bool) -> None:
        answer, telling = CONTEXT.Pipe(duplex=False)
        codes = [CONTEXT.Pipe(duplex=False) for _ in range(num_ranks)]
        orders = [CONTEXT.Pipe() for _ in range(num_ranks)]
        self.codes = [reading for reading, _ in codes]  # exit code of each rank, once it has ended
        self.orders = [ours for ours, _ in orders]
        theirs = (telling, tuple(writing for _, writing in codes), tuple(ends for _, ends in orders))
        self._process = CONTEXT.Process(target=launch, args=(program, scratch, forkserver_pid(), *theirs), kwargs={"ahead": ahead})
        self._process.start()
        for end in (telling, *theirs[1], *theirs[2]):
            end.close()
        self.pids: tuple[int, ...] = self._wait_forked(answer)

    def _wait_forked(self, answer: Connection) -> tuple[int, ...]:
        with answer, contextlib.suppress(EOFError):  # it died: said below
            if answer.poll(FORK_S):
                pids: tuple[int, ...] = answer.recv()
                return pids
        self._process.kill()
        raise LauncherDied(f"the launcher of {len(self.codes)} ranks died before it had forked them, or took over {FORK_S:g} s")

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    @property
    def is_whole(self) -> bool:
        """All of its ranks live and wait."""
        return not wait(self.codes, timeout=0)

    def close(self) -> None:
        """Kills what was never launched."""
        self._process.kill()
        for pid in self.pids:
            kill_session(pid)
        for end in (*self.codes, *self.orders):
            end.close()


class RankGroup:
    """The processes of one attempt on this node: launch, watch the sentinels, kill."""

    def __init__(self, group: GroupSpec, launcher: Launcher, tether: socket.socket | None) -> None:
        self.group = group
        self.pids = launcher.pids
        self._launcher = launcher
        self._codes = launcher.codes
        self.launcher_pid = launcher.pid
        self._exits: dict[int, Exit] = {}
        self._stopped: set[int] = set()
        begin_ranks(group, launcher, tether)

    @property
    def sentinels(self) -> dict[int, int]:
        """File descriptor that becomes readable when a rank has ended -> its local rank."""
        return {reading.fileno(): local_rank for local_rank, reading in enumerate(self._codes)}

    def ended(self, local_rank: int) -> Exit | None:
        """How this rank ended, None while it runs."""
        if local_rank not in self._exits and self._codes[local_rank].poll():
            self._exits[local_rank] = self._read_exit(local_rank)
        return self._exits.get(local_rank)

    def _read_exit(self, local_rank: int) -> Exit:
        """The pipe stays open, and readable: whoever watches the sentinel may not have looked yet."""
        try:
            return explain(self._codes[local_rank].recv(), self.group.specs[local_rank].error_path)
        except EOFError:
            kill_session(self.pids[local_rank])  # the kernel does so, too
            return Exit(UNKNOWN_CODE, "signal", "the death of its launcher", "")

    def kill(self) -> None:
        """SIGKILL to every rank's session, and to what ranks that ended left in theirs. The kernel's confirmation is the sentinel."""
        for local_rank, pid in enumerate(self.pids):
            if self.ended(local_rank) is None:
                self._stopped.add(local_rank)
                kill_session(pid)
            else:
                kill_group(pid)

    def was_stopped(self, local_rank: int) -> bool:
        """True when we ended this rank: it is not to blame."""
        return local_rank in self._stopped


def begin_ranks(group: GroupSpec, launcher: Launcher, tether: socket.socket | None, *, waits: bool = False) -> None:
    """Gives every rank its order, and the tether to hold."""
    for spec in group.specs:
        Path(spec.error_path).unlink(missing_ok=True)
    for local_rank, pipe in enumerate(launcher.orders):
        _tell(pipe, begin_order(group, local_rank, is_tethered=tether is not None, waits=waits))
        if tether:
            _hand_over(pipe, tether, launcher.pids[local_rank])


def _tell(pipe: Connection, order: Begin) -> None:
    with contextlib.suppress(BrokenPipeError):  # it died while it waited: its sentinel says so
        pipe.send(order)


def _hand_over(pipe: Connection, tether: socket.socket, pid: int) -> None:
    """Until the rank has taken it, the kernel holds it in the pipe."""
    with contextlib.suppress(BrokenPipeError):  # it is dead: its sentinel says so
        send_handle(pipe, tether.fileno(), pid)


def begin_order(group: GroupSpec, local_rank: int, *, is_tethered: bool, waits: bool = False) -> Begin:
    spec = group.specs[local_rank]
    return Begin(
        environment=torchrun_environment(group, local_rank),
        program=group.program,
        log_path=group.log_paths[local_rank],
        error_path=spec.error_path,
        answers=str(stacks.answer_path(spec.scratch, spec.attempt, local_rank)),
        is_tethered=is_tethered,
        waits=waits,
    )


def torchrun_environment(group: GroupSpec, local_rank: int) -> dict[str, str]:
    """The variables that torchrun 2.13 gives a worker (a test compares them with a real torchrun's), and ours beside them."""
    rank = group.first_rank + local_rank
    threads = os.environ.get("OMP_NUM_THREADS") or ("1" if len(group.specs) > 1 else "")
    return {
        "LOCAL_RANK": str(local_rank),
        "RANK": str(rank),
        "GROUP_RANK": str(group.group_rank),
        "ROLE_RANK": str(rank),
        "ROLE_NAME": ROLE,
        "LOCAL_WORLD_SIZE": str(len(group.specs)),
        "WORLD_SIZE": str(group.world_size),
        "GROUP_WORLD_SIZE": str(group.num_nodes),
        "ROLE_WORLD_SIZE": str(group.world_size),
        "MASTER_ADDR": group.master_addr,
        "MASTER_PORT": str(group.master_port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": f"{group.specs[local_rank].run}-{group.specs[local_rank].attempt}",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_SIGNALS_TO_HANDLE": os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT"),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        **({"OMP_NUM_THREADS": threads} if threads else {}),
        **({ENV_OPTIONS: os.environ[ENV_OPTIONS]} if ENV_OPTIONS in os.environ else {}),  # the forkserver is older than the config
        **({ENV_INTERFACE: group.interface} if group.interface and ENV_INTERFACE not in os.environ else {}),
        ENV_NODE: group.node,
        ENV_SPEC: group.specs[local_rank].to_json(),
    }
