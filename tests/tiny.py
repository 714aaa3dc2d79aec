"""A run without torch: ranks' parts, commits, retirement and takeovers through the real code; every byte can be computed again."""

from __future__ import annotations

import random
from collections.abc import Callable

from keepstep.orchestrator import events as ev
from keepstep.orchestrator.commits import write_manifest
from keepstep.orchestrator.janitor import Hooks, Janitor
from keepstep.orchestrator.logbook import Logbook
from keepstep.orchestrator.wire import Persisted
from keepstep.storage.arena import StagedFile
from keepstep.storage.canonical import sha256_hex
from keepstep.storage.layout import METADATA_NAME, checkpoint_directory, shard_name
from keepstep.storage.manifest import Manifest, RankIndex, TensorEntry
from keepstep.storage.records import Attempt, Commit
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store
from keepstep.storage.submission import Submission, persist
from keepstep.storage.verify import verify_checkpoint
from keepstep.trainer.config import CheckpointSection

SHARD_BYTES = 900
INTERVAL = 10
KEEP = 2

OnDamage = Callable[[str, str], None]  # (directory, why), when a scrub finds damage
Tell = Callable[[str, int], None]  # (what is known now, of which step)


def shard_bytes(attempt: int, step: int, rank: int) -> bytes:
    """Different for every attempt: a mixture of two is no checkpoint."""
    return random.Random(f"{attempt} {step} {rank}").randbytes(SHARD_BYTES)


def metadata_bytes(attempt: int, step: int) -> bytes:
    return f"what torch.distributed.checkpoint keeps beside the tensors of attempt {attempt}, step {step:06d}".encode()


class TinyRun:
    """One reign: a coordinator and the persisters of its ranks in one thread.

    Args:
        tell: hears ("attempt", number), ("saving", step) before, ("whole", step) when every part is durable and ("committed", step)
            when the commit record is acknowledged.
        on_damage: by default damage is an AssertionError.
    """

    def __init__(
        self,
        store: Store,
        *,
        world_size: int = 2,
        keep: int = KEEP,
        tell: Tell = lambda what, step: None,
        on_damage: OnDamage | None = None,
    ) -> None:
        self.store = store
        self.world_size = world_size
        self.tell = tell
        self.log = RunLog.open(store)
        self.term = self.log.open_term(run="tiny", identity="tiny", host="tiny", pid=1).term
        self.logbook = Logbook(self.log, self.term)
        hooks = Hooks(damaged=on_damage or quarantines_nothing, say=lambda kind, why: None, broke=raise_again)
        self.janitor = Janitor(store, self.log, CheckpointSection(keep=keep), hooks)

    def launch(self) -> Attempt:
        """Rolls forward what a predecessor left whole, then begins an attempt at the newest committed checkpoint."""
        found = self.logbook.carry_out(ev.FindCheckpoint())
        assert isinstance(found, ev.Found)
        last = self.log.newest_attempt()
        number = last.attempt + 1 if last else 1
        request = ev.LogAttempt(attempt=number, gang=("tiny#1",), world_size=self.world_size, resume=found.resume)
        assert isinstance(self.logbook.carry_out(request), ev.Logged)
        self.tell("attempt", number)
        return self.attempt

    @property
    def attempt(self) -> Attempt:
        newest = self.log.newest_attempt()
        assert newest
        return newest

    @property
    def newest_step(self) -> int:
        newest = self.log.lineage.newest_committed()
        return newest.step if newest else 0

    def save(self, step: int) -> None:
        """Every rank's part, manifest, commit record, housekeeping."""
        self.tell("saving", step)
        request = self.persist(step)
        self.tell("whole", step)
        self.commit(request)
        self.tidy()

    def persist(self, step: int) -> ev.Commit:
        directory = checkpoint_directory(self.attempt.attempt, step, self.attempt.nonce)
        bodies = [persist(self.store, self.submission(step, rank, directory), lambda: None) for rank in range(self.world_size)]
        indexes = tuple(reported(RankIndex.parse(body)) for body in bodies)
        return ev.Commit(attempt=self.attempt.attempt, step=step, directory=directory, indexes=indexes)

    def submission(self, step: int, rank: int, directory: str) -> Submission:
        """A shard, and from rank 0 a second file."""
        metadata = metadata_bytes(self.attempt.attempt, step)
        data = shard_bytes(self.attempt.attempt, step, rank) + metadata
        files = [StagedFile(name=shard_name(rank), offset=0, num_bytes=SHARD_BYTES)]
        if rank == 0:
            files.append(StagedFile(name=METADATA_NAME, offset=SHARD_BYTES, num_bytes=len(metadata)))
        return Submission(
            attempt=self.attempt.attempt,
            rank=rank,
            world_size=self.world_size,
            step=step,
            directory=directory,
            files=tuple(files),
            tensors=(tensor_of(rank, self.world_size),),
            state={"rng": f"{self.attempt.attempt} {step} {rank}"},
            data=memoryview(data),
        )

    def commit(self, request: ev.Commit) -> None:
        self.logbook.commit(write_manifest(self.store, request))
        self.tell("committed", request.step)

    def tidy(self) -> None:
        """What a coordinator does beside the training: hint and snapshot, read back, retire, clear away."""
        assert self.log.tidy()
        self.janitor.round()


def quarantines_nothing(directory: str, why: str) -> None:
    raise AssertionError(f"{directory} is damaged: {why}")


def raise_again(error: BaseException) -> None:
    raise error


def tensor_of(rank: int, world_size: int) -> TensorEntry:
    """A vector of bytes, cut evenly."""
    return TensorEntry(
        name="w",
        file=shard_name(rank),
        offset=0,
        num_bytes=SHARD_BYTES,
        dtype="torch.uint8",
        shape=(SHARD_BYTES,),
        starts=(rank * SHARD_BYTES,),
        global_shape=(world_size * SHARD_BYTES,),
    )


def reported(index: RankIndex) -> Persisted:
    """What the persister tells its agent."""
    of = {"attempt": index.attempt, "step": index.step, "rank": index.rank, "directory": index.directory, "num_bytes": index.num_bytes}
    return Persisted(index_sha256=sha256_hex(index.body()), **of)


def load(store: Store, commit: Commit) -> Manifest:
    """Reads a checkpoint as a restore does; raises DamagedCheckpoint, and AssertionError when bytes that verified are not those saved."""
    manifest = verify_checkpoint(store, commit.directory, commit.manifest_sha256)
    assert (manifest.attempt, manifest.step, manifest.world_size) == (commit.attempt, commit.step, commit.world_size)
    for index in manifest.ranks:
        body = store.get(f"{commit.directory}/{shard_name(index.rank)}")
        assert body == shard_bytes(commit.attempt, commit.step, index.rank)
        assert index.state == {"rng": f"{commit.attempt} {commit.step} {index.rank}"}
    assert store.get(f"{commit.directory}/{METADATA_NAME}") == metadata_bytes(commit.attempt, commit.step)
    return manifest
