"""Steps of a run, computed again on this machine: by as many processes as computed them, or by one that takes the shares in turn.

The processes run the training's own code (`open_run`, `advance`), without a persister: nothing is saved, the root is only read.
Torch-free: it is the processes that import torch.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

from keepstep.storage.errors import DamagedCheckpoint

from .config import TrainerConfig
from .contract import Resume
from .handover import complete

DUMPS: Final = ("gradients", "activations", "parameters")
Progress = Callable[[int], None]  # so many steps of this replay are done

_SILENCE_S: Final = 3600.0  # of all processes: a start, or ten steps of a large model that one processor takes for all ranks
_MOMENT_S: Final = 2.0  # for the others' words after a failure


class ReplayFailed(RuntimeError):
    """A process of the replay ended without a result, or none says anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The checkpoint that the first step follows."""

    root: str
    resume: Resume


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """The steps after `after` up to `last`: what one set of ranks computed, or several that restarted under equal conditions."""

    config: TrainerConfig
    attempt: int
    world_size: int
    after: int
    last: int
    skips: tuple[str, ...] = ()
    threads: int = 0  # of PyTorch; 0: unknown
    num_nodes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The step to look into, and what of it is wanted."""

    step: int
    rank: int | None = None  # samples and activations of this rank alone
    dump: frozenset[str] = frozenset()  # of DUMPS
    out: str = ""  # existing folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the processes of one stretch are told."""

    stretch: Stretch
    origin: Origin | None  # None: from scratch
    num_processes: int
    folder: str  # of theirs: where they meet, copies of remote tokens, the state that they hand over
    hands_over: bool
    view: View | None
    streams: tuple[Mapping[str, Any], ...] = ()  # random streams by rank, where one process takes the shares in turn and continues
    derives: bool = False  # the state comes from a process that did the work of another number of ranks: no streams of this stretch's


@dataclass(slots=True, kw_only=True)
class Replayed:
    """What came out: the step records as rank 0 would have written them, and the views by rank."""

    records: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    views: list[Mapping[str, Any]] = field(default_factory=list)
    surroundings: Mapping[str, str] = field(default_factory=dict)  # of the last stretch's rank 0, see surroundings.py


def replay(
    stretches: Sequence[Stretch], origin: Origin | None, *, on_one_process: bool, view: View | None = None, progress: Progress | None = None
) -> Replayed:
    """Computes the stretches one after the other.

    Raises:
        DamagedCheckpoint: `origin` does not verify.
        ReplayFailed: a process died or raised.
    """
    replayed, streams = Replayed(), tuple[Mapping[str, Any], ...]()
    with tempfile.TemporaryDirectory(prefix="keepstep-replay-") as folder:
        for number, stretch in enumerate(stretches):
            place = Path(folder, str(number))
            place.mkdir()
            num_processes = 1 if on_one_process else stretch.world_size
            is_last = number == len(stretches) - 1
            ranks_before = stretches[number - 1].world_size if number else 0
            job = Job(
                stretch=stretch,
                origin=origin,
                num_processes=num_processes,
                folder=str(place),
                hands_over=not is_last,
                view=view if is_last else None,
                streams=streams if ranks_before == stretch.world_size else (),
                derives=on_one_process and ranks_before not in (0, stretch.world_size),
            )
            outcomes = _run(job, len(replayed.records), progress or (lambda done: None))
            replayed.records |= {record["step"]: record for record in outcomes[0]["records"]}
            replayed.views += [seen for outcome in outcomes for seen in outcome["views"]]
            streams, replayed.surroundings = outcomes[0]["streams"], outcomes[0]["surroundings"]
            if not is_last:
                made = complete(place, attempt=stretch.attempt, step=stretch.last, world_size=num_processes)
                origin = Origin(root=str(place), resume=made)
    return replayed


def _run(job: Job, done: int, progress: Progress) -> list[Mapping[str, Any]]:
    """Every process's outcome, by rank. They are gone when this returns or raises."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["keepstep.trainer.preload"])
    outcomes: dict[int, Mapping[str, Any]] = {}
    with _started(context, job) as (processes, ends):
        while len(outcomes) < job.num_processes:
            ready = wait(list(ends), _SILENCE_S)
            if not ready:
                raise ReplayFailed(f"no process of the replay has said anything for {_SILENCE_S:g} s: is one of them stopped?")
            for end in ready:
                rank = ends[end]  # type: ignore[index]
                message = _receive(end, processes[rank])  # type: ignore[arg-type]
                if _error(message, rank) is not None:
                    raise _cause(message, rank, ends, processes)
                if "outcome" in message:
                    outcomes[rank] = message["outcome"]
                    del ends[end]  # type: ignore[arg-type]
                elif rank == 0:
                    progress(done + message["done"])
    return [outcomes[rank] for rank in range(job.num_processes)]


@contextlib.contextmanager
def _started(context: Any, job: Job) -> Iterator[tuple[list[BaseProcess], dict[Connection, int]]]:
    """The processes, and what they talk through -> their rank."""
    from .replaying import replay_rank  # the module alone is torch-free; it imports torch in the process

    pipes = [context.Pipe(duplex=False) for _ in range(job.num_processes)]
    environment = {name: value for name, value in os.environ.items() if name.startswith("KEEPSTEP_")}  # the forkserver may be older
    processes = [
        context.Process(target=replay_rank, args=(job, rank, send, environment), daemon=True) for rank, (_, send) in enumerate(pipes)
    ]
    try:
        for process, (_, send) in zip(processes, pipes, strict=True):
            process.start()
            send.close()
        yield processes, {receive: rank for rank, (receive, _) in enumerate(pipes)}
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
        for pipe in pipes:
            for end in pipe:
                end.close()


def _receive(end: Connection, process: BaseProcess) -> Mapping[str, Any]:
    """A process's next message, or that there will be none."""
    try:
        message: Mapping[str, Any] = end.recv()
    except EOFError:
        process.join(_MOMENT_S)
        return {"ended": process.exitcode}
    return message


def _error(message: Mapping[str, Any], rank: int) -> Exception | None:
    """What a message is to us when it tells of a failure."""
    if damaged := message.get("damaged"):
        return DamagedCheckpoint(*damaged)
    if why := message.get("why"):
        return ReplayFailed(f"rank {rank}: {why}")
    if "ended" in message:
        return ReplayFailed(f"process {rank} of the replay ended with exit code {message['ended']}")
    return None


def _cause(message: Mapping[str, Any], rank: int, ends: Mapping[Connection, int], processes: Sequence[BaseProcess]) -> Exception:
    """After the first failure that was heard of: of all that is heard in a moment, what is no consequence of another one's."""
    failures = {rank: message}
    others = {end: other for end, other in ends.items() if other != rank}
    until = time.monotonic() + _MOMENT_S
    while others and "damaged" not in failures[rank] and (left_s := until - time.monotonic()) > 0:
        for end in wait(list(others), left_s):
            other = others[end]  # type: ignore[index]
            heard = _receive(end, processes[other])  # type: ignore[arg-type]
            if "done" not in heard:
                del others[end]  # type: ignore[arg-type]
            if _error(heard, other) is not None:
                failures[other] = heard
        rank = min(failures, key=lambda each: 0 if "damaged" in failures[each] else 2 if failures[each].get("lost_peer") else 1)
    error = _error(failures[rank], rank)
    assert error is not None
    return error
