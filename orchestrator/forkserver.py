"""The warm forkserver, which has torch imported already, and the stores that are forked from it. The agent itself does without torch.

It stays small, starts at once, and nothing of torch can hang or crash it. `start_forkserver()` must be called from the agent's main thread
(see lifeline.py).
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import sys
import threading
from typing import Final

from .forked import host_store, tell_gpus
from .processes import ENV_PARENT

FIRST_PRELOAD: Final = ("keepstep.orchestrator.lifeline", "keepstep.orchestrator.forked", "torch.distributed.elastic.multiprocessing")
TRAINER_PRELOAD: Final = "keepstep.trainer.preload"
REMOTE_PRELOAD: Final = "keepstep.storage.s3"  # s3fs and botocore: 0.5 s that a restart from an object store would pay in every rank

CONTEXT: Final = multiprocessing.get_context("forkserver")


def forget_main_module() -> None:
    """Forked ranks would import our main module again (a third of a second each): multiprocessing finds none to import."""
    main = sys.modules["__main__"]
    main.__spec__ = None
    if hasattr(main, "__file__"):
        del main.__file__


def start_forkserver(root: str) -> None:
    """Main thread only: the forkserver dies with the thread that started it. Returns at once; the imports go on in the forkserver.

    Args:
        root: of the run; "" where nobody knows it yet.
    """
    assert threading.current_thread() is threading.main_thread()
    is_local = root and "://" not in root
    CONTEXT.set_forkserver_preload([*FIRST_PRELOAD, TRAINER_PRELOAD, *(() if is_local else (REMOTE_PRELOAD,))])
    os.environ[ENV_PARENT] = str(os.getpid())  # stays: multiprocessing starts a lost forkserver again by itself
    multiprocessing.forkserver.ensure_running()


def wait_until_warm() -> None:
    """Blocks until the forkserver has finished its imports and forked once."""
    process = CONTEXT.Process(target=os.getpid)
    process.start()
    process.join()


def count_gpus() -> int:
    """CUDA devices of this node, counted by a child: the agent does without torch."""
    answer, telling = CONTEXT.Pipe(duplex=False)
    CONTEXT.Process(target=tell_gpus, args=(telling,)).start()
    telling.close()
    return int(answer.recv())


def forkserver_pid() -> int:
    """Of the living one."""
    multiprocessing.forkserver.ensure_running()
    return int(multiprocessing.forkserver._forkserver._forkserver_pid)  # type: ignore[attr-defined]


class HostedStore:
    """A TCPStore for one attempt, in a process and on a port of its own; it listens on `address` only."""

    def __init__(self, address: str) -> None:
        answer, telling = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=host_store, args=(address, forkserver_pid(), telling), daemon=True)
        self.process.start()
        telling.close()
        self.host, self.port = address, int(answer.recv())
        answer.close()

    @property
    def is_alive(self) -> bool:
        return self.process.is_alive()

    def close(self) -> None:
        self.process.kill()
