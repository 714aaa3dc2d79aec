"""The ranks of one attempt on one node, launched by torchrun's own library. The only torch in this folder.

A warm forkserver has torch imported already. From it comes, for each attempt, one *launcher*, in which torch.distributed.elastic starts the
ranks and gives them torchrun's environment; its restart logic is not used: one `RankGroup` is one attempt, and a group that lost a rank is
killed whole. The agent itself does without torch: it stays small, starts at once, and nothing of torch can hang or crash it.
`start_forkserver()` must be called from the agent's main thread (see lifeline.py).
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence, Set
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any, Final

from keepstep.storage.store import ENV_OPTIONS
from keepstep.trainer.contract import ENV_NODE, ENV_SPEC, RankSpec

from . import stacks
from .exits import Exit, exit_code, explain, write_error
from .processes import (
    ENV_PARENT,
    die_with_parent,
    kill,
    kill_group,
    kill_session,
    print_or_lose,
    strays_of_ranks,
)

FIRST_PRELOAD: Final = ("keepstep.orchestrator.lifeline", "keepstep.orchestrator.ranks", "torch.distributed.elastic.multiprocessing")
TRAINER_PRELOAD: Final = "keepstep.trainer.preload"
PLATFORM_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
REMOTE_PRELOAD: Final = "keepstep.storage.s3"  # s3fs and botocore: 0.5 s that a restart from an object store would pay in every rank
ROLE: Final = "default"  # torchrun's default role name
ENV_INTERFACE: Final = "GLOO_SOCKET_IFNAME"
ENV_ERROR_FILE: Final = "TORCHELASTIC_ERROR_FILE"  # which torch's launcher adds, for `@record`
LAUNCHER_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # that torch's launcher takes
UNKNOWN_CODE: Final = 255  # the launcher died, and nobody can say how its child ended


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSpec:
    """One node's share of an attempt."""

    specs: tuple[RankSpec, ...]  # by local rank
    log_paths: tuple[str, ...]
    script: str  # "" : the LM trainer
    script_args: tuple[str, ...]
    node: str
    first_rank: int
    group_rank: int
    num_nodes: int
    world_size: int
    master_addr: str
    master_port: int
    interface: str = ""  # where the other nodes reach this one; "": gloo looks the host name up, as under torchrun


def forget_main_module() -> None:
    """Forked ranks would import our main module again (a third of a second each): multiprocessing finds none to import."""
    main = sys.modules["__main__"]
    main.__spec__ = None
    if hasattr(main, "__file__"):
        del main.__file__


_CONTEXT: Final = multiprocessing.get_context("forkserver")


def start_forkserver(root: str) -> None:
    """Main thread only: the forkserver dies with the thread that started it. Returns at once; the imports go on in the forkserver.

    Args:
        root: of the run; "" where nobody knows it yet.
    """
    assert threading.current_thread() is threading.main_thread()
    is_local = root and "://" not in root
    _CONTEXT.set_forkserver_preload([*FIRST_PRELOAD, TRAINER_PRELOAD, *(() if is_local else (REMOTE_PRELOAD,))])
    os.environ[ENV_PARENT] = str(os.getpid())  # stays: multiprocessing starts a lost forkserver again by itself
    multiprocessing.forkserver.ensure_running()


def wait_until_warm() -> None:
    """Blocks until the forkserver has finished its imports and forked once."""
    process = _CONTEXT.Process(target=os.getpid)
    process.start()
    process.join()


def count_gpus() -> int:
    """CUDA devices of this node, counted by a child: the agent does without torch."""
    answer, telling = _CONTEXT.Pipe(duplex=False)
    _CONTEXT.Process(target=_tell_gpus, args=(telling,)).start()
    telling.close()
    return int(answer.recv())


def _tell_gpus(telling: Connection) -> None:
    import torch

    telling.send(torch.cuda.device_count())


def forkserver_pid() -> int:
    """Of the living one."""
    multiprocessing.forkserver.ensure_running()
    return int(multiprocessing.forkserver._forkserver._forkserver_pid)  # type: ignore[attr-defined]


class HostedStore:
    """A TCPStore of one attempt, in a process and on a port of its own; it listens on `address` only."""

    def __init__(self, address: str) -> None:
        answer, telling = _CONTEXT.Pipe(duplex=False)
        self.process = _CONTEXT.Process(target=host_store, args=(address, forkserver_pid(), telling), daemon=True)
        self.process.start()
        telling.close()
        self.host, self.port = address, int(answer.recv())
        answer.close()

    def close(self) -> None:
        self.process.kill()


def host_store(address: str, parent: int, telling: Connection) -> None:
    """The store's process: tells its port, serves until it is killed."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    die_with_parent(parent)
    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    # The store owns the descriptor from here on.
    store = TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    telling.send(store.port)
    while True:
        signal.pause()


class RankGroup:
    """The processes of one attempt on this node, and their launcher: start, watch the sentinels, kill."""

    def __init__(self, group: GroupSpec) -> None:
        self.group = group
        kill(strays_of_ranks(group.specs[0].scratch))  # older ranks are dead; what they started may hold a port or a GPU
        for spec in group.specs:
            Path(spec.error_path).unlink(missing_ok=True)
        answer, telling = _CONTEXT.Pipe(duplex=False)
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in group.specs]
        self._codes = [reading for reading, _ in pipes]
        ends = tuple(writing for _, writing in pipes)
        self._launcher = _CONTEXT.Process(target=launch, args=(group, forkserver_pid(), telling, ends))
        self._launcher.start()
        for end in (telling, *ends):
            end.close()
        self.pids: tuple[int, ...] = answer.recv()
        answer.close()
        self._exits: dict[int, Exit] = {}
        self._stopped: set[int] = set()

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


def launch(group: GroupSpec, parent: int, telling: Connection, exits: tuple[Connection, ...]) -> None:
    """The launcher's process: torchrun's own library starts the ranks; tells their pids, and each one's exit code at once.

    Torch's `poll` and `wait` are not used: they would end the other ranks in their own way, which takes up to 30 s for each.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    die_with_parent(parent)
    handlers = {number: signal.getsignal(number) for number in LAUNCHER_SIGNALS}
    context: Any = start_processes(
        name=ROLE,
        entrypoint=rank_main,
        args={i: (group, i, os.getpid(), exits) for i in range(len(group.specs))},
        envs={i: torchrun_environment(group, i) for i in range(len(group.specs))},
        logs_specs=DefaultLogsSpecs(log_dir=str(Path(group.specs[0].scratch) / "elastic")),
        start_method="fork",
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)  # torch's would end us, and the ranks, where a platform only asks the agent to leave
    processes = context._pc.processes
    waiting = {os.pidfd_open(process.pid): local_rank for local_rank, process in enumerate(processes)}
    telling.send(tuple(process.pid for process in processes))
    while waiting:
        for ready in wait(list(waiting)):
            assert isinstance(ready, int)
            local_rank = waiting.pop(ready)
            processes[local_rank].join()
            exits[local_rank].send(processes[local_rank].exitcode)
            exits[local_rank].close()


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


def rank_main(group: GroupSpec, local_rank: int, parent: int, exits: tuple[Connection, ...]) -> None:
    """The rank's process, forked from its launcher: own session, own log, then the trainer or the user's script. Never returns."""
    os.setsid()
    die_with_parent(parent)
    for end in exits:
        end.close()  # else the launcher's death would go unnoticed
    _take_forks_along()
    _redirect_output(group.log_paths[local_rank])
    _leave_signals_to_the_agent()
    _forget_variables_of_preloaded_modules({*torchrun_environment(group, local_rank), ENV_ERROR_FILE})
    spec = group.specs[local_rank]
    faulthandler.enable()
    stacks.answer_to(stacks.answer_path(spec.scratch, spec.attempt, local_rank))
    code = _run_guarded(group, Path(spec.error_path))
    _leave(code)


def _take_forks_along() -> None:
    """What this rank forks (loader workers) dies with it, whoever kills it and whether or not the agent lives to see it.

    The kernel means the thread that forks: a child of another thread than the main one is left to the agent.
    """
    forker = 0

    def note() -> None:
        nonlocal forker
        forker = os.getpid() if threading.get_native_id() == os.getpid() else 0

    def obey() -> None:
        if forker:
            die_with_parent(forker)

    os.register_at_fork(before=note, after_in_child=obey)


def _leave_signals_to_the_agent() -> None:
    """A platform sends these to every process of a job; what they mean for the run is decided by the agent, which gets them, too.

    A script may install handlers of its own. Nothing is "ignored": that would be inherited by programs that a script executes.
    """
    for number in PLATFORM_SIGNALS:
        signal.signal(number, _do_nothing)
        signal.siginterrupt(number, False)  # native code need not expect EINTR
    os.register_at_fork(before=_hold_signals, after_in_parent=_let_signals_go, after_in_child=_give_signals_back)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    pass


_held = threading.local()


def _hold_signals() -> None:
    """A signal that reaches a child before it has its own handlers would be lost, and with it the order to end."""
    _held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, PLATFORM_SIGNALS)


def _let_signals_go() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _held.mask)


def _give_signals_back() -> None:
    """In a child that a rank forks: `multiprocessing.Process.terminate` must end it, as it does everywhere else."""
    for number in PLATFORM_SIGNALS:
        if signal.getsignal(number) is _do_nothing:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _let_signals_go()


def _forget_variables_of_preloaded_modules(given: Set[str]) -> None:
    """Imports in the forkserver set variables of their own (torch's compiler its cache folder); a fresh process would not have them."""
    started_with = {entry.partition(b"=")[0].decode() for entry in Path("/proc/self/environ").read_bytes().split(b"\0")}
    for name in set(os.environ) - started_with - given:
        del os.environ[name]


def _redirect_output(path: str) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    print_or_lose()


def _run_guarded(group: GroupSpec, error_path: Path) -> int:
    try:
        _run(group.script, group.script_args)
    except SystemExit as error:
        return exit_code(error)
    except BaseException as error:  # noqa: BLE001  (the process entry: whatever it was becomes the verdict)
        traceback.print_exc()
        write_error(error_path, error)
        return 1
    return 0


def _run(script: str, arguments: Sequence[str]) -> None:
    _obey_thread_limit()
    if not script:
        from keepstep.trainer.__main__ import main

        main()
        return
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)  # as `python script` has it
    runpy.run_path(script, run_name="__main__")


def _obey_thread_limit() -> None:
    """OpenMP read OMP_NUM_THREADS when the forkserver imported torch, before torchrun's environment was known."""
    if threads := os.environ.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))


def _leave(code: int) -> None:
    """What interpreter shutdown does for a script; multiprocessing's children leave by os._exit without it."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
