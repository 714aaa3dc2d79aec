"""A checkpoint of four ranks in worlds of other sizes: the unsharded tensors are the same to the last bit."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded_state import STEP, commit_saved, folder_of, same_bits, save, sharded, simulated, whole_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from trainer_ranks import manifest_of, run_ranks

from keepstep.storage.manifest import Manifest, RankIndex, TensorEntry
from keepstep.storage.store import Store
from keepstep.storage.verify import CheckpointReader, Piece
from keepstep.trainer.checkpoint import dtype_name
from keepstep.trainer.contract import Resume
from keepstep.trainer.parallel import chunks_of
from keepstep.trainer.restore import restore
from keepstep.trainer.state import byte_view, flatten

SAVED_BY = 4
WORLDS = (4, 1, 2, 3, 8)  # the first one saves


def save_and_load_in_every_world(rank: int, _: int, root: str) -> None:
    """Eight processes, of which the first n form a world of n, one world after the other."""
    meeting = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
    for world_size in WORLDS:
        if rank < world_size:
            dist.init_process_group("gloo", store=dist.PrefixStore(f"{world_size}", meeting), rank=rank, world_size=world_size)
            if world_size == SAVED_BY:
                save_part(rank, world_size, Path(root))
            load_and_compare(world_size, Path(root))
            dist.destroy_process_group()
        meeting.set(f"{world_size} {rank}", b"done")
        meeting.wait([f"{world_size} {other}" for other in range(max(WORLDS))])


def save_part(rank: int, world_size: int, root: Path) -> None:
    save(rank, world_size, str(root))
    dist.barrier()
    if rank == 0:
        commit_saved(root)
    dist.barrier()


def load_and_compare(world_size: int, root: Path) -> None:
    from keepstep.trainer.parallel import whole

    state = whole_state()
    tensors = sharded(zeros(state), init_device_mesh("cpu", (world_size,)))
    resume = Resume(step=STEP, directory=str(folder_of(root).relative_to(root)), manifest_sha256="")
    reader = CheckpointReader(Store.open(root), resume.directory, manifest_of(root, resume))
    restored = restore(reader.manifest, reader, tensors)
    assert world_size != SAVED_BY or not restored.resharded
    for name, tensor in flatten(tensors).items():
        assert same_bits(whole(tensor), flatten(state)[name]), f"{name} in a world of {world_size}"


@pytest.mark.slow
def test_model_and_optimizer_of_four_ranks_are_the_same_in_worlds_of_one_two_three_and_eight(tmp_path: Path) -> None:
    run_ranks(max(WORLDS), save_and_load_in_every_world, str(tmp_path))


def zeros(state: dict[str, Any]) -> dict[str, Any]:
    return {name: zeros(value) if isinstance(value, dict) else torch.zeros_like(value) for name, value in state.items()}


class Bytes:
    """A verified reader of one file in memory."""

    def __init__(self) -> None:
        self.body = b""
        self.bytes_read = 0

    def read_pieces(self, pieces: Iterable[Piece], /) -> None:
        for piece in pieces:
            piece.destination[:] = self.body[piece.offset : piece.offset + piece.destination.nbytes]
            self.bytes_read += piece.destination.nbytes


def save_simulated(whole: torch.Tensor, placement: Any, world_size: int) -> tuple[Manifest, Bytes]:
    file, entries = Bytes(), []
    for rank in range(world_size if placement.is_shard() else 1):
        with simulated(rank, world_size) as mesh:
            tensor = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
            ((starts, shape),) = chunks_of(tensor)
            part = tensor.to_local().contiguous()
        if part.numel():
            entries.append(entry(whole, starts, shape, offset=len(file.body)))
            file.body += bytes(byte_view(part))
    index = RankIndex(attempt=1, step=1, rank=0, world_size=1, directory="d", files=(), tensors=tuple(entries))
    return Manifest(attempt=1, step=1, directory="d", world_size=1, ranks=(index,)), file


def entry(whole: torch.Tensor, starts: tuple[int, ...], shape: tuple[int, ...], *, offset: int) -> TensorEntry:
    return TensorEntry(
        name="model.w",
        file="f",
        offset=offset,
        num_bytes=math.prod(shape) * whole.itemsize,
        dtype=dtype_name(whole.dtype),
        shape=shape,
        starts=starts,
        global_shape=tuple(whole.shape),
    )


PLACEMENTS = st.sampled_from([Shard(0), Shard(1), Replicate()])


@pytest.mark.slow
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    cuts=st.tuples(PLACEMENTS, PLACEMENTS),
    worlds=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
@settings(max_examples=60)
def test_any_tensor_cut_in_any_way_is_put_together_in_any_other_way(
    shape: list[int], dtype: torch.dtype, cuts: tuple[Any, Any], worlds: tuple[int, int]
) -> None:
    whole = torch.arange(math.prod(shape)).view(shape).to(dtype)
    manifest, file = save_simulated(whole, cuts[0], worlds[0])
    for rank in range(worlds[1]):
        with simulated(rank, worlds[1]) as mesh:
            mine = distribute_tensor(torch.zeros_like(whole), mesh, [cuts[1]], src_data_rank=None)
            restore(manifest, file, {"model": {"w": mine}})
            ((starts, sizes),) = chunks_of(mine)
            assert isinstance(mine, DTensor)
            expected = whole[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]
            assert same_bits(mine.to_local(), expected)


def test_a_rank_reads_only_the_rows_that_it_needs() -> None:
    whole = torch.arange(24.0).view(12, 2)
    manifest, file = save_simulated(whole, Shard(0), 4)
    for rank, world_size in itertools.product(range(6), [6]):
        with simulated(rank, world_size) as mesh:
            file.bytes_read = 0
            restore(manifest, file, {"model": {"w": distribute_tensor(torch.zeros(12, 2), mesh, [Shard(0)], src_data_rank=None)}})
            assert file.bytes_read == whole.nbytes / world_size
