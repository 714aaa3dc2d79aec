"""What a rank handed over, and how it becomes durable: files and hashes in one pass, step lines, and the rank index last."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .arena import StagedFile
from .errors import StorageError, StoreError, StoreFull
from .faults import fault_point
from .layout import rank_index_name
from .manifest import BLOCK_BYTES, FileEntry, RankIndex, TensorEntry, hash_block, split_blocks
from .store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One rank's part of one checkpoint, in shared memory.

    check: raises TornStage unless `data` is still what the rank submitted; nothing to check where nobody else has this memory.
    """

    attempt: int
    rank: int
    world_size: int
    step: int
    directory: str
    files: tuple[StagedFile, ...]
    tensors: tuple[TensorEntry, ...]
    state: Mapping[str, Any]
    data: memoryview
    check: Callable[[], None] = lambda: None

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def persist(store: Store, submission: Submission, flush_steps: Callable[[], None], hear: Sequence[Callable[[int], None]] = ()) -> bytes:
    """Makes a submission durable, its rank index last; the bytes of that.

    Args:
        hear: called with the bytes of each block before it is written; may wait.

    Raises:
        StoreError: it is not durable; a later try may be.
        StorageError: another save of this step took the names, or the stage is torn; no try will help.
    """
    facts = {"rank": submission.rank, "step": submission.step, "attempt": submission.attempt}
    fault_point("persister.shards.before", **facts)
    submission.check()
    files = _write_files(store, submission, hear)
    submission.check()  # nobody has written into the bytes while they were hashed and written out
    fault_point("persister.shards.after", **facts)
    flush_steps()
    body = _index(submission, files).body()
    key = f"{submission.directory}/{rank_index_name(submission.rank)}"
    if not store.put_new(key, body):
        raise StorageError(f"{key} exists with other content: step {submission.step} of attempt {submission.attempt} was saved twice")
    fault_point("persister.index.after", **facts)
    return body


def _write_files(store: Store, submission: Submission, hear: Sequence[Callable[[int], None]]) -> tuple[FileEntry, ...]:
    """A full disk needs the space of half a save for the next one. Without its rank index, nobody can have committed it."""
    try:
        return tuple(_write_file(store, submission, file, hear, is_first=index == 0) for index, file in enumerate(submission.files))
    except StoreFull:
        for file in submission.files:
            with contextlib.suppress(StoreError):  # what stays is swept as garbage one day
                store.delete(f"{submission.directory}/{file.name}")
        raise


def _index(submission: Submission, files: tuple[FileEntry, ...]) -> RankIndex:
    return RankIndex(
        attempt=submission.attempt,
        step=submission.step,
        rank=submission.rank,
        world_size=submission.world_size,
        directory=submission.directory,
        files=files,
        tensors=submission.tensors,
        state=submission.state,
    )


def _write_file(
    store: Store, submission: Submission, file: StagedFile, hear: Sequence[Callable[[int], None]], *, is_first: bool
) -> FileEntry:
    data = submission.data[file.offset : file.offset + file.num_bytes]
    hashes: list[str] = []
    blocks = _hashed(data, hashes, hear)
    if is_first:
        blocks = _with_fault_in_the_middle(blocks, data.nbytes, submission)
    store.write_file(f"{submission.directory}/{file.name}", blocks, num_bytes=data.nbytes)
    return FileEntry(name=file.name, num_bytes=data.nbytes, block_bytes=BLOCK_BYTES, hashes=tuple(hashes))


def _hashed(data: memoryview, hashes: list[str], hear: Sequence[Callable[[int], None]]) -> Iterator[memoryview]:
    """Each block is hashed just before it is written, or while those before it are."""
    for block in split_blocks(data):
        for listener in hear:
            listener(block.nbytes)
        hashes.append(hash_block(block))
        yield block


def _with_fault_in_the_middle(blocks: Iterator[memoryview], num_bytes: int, submission: Submission) -> Iterator[memoryview]:
    """The same bytes; passes the fault point when half of them are written."""
    done, middle = 0, num_bytes // 2
    for block in blocks:
        cut = middle - done
        if 0 < cut <= block.nbytes:
            yield block[:cut]
            fault_point("persister.shards.middle", rank=submission.rank, step=submission.step, attempt=submission.attempt)
            yield block[cut:]
        else:
            yield block
        done += block.nbytes
