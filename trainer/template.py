"""The bytes of a rank's `__<rank>_0.distcp`, known before any tensor has a value.

torch.distributed.checkpoint stores each tensor as the output of torch.save, a zip archive: some headers, the raw bytes, a trailer. All
but the raw bytes depends on dtype and shape alone (torch.save's CRCs switched off, which torch.load does not read). So a rank lays its
file out once; a save copies tensors to known offsets of a buffer, and the result is a file that stock DCP reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, Final, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

ALIGNMENT: Final = 64  # of each archive in the file; torch.save aligns the raw bytes to the same within it


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """What torch.save writes around the raw bytes of any tensor of one dtype and shape."""

    num_bytes: int  # of the whole archive
    data_offset: int
    data_bytes: int
    pieces: tuple[tuple[int, bytes], ...]  # (offset, bytes) of everything but the raw bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """One tensor chunk in the file."""

    index: MetadataIndex
    dtype: torch.dtype
    shape: tuple[int, ...]
    starts: tuple[int, ...]
    global_shape: tuple[int, ...]
    offset: int  # of the archive
    pattern: Pattern

    @property
    def data_offset(self) -> int:
        return self.offset + self.pattern.data_offset


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A rank's file."""

    num_bytes: int
    placed: tuple[Placed, ...]

    def prefill(self, buffer: memoryview) -> None:
        """Writes everything but the raw bytes; `buffer` is the file."""
        for entry in self.placed:
            for offset, piece in entry.pattern.pieces:
                start = entry.offset + offset
                buffer[start : start + len(piece)] = piece

    def views(self, buffer: memoryview) -> list[Tensor]:
        """Tensors whose memory is the raw bytes of each chunk in `buffer`."""
        return [
            torch.frombuffer(buffer, dtype=entry.dtype, count=_numel(entry.shape), offset=entry.data_offset).view(entry.shape)
            for entry in self.placed
        ]


def lay_out(items: Iterable[WriteItem]) -> Template:
    """The file that holds these items of a DCP save plan, in their order.

    A pure function of the items: any rank can lay out any other's.
    """
    placed: list[Placed] = []
    end = 0
    for item in items:
        data = item.tensor_data
        assert data is not None, "only tensors go into a checkpoint's state dict"
        assert data.chunk is not None
        pattern = pattern_of(data.properties.dtype, tuple(data.chunk.sizes))
        entry = Placed(
            index=item.index,
            dtype=data.properties.dtype,
            shape=tuple(data.chunk.sizes),
            starts=tuple(data.chunk.offsets),
            global_shape=tuple(data.size),
            offset=end,
            pattern=pattern,
        )
        placed.append(entry)
        end = -(-(end + pattern.num_bytes) // ALIGNMENT) * ALIGNMENT
    return Template(num_bytes=end, placed=tuple(placed))


@lru_cache(maxsize=4096)
def pattern_of(dtype: torch.dtype, shape: tuple[int, ...]) -> Pattern:
    """Lets torch.save write a stand-in without values and keeps all but its raw bytes. Touches no memory of the tensor's size."""
    stand_in = torch.empty(shape, dtype=dtype)
    recorder = _Recorder(stand_in)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(stand_in, cast("IO[bytes]", recorder))
    finally:
        torch.serialization.set_crc32_options(before)
    assert recorder.data_offset is not None, "torch.save did not write the tensor's own memory in one piece"
    return Pattern(
        num_bytes=recorder.num_bytes, data_offset=recorder.data_offset, data_bytes=stand_in.nbytes, pieces=tuple(recorder.joined())
    )


class _Recorder:
    """A file that keeps what is written to it, except the memory of one tensor, of which it keeps the place."""

    def __init__(self, tensor: Tensor) -> None:
        self._address, self._size = tensor.data_ptr(), tensor.nbytes
        self._pieces: list[tuple[int, bytes]] = []
        self.num_bytes = 0
        self.data_offset: int | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if size == self._size and _address(data) == self._address:
            self.data_offset = self.num_bytes
        else:
            self._pieces.append((self.num_bytes, bytes(data)))
        self.num_bytes += size
        return size

    def flush(self) -> None:
        """torch.save flushes what it was given."""

    def joined(self) -> Sequence[tuple[int, bytes]]:
        """Header and trailer in one piece each."""
        runs: list[tuple[int, bytearray]] = []
        for offset, piece in self._pieces:
            if runs and runs[-1][0] + len(runs[-1][1]) == offset:
                runs[-1][1].extend(piece)
            else:
                runs.append((offset, bytearray(piece)))
        return [(offset, bytes(run)) for offset, run in runs]


def _address(data: Any) -> int:
    """Where the bytes of a buffer lie, read-only ones too."""
    return int(np.frombuffer(data, dtype=np.uint8).__array_interface__["data"][0])


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
