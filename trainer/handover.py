"""A checkpoint in a folder of this machine, written by the ranks themselves: the state on its way from one set of ranks to the next.

The same bytes as a checkpoint of the run, so that whoever takes over resumes from it as a restarted attempt does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from keepstep.storage.arena import Buffer, StagedFile
from keepstep.storage.layout import MANIFEST_NAME, checkpoint_directory, rank_index_name
from keepstep.storage.manifest import FileEntry, RankIndex, TensorEntry, hash_blocks, merge

from .contract import Resume

NONCE: Final = "handover"  # nobody else writes into the folder


@dataclass(slots=True)
class FolderStaging:
    """What `Checkpointer` needs of a persister. What was submitted is in the folder when `submit` returns."""

    folder: Path
    attempt: int
    rank: int
    world_size: int
    last_error: str = ""
    busy: bool = False
    _memory: bytearray = field(default_factory=bytearray)

    def reserve(self, num_bytes: int) -> None:
        """Memory is taken when it is needed."""

    def buffer(self, num_bytes: int, template: str = "") -> Buffer:
        self._memory = bytearray(num_bytes)
        return Buffer(view=memoryview(self._memory), fresh=True)

    def submit(
        self,
        *,
        directory: str,
        step: int,
        files: Sequence[StagedFile],
        tensors: Sequence[TensorEntry],
        state: Mapping[str, Any],
        patience_s: float,
    ) -> None:
        place = self.folder / directory
        place.mkdir(parents=True, exist_ok=True)
        index = RankIndex(
            attempt=self.attempt,
            step=step,
            rank=self.rank,
            world_size=self.world_size,
            directory=directory,
            files=tuple(self._write(place, file) for file in files),
            tensors=tuple(tensors),
            state=state,
        )
        (place / rank_index_name(self.rank)).write_bytes(index.body())

    def _write(self, place: Path, file: StagedFile) -> FileEntry:
        body = memoryview(self._memory)[file.offset : file.offset + file.num_bytes]
        (place / file.name).write_bytes(body)
        return FileEntry(name=file.name, num_bytes=file.num_bytes, hashes=hash_blocks(body))

    def wait_idle(self, deadline_s: float) -> bool:
        return True


def complete(folder: Path, *, attempt: int, step: int, world_size: int) -> Resume:
    """Merges what all ranks have written; what the next ones resume from."""
    directory = checkpoint_directory(attempt, step, NONCE)
    indexes = (folder / directory / rank_index_name(rank) for rank in range(world_size))
    manifest = merge([RankIndex.parse(path.read_bytes()) for path in indexes])
    (folder / directory / MANIFEST_NAME).write_bytes(manifest.body())
    return Resume(step=step, directory=directory, manifest_sha256=manifest.sha256())
