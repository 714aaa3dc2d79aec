"""Real ranks for tests of the trainer: forked processes with gloo between them, and a staging area that writes straight to a folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from keepstep.storage.arena import Buffer
from keepstep.storage.canonical import canonical_json
from keepstep.storage.layout import steps_key
from keepstep.storage.manifest import Manifest, RankIndex, merge
from keepstep.storage.records import Attempt, Commit
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store
from keepstep.trainer import handover
from keepstep.trainer.attach import Attached
from keepstep.trainer.contract import ENV_SPEC, PROGRESS_BYTES, RankSpec, Resume

DEADLINE_S = 120.0
TINY = {
    "data": {"tokenizer": "bytes"},
    "model": {"layers": 2, "width": 32, "heads": 2, "context": 16, "dropout": 0.1},
    "optimizer": {"warmup_steps": 2},
    "train": {"batch_tokens": 128},
    "evaluate": {"max_tokens": 500},
}


class FolderStaging(handover.FolderStaging):
    """Like a persister's, its buffer keeps its bytes for the next save; and it keeps step records."""

    def __init__(self, root: Path, *, attempt: int, rank: int, world_size: int) -> None:
        super().__init__(root, attempt, rank, world_size)
        self.template = ""
        self.records: list[dict[str, Any]] = []

    def buffer(self, num_bytes: int, template: str = "") -> Buffer:
        fresh = len(self._memory) != num_bytes or self.template != template
        if fresh:
            self._memory, self.template = bytearray(num_bytes), template
        return Buffer(view=memoryview(self._memory), fresh=fresh)

    def record_step(self, record: Mapping[str, Any]) -> None:
        self.records.append(dict(record))
        with (self.folder / "records.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        Store.open(self.folder).append(steps_key(self.attempt), canonical_json(dict(record)))

    def resident(self, directory: str, file_name: str) -> None:
        return None


def commit(root: Path, directory: str) -> Resume:
    """What the coordinator does with complete rank indexes; the manifest's place in the root."""
    folder = root / directory
    manifest = merge([RankIndex.parse(path.read_bytes()) for path in sorted(folder.glob("rank-*.json"))])
    (folder / "MANIFEST.json").write_bytes(manifest.body())
    return Resume(step=manifest.step, directory=directory, manifest_sha256=manifest.sha256())


def write_log(root: Path, world_size: int, commits: Sequence[Resume]) -> None:
    """A term, attempt 1 and its commits."""
    log = RunLog.open(Store.open(root))
    log.open_term(run="test", identity="x", host="here", pid=1)
    log.append(Attempt(term=1, attempt=1, nodes=("n#1",), world_size=world_size, nonce="nonce1"))
    for made in commits:
        log.append(
            Commit(
                term=1,
                attempt=1,
                step=made.step,
                directory=made.directory,
                manifest_sha256=made.manifest_sha256,
                world_size=world_size,
            )
        )


def manifest_of(root: Path, resume: Resume) -> Manifest:
    return Manifest.parse((root / resume.directory / "MANIFEST.json").read_bytes())


def train_ranks(
    root: Path,
    config: Mapping[str, Any],
    *,
    world_size: int,
    attempt: int = 1,
    resume: Resume | None = None,
    stop_at: int = 0,
    mutant: str = "",
    skips: tuple[str, ...] = (),
    ranks_per_node: int = 0,
) -> None:
    """One attempt of `config` (sections of run.toml): every rank in its own process, checkpoints and records below `root`.

    Args:
        stop_at: the agents ask for a stop at this step; 0: never.
        mutant: "rng", "optimizer" or "carried": forgets to restore that; "cores": runs on a node that would compute with more threads.
        ranks_per_node: 0: one node has all of them.
    """
    arguments = str(root), dict(config), attempt, resume, stop_at, mutant, skips
    run_ranks(world_size, _train, *arguments, ranks_per_node=ranks_per_node)


def _train(
    rank: int,
    world_size: int,
    root: str,
    config: Mapping[str, Any],
    attempt: int,
    resume: Resume | None,
    stop_at: int,
    mutant: str,
    skips: tuple[str, ...] = (),
) -> None:
    from keepstep.trainer.config import TrainerConfig
    from keepstep.trainer.contract import Request
    from keepstep.trainer.loop import train
    from keepstep.trainer.parallel import join
    from keepstep.trainer.run import open_run

    class Me(Attached):
        def request(self) -> Request:
            return Request.STOP if stop_at and run.step + 1 >= stop_at else Request.NONE

    me = Me(replace(spec_of(Path(root), rank, attempt, resume), skips=skips))
    me.__dict__["staging"] = FolderStaging(Path(root), attempt=attempt, rank=rank, world_size=world_size)
    _mutate(mutant)
    parsed = TrainerConfig.model_validate(config)
    run = open_run(parsed, me, join(me, train=parsed.train))
    train(run)


def _mutate(mutant: str) -> None:
    from keepstep.trainer import rng, run

    if mutant == "rng":
        rng.STREAMS = {name: replace(stream, restore=lambda saved: None) for name, stream in rng.STREAMS.items()}
    if mutant == "cores":
        os.environ["OMP_NUM_THREADS"] = "2"
    whole = run.resume
    if mutant == "optimizer":
        run.resume = lambda me, tensors, registry: whole(me, {"model": tensors["model"]}, registry)
    if mutant == "carried":
        run.resume = lambda me, tensors, registry: whole(me, {name: of for name, of in tensors.items() if name != "carried"}, registry)


def spec_of(root: Path, rank: int, attempt: int, resume: Resume | None) -> RankSpec:
    scratch = root / "scratch"
    scratch.mkdir(exist_ok=True)
    page = scratch / f"progress-{attempt}-{rank}"
    page.write_bytes(bytes(PROGRESS_BYTES))
    return RankSpec(
        run="test",
        attempt=attempt,
        nonce=f"nonce{attempt}",
        root=str(root),
        config_path="",
        scratch=str(scratch),
        progress_path=str(page),
        staging_socket="",
        error_path="",
        resume=resume,
    )


def run_ranks(world_size: int, target: Callable[..., None], *arguments: Any, ranks_per_node: int = 0) -> None:
    """Calls target(rank, world_size, *arguments) in `world_size` processes with torchrun's environment. AssertionError if one fails."""
    from torch.distributed import TCPStore

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["keepstep.trainer.preload"])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    queue = context.SimpleQueue()
    ranks = [
        context.Process(target=_enter, args=(seat, world_size, store.port, queue, target, arguments))  # no daemon: it may have workers
        for seat in _seats(world_size, ranks_per_node or world_size)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(DEADLINE_S)
    finally:
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
    assert codes == [0] * world_size, "\n".join(queue.get() for _ in range(world_size) if not queue.empty()) or f"exit codes {codes}"


def _seats(world_size: int, ranks_per_node: int) -> list[tuple[int, int, int]]:
    """(rank, its number on its node, ranks of that node)."""
    return [(rank, rank % ranks_per_node, ranks_per_node) for rank in range(world_size)]


def _enter(
    seat: tuple[int, int, int], world_size: int, port: int, queue: Any, target: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    rank, local_rank, local_size = seat
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }
    os.environ.pop(ENV_SPEC, None)
    torch.set_num_threads(1)
    try:
        target(rank, world_size, *arguments)
    except BaseException:
        queue.put(f"rank {rank}: {traceback.format_exc()}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
