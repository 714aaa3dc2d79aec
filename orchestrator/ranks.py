"""The ranks of one attempt on one node, forked from a warm forkserver with torchrun's environment. The only torch in this folder, and it is
imported in the forkserver's children alone: the agent itself stays small, starts at once, and nothing of torch can hang or crash it.

One `RankGroup` is one attempt, and a group that lost a rank is killed whole. `start_forkserver()` must be called from the agent's main
thread (see lifeline.py).
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Final

from keepstep.storage.store import ENV_OPTIONS
from keepstep.trainer.contract import DAMAGED_KIND, ENV_NODE, ENV_SPEC, RankSpec

from . import stacks
from .processes import (
    ENV_PARENT,
    die_with_parent,
    is_alive,
    kill,
    kill_group,
    kill_session,
    print_or_lose,
    signal_name,
    strays_of_ranks,
)

FIRST_PRELOAD: Final = ("keepstep.orchestrator.lifeline", "keepstep.orchestrator.ranks")
TRAINER_PRELOAD: Final = "keepstep.trainer.preload"
PLATFORM_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
REMOTE_PRELOAD: Final = "keepstep.storage.s3"  # s3fs and botocore: 0.5 s that a restart from an object store would pay in every rank
ROLE: Final = "default"  # torchrun's default role name
ENV_INTERFACE: Final = "GLOO_SOCKET_IFNAME"
UNKNOWN_CODE: Final = 255  # multiprocessing's, where the forkserver died and nobody can say how its child ended

GLOO_ADVICE: Final = " This is typically caused by"  # what follows in its messages is for people who have no verdict
# What a rank says whose peer died: a victim, never the culprit. Texts of gloo, NCCL and c10d of torch 2.13.
PEER_LOST: Final = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socket closed",
    "connection refused",
    "connection was closed",
    "failed to recv",
    "sendbytes failed",
    "recvvalue failed",
    "remote process exited",
    "ncclremoteerror",
    "connectfullmesh failed",
    "timed out waiting",
    "application timeout caused pair closure",
)


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


@dataclass(frozen=True, slots=True)
class Exit:
    """How a rank ended. `exit_code` is negative for a signal; `kind` and `why` are empty after success."""

    exit_code: int
    kind: str
    why: str
    damaged: str


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
    """The processes of one attempt on this node: start, watch the sentinels, kill."""

    def __init__(self, group: GroupSpec) -> None:
        self.group = group
        self._forkserver = forkserver_pid()
        self._processes = _start(group, self._forkserver)
        self.pids: tuple[int, ...] = tuple(process.pid or 0 for process in self._processes)
        self._stopped: set[int] = set()

    @property
    def sentinels(self) -> dict[int, int]:
        """File descriptor that becomes readable when a rank has ended -> its local rank."""
        return {process.sentinel: local_rank for local_rank, process in enumerate(self._processes)}

    def ended(self, local_rank: int) -> Exit | None:
        """How this rank ended, None while it runs."""
        code = self._processes[local_rank].exitcode
        if code == UNKNOWN_CODE and not is_alive(self._forkserver):
            return Exit(code, "signal", "died with the forkserver that it was forked from", "")
        return None if code is None else _explain(code, self.group.specs[local_rank].error_path)

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


def _start(group: GroupSpec, parent: int) -> tuple[ForkServerProcess, ...]:
    for spec in group.specs:
        Path(spec.error_path).unlink(missing_ok=True)
    kill(strays_of_ranks(group.specs[0].scratch))  # older ranks are dead; what they started may hold a port or a GPU
    processes = tuple(_CONTEXT.Process(target=rank_main, args=(group, i, parent)) for i in range(len(group.specs)))
    for process in processes:
        process.start()
    return processes


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
        "TORCHELASTIC_ERROR_FILE": str(Path(group.specs[local_rank].scratch) / f"error-torchelastic-{local_rank}.json"),
        "TORCHELASTIC_SIGNALS_TO_HANDLE": os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT"),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        **({"OMP_NUM_THREADS": threads} if threads else {}),
        **({ENV_OPTIONS: os.environ[ENV_OPTIONS]} if ENV_OPTIONS in os.environ else {}),  # the forkserver is older than the config
        **({ENV_INTERFACE: group.interface} if group.interface and ENV_INTERFACE not in os.environ else {}),
        ENV_NODE: group.node,
        ENV_SPEC: group.specs[local_rank].to_json(),
    }


def rank_main(group: GroupSpec, local_rank: int, parent: int) -> None:
    """The rank's process, forked from the forkserver: own session, own log, then the trainer or the user's script. Never returns."""
    os.setsid()
    die_with_parent(parent)
    _take_forks_along()
    _redirect_output(group.log_paths[local_rank])
    _leave_signals_to_the_agent()
    environment = torchrun_environment(group, local_rank)
    os.environ.update(environment)
    _forget_variables_of_preloaded_modules(environment)
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


def _forget_variables_of_preloaded_modules(given: Mapping[str, str]) -> None:
    """Imports in the forkserver set variables of their own (torch's compiler its cache folder); a fresh process would not have them."""
    started_with = {entry.partition(b"=")[0].decode() for entry in Path("/proc/self/environ").read_bytes().split(b"\0")}
    for name in set(os.environ) - started_with - set(given):
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
        return _exit_code(error)
    except BaseException as error:  # noqa: BLE001  (the process entry: whatever it was becomes the verdict)
        traceback.print_exc()
        _write_error(error_path, error)
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


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code
    print(error.code, file=sys.stderr)  # noqa: T201  (what the interpreter itself does with sys.exit("text"))
    return 1


def _leave(code: int) -> None:
    """What interpreter shutdown does for a script; multiprocessing's children leave by os._exit without it."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _write_error(path: Path, error: BaseException) -> None:
    text = str(error).strip()
    first_line = text.splitlines()[0].partition(GLOO_ADVICE)[0] if text else ""
    why = f"{type(error).__name__}: {first_line}".rstrip(": ")
    kind = getattr(error, "kind", "") or ("peer-lost" if is_peer_lost(error) else "exception")
    damaged = getattr(error, "directory", "") if kind == DAMAGED_KIND else ""
    path.write_text(json.dumps({"kind": kind, "why": why[:500], "damaged": damaged}))


def is_peer_lost(error: BaseException) -> bool:
    """A collective that failed because somebody else died: torch raises RuntimeError subclasses with the transport's text."""
    from torch.distributed import DistError

    text = str(error).lower()
    return isinstance(error, (RuntimeError, DistError)) and any(sign in text for sign in PEER_LOST)


def _explain(code: int, error_path: str) -> Exit:
    if code == 0:
        return Exit(0, "", "", "")
    if code < 0:
        return Exit(code, "signal", signal_name(code), "")
    return _from_error_file(code, error_path) or Exit(code, "exit", f"exit code {code}", "")


def _from_error_file(code: int, error_path: str) -> Exit | None:
    try:
        body: Mapping[str, str] = json.loads(Path(error_path).read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # it left through sys.exit, or died while writing
        return None
    return Exit(code, body["kind"], body["why"], body["damaged"])
