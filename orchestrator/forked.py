"""What runs in the processes that are forked from the forkserver: stores, launchers and ranks. The only torch in this folder.

A rank waits, ready to go, until its agent's orders come through a pipe. The last of them, `Begin`, brings everything that belongs to its
attempt: torchrun's environment, where its log goes, what it runs.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle
from pathlib import Path
from types import FrameType
from typing import Any, Final

from keepstep.trainer.attach import be_standby
from keepstep.trainer.contract import ENV_SPEC

from . import stacks
from .exits import exit_code, write_error
from .processes import die_with_parent, print_or_lose

PLATFORM_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
LAUNCHER_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # that torch's launcher takes
ROLE: Final = "default"  # torchrun's default role name


@dataclass(frozen=True, slots=True)
class Program:
    """What ranks run."""

    script: str = ""  # "": the LM trainer
    arguments: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()  # modules that the script's owner wants to be imported before ranks are forked


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """The last order that a waiting rank gets: what to be."""

    environment: Mapping[str, str]
    program: Program
    log_path: str
    error_path: str
    answers: str  # where its stacks go, see stacks.py
    is_tethered: bool  # a descriptor to hold follows, see tether.py
    waits: bool = False  # as a rank of a hot standby, see hot.py: another order follows, when an attempt is launched into it


def tell_gpus(telling: Connection) -> None:
    import torch

    telling.send(torch.cuda.device_count())


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


def launch(
    program: Program,
    scratch: str,
    parent: int,
    telling: Connection,
    exits: tuple[Connection, ...],
    orders: tuple[Connection, ...],
    *,
    ahead: bool,
) -> None:
    """The launcher's process: torchrun's own library starts the ranks; tells their pids, and each one's exit code at once.

    Torch's `poll` and `wait` are not used: they would end the other ranks in their own way, which takes up to 30 s for each.

    Args:
        ahead: nobody waits for these ranks yet: there is time to rehearse their first step.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    die_with_parent(parent)
    _forget_variables_of_preloaded_modules()
    _preload(program)
    rehearses = ahead and not program.script
    if rehearses:
        _rehearse()
    gc.freeze()  # a collection in a rank would copy what all of them share
    handlers = {number: signal.getsignal(number) for number in LAUNCHER_SIGNALS}
    context: Any = start_processes(
        name=ROLE,
        entrypoint=rank_main,
        args={i: (i, os.getpid(), exits, orders, rehearses) for i in range(len(orders))},
        envs={i: {} for i in range(len(orders))},  # they come with the order to begin
        logs_specs=DefaultLogsSpecs(log_dir=str(Path(scratch) / "elastic")),
        start_method="fork",
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)  # torch's would end us, and the ranks, where a platform only asks the agent to leave
    for end in orders:
        end.close()
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


def _preload(program: Program) -> None:
    """As the script itself would import them: its folder is the first place to look, its arguments are there."""
    if not program.script:
        return
    _pose_as(program)
    for name in program.preload:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # noqa: BLE001  (a user's module: the script meets the error again, and its log shows it)
            print(f"keepstep: train.preload: {name}: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201


def _pose_as(program: Program) -> None:
    sys.argv = [program.script, *program.arguments]
    sys.path[0] = str(Path(program.script).resolve().parent)  # as `python script` has it


def _rehearse() -> None:
    from keepstep.trainer.rehearsal import rehearse

    rehearse()


def rank_main(local_rank: int, parent: int, exits: tuple[Connection, ...], orders: tuple[Connection, ...], rehearses: bool) -> None:
    """The rank's process, forked from its launcher: own session, then whatever it is told. Never returns."""
    os.setsid()
    die_with_parent(parent)
    for end in exits:
        end.close()  # else the launcher's death would go unnoticed
    for i, end in enumerate(orders):
        if i != local_rank:
            end.close()
    _take_forks_along()
    _leave_signals_to_the_agent()
    faulthandler.enable()
    if rehearses:
        _rehearse()  # once more: it copies the pages that a first step writes to
    life = Life(orders[local_rank])
    _leave(_run_guarded(life))


class Life:
    """What this rank was told to be: an attempt's, or a hot standby's until an attempt is launched into that."""

    def __init__(self, orders: Connection) -> None:
        self._orders = orders
        self.order = self._obey()

    def _obey(self) -> Begin:
        order = self._next_order()
        os.environ.update(order.environment)
        _redirect_output(order.log_path)
        stacks.answer_to(Path(order.answers))
        return order

    def _next_order(self) -> Begin:
        """An agent that wants us no more closes the pipe."""
        try:
            order: Begin = self._orders.recv()
        except (EOFError, OSError):
            os._exit(0)
        if order.is_tethered:
            recv_handle(self._orders)  # stays open as long as we live; children that we fork hold it, too
        if not order.waits:
            self._orders.close()
        return order

    def wait_for_attempt(self) -> str:
        """Tells the agent that all is built; what the attempt's order says of this rank."""
        self._orders.send("ready")
        self.order = self._obey()
        return self.order.environment[ENV_SPEC]


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


def _forget_variables_of_preloaded_modules() -> None:
    """Imports in the forkserver set variables of their own (torch's compiler its cache folder); a fresh process would not have them."""
    started_with = {entry.partition(b"=")[0].decode() for entry in Path("/proc/self/environ").read_bytes().split(b"\0")}
    for name in set(os.environ) - started_with:
        del os.environ[name]


def _redirect_output(path: str) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    print_or_lose()


def _run_guarded(life: Life) -> int:
    if life.order.waits:
        be_standby(life.wait_for_attempt)
    try:
        _run(life.order.program)
    except SystemExit as error:
        return exit_code(error)
    except BaseException as error:  # noqa: BLE001  (the process entry: whatever it was becomes the verdict)
        traceback.print_exc()
        write_error(Path(life.order.error_path), error)
        return 1
    return 0


def _run(program: Program) -> None:
    _obey_thread_limit()
    if not program.script:
        from keepstep.trainer.__main__ import main

        main()
        return
    _pose_as(program)
    runpy.run_path(program.script, run_name="__main__")


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
