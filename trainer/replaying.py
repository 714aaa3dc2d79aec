"""One process of a replay: a rank like those of the run, but for its persister and its agent.

Importing this module costs nothing; torch comes with the first call, in the process.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
from collections.abc import Mapping
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keepstep.storage.faults import fault_point
from keepstep.storage.store import Store
from keepstep.storage.verify import read_manifest

from .attach import Attached
from .config import TrainerConfig
from .contract import ENV_SPEC, RankSpec
from .handover import NONCE, FolderStaging
from .replay import Job

if TYPE_CHECKING:
    from .run import Run
    from .serial import SerialEngine

_PROGRESS_STEPS = 10  # between two words to the parent
# What gloo, NCCL and c10d say when another process died; a consequence, never the cause. See also orchestrator/exits.py.
_LOST_PEER = re.compile(
    r"peer|broken pipe|socket|connection|failed to recv|remote process|timed out|pair closure|RemoteError", re.IGNORECASE
)


class Replaying(Attached):
    """A rank that nobody watches; what it would have written down stays in `records`."""

    def __init__(self, spec: RankSpec, rank: int, world_size: int, num_nodes: int) -> None:
        super().__init__(None)
        self.spec = spec
        self.rank = self.local_rank = rank
        self.world_size, self.local_world_size = world_size, world_size // num_nodes  # on one machine, but grouped as they were
        self.records: list[dict[str, Any]] = []

    @property
    def staging(self) -> None:
        """Nothing is saved."""
        return None

    def record_step(self, record: Mapping[str, Any]) -> None:
        if "step" in record:
            self.records.append(dict(record))


def replay_rank(job: Job, rank: int, telling: Connection, environment: Mapping[str, str]) -> None:
    """The process's whole life. It dies with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a person's Ctrl-C is the parent's, and it kills
    _die_with_parent()
    logging.basicConfig(level=logging.ERROR)
    _set_environment(job, rank, environment)
    try:
        telling.send({"outcome": _replay(job, rank, telling)})
    except Exception as error:  # noqa: BLE001  (the process's entry: the parent says it)
        telling.send(_failure(error))


def _die_with_parent() -> None:
    """Our forkserver ends with whoever started it, and the kernel kills us with the forkserver; also one of us that is stopped."""
    import torch

    if (alive := forkserver._forkserver._forkserver_alive_fd) is not None:  # type: ignore[attr-defined]  # handed on to every process:
        os.close(alive)  # while one of them holds it open, the forkserver waits
        forkserver._forkserver._forkserver_alive_fd = None  # type: ignore[attr-defined]
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # type: ignore[attr-defined]
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        os._exit(1)


def _failure(error: Exception) -> dict[str, Any]:
    from .restore import ResumeDamaged

    if isinstance(error, ResumeDamaged) and error.__cause__ is not None:
        return {"damaged": error.__cause__.__reduce__()[1]}
    return {"why": f"{type(error).__name__}: {error}", "lost_peer": isinstance(error, RuntimeError) and bool(_LOST_PEER.search(str(error)))}


def _set_environment(job: Job, rank: int, environment: Mapping[str, str]) -> None:
    threads = job.stretch.threads or (1 if job.stretch.world_size > 1 else 0)  # as torchrun sets it for several ranks of a node
    os.environ |= {
        **environment,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(job.num_processes),
        "LOCAL_WORLD_SIZE": str(job.num_processes),
        "GLOO_SOCKET_IFNAME": "lo",
        **({"OMP_NUM_THREADS": str(threads)} if threads else {}),
    }
    os.environ.pop(ENV_SPEC, None)


def _replay(job: Job, rank: int, telling: Connection) -> dict[str, Any]:
    """Collective. Every step of the stretch; what the parent wants of it."""
    import torch.distributed as dist

    from .loop import advance
    from .observed import observe
    from .parallel import join
    from .run import open_run
    from .surroundings import surroundings

    stretch, view = job.stretch, job.view
    in_turn = job.num_processes != stretch.world_size
    config = _for_one_process(stretch.config) if in_turn else stretch.config
    me = Replaying(_spec(job), rank, job.num_processes, 1 if in_turn else stretch.num_nodes)
    meeting = dist.FileStore(str(Path(job.folder, "meeting")), job.num_processes)  # type: ignore[attr-defined]
    run = open_run(config, me, join(me, meeting, train=config.train))
    assert run.step == stretch.after
    serial = _in_turn(job, run)
    views = []
    for step in range(stretch.after + 1, stretch.last + 1):
        parts = run.share[step]
        if view is not None and view.step == step:
            views.append(observe(run, parts, view, partial(advance, run, parts)))
        else:
            advance(run, parts)
        fault_point("rank.replay", rank=rank, step=step)
        if step % _PROGRESS_STEPS == 0:
            telling.send({"done": step - stretch.after})
    if job.hands_over:
        _hand_over(job, run)
    dist.destroy_process_group()
    return {"records": me.records, "views": views, "streams": tuple(serial.streams) if serial else (), "surroundings": surroundings()}


def _for_one_process(config: TrainerConfig) -> TrainerConfig:
    """It has nobody to share the model with."""
    return config.model_copy(update={"train": config.train.model_copy(update={"sharding": "full", "tensor_parallel": 1})})


def _in_turn(job: Job, run: Run) -> SerialEngine | None:
    """Where one process does the work of several ranks, its engine; with exact reduction the usual one does it already."""
    from . import rng
    from .serial import SerialEngine, streams_after_resume

    num_ranks = job.stretch.world_size // job.stretch.config.train.tensor_parallel  # a group of several computes one share
    if run.config.cluster.exact_reduction:
        return None
    if job.stretch.world_size == job.num_processes:
        if job.derives:  # as many processes handed the state over, so open_run took what the share that came last had drawn from
            rng.seed_everything(run.config.run.seed, run.step, run.world.data_rank)
        return None
    saved = job.streams or _saved_streams(job)
    run.engine = SerialEngine(run.engine, streams_after_resume(saved, num_ranks, seed=run.config.run.seed, step=run.step))
    return run.engine


def _saved_streams(job: Job) -> list[Mapping[str, Any]]:
    """Of every rank that saved the checkpoint; of one of each tensor-parallel group, whose streams are alike."""
    from .registry import PARTS, TENSOR_PARALLEL
    from .rng import streams_in

    if job.origin is None:
        return []
    resume = job.origin.resume
    manifest = read_manifest(Store.open(job.origin.root), resume.directory, resume.manifest_sha256)
    saved = manifest.ranks[:: manifest.ranks[0].state.get(TENSOR_PARALLEL, 1)]
    return [streams_in(rank.state[PARTS]) for rank in saved]


def _hand_over(job: Job, run: Run) -> None:
    """Collective. The state after the last step, as a checkpoint in this machine's folder."""
    from .checkpoint import Checkpointer

    stretch, world = job.stretch, run.world
    staging = FolderStaging(Path(job.folder), attempt=stretch.attempt, rank=world.rank, world_size=world.size)
    Checkpointer(staging, rank=world.rank, attempt=stretch.attempt, nonce=NONCE).save(run.step, run.tensors, run.rank_state().to_json())


def _spec(job: Job) -> RankSpec:
    stretch, origin = job.stretch, job.origin
    return RankSpec(
        run=stretch.config.run.name,
        attempt=stretch.attempt,
        nonce=NONCE,
        root=origin.root if origin else stretch.config.run.root,
        config_path="",
        scratch=job.folder,
        progress_path="",
        staging_socket="",
        error_path="",
        resume=origin.resume if origin else None,
        skips=stretch.skips,
    )
