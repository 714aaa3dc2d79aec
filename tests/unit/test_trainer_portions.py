"""What a tensor-parallel rank holds of a tensor, and FSDP2 of that: boxes that tile the whole, wherever it is cut."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded_state import same_bits
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from keepstep.trainer.portions import Cut, Portion, box, chunks_of, parts_of


def share_of(whole: Tensor, cut: Cut) -> Tensor:
    """What one rank computes with."""
    return torch.cat([part.chunk(cut.count, cut.dim)[cut.index] for part in whole.chunk(cut.parts, cut.dim)], cut.dim)


def portions_of(whole: Tensor, *, dim: int, parts: int, replicas: int, shards: int, tensor: int) -> list[Portion]:
    """By rank, of a world in which one rank exists at a time."""
    made = []
    for rank in range(replicas * shards * tensor):
        dist.init_process_group("fake", rank=rank, world_size=replicas * shards * tensor, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", (replicas, shards, tensor), mesh_dim_names=("replicas", "shards", "tensor"))
            cut = Cut(dim=dim, parts=parts, index=rank % tensor, count=tensor, mesh=mesh["tensor"])
            data: DeviceMesh = mesh["replicas", "shards"]
            held = distribute_tensor(share_of(whole, cut).contiguous(), data, [Replicate(), Shard(0)], src_data_rank=None)
            portion = Portion(held, cut)
            made.append(portion)
            assert portion.shape == whole.shape
            assert (portion.dtype, portion.ndim, portion.numel()) == (whole.dtype, whole.ndim, whole.numel())
            check_parts(portion, whole)
        finally:
            dist.destroy_process_group()
    return made


def check_parts(portion: Portion, whole: Tensor) -> None:
    """Each of them is what the whole has there, and shares the shard's memory."""
    assert sum(part.numel() for part in parts_of(portion)) == portion.to_local().numel()
    for chunk, part in zip(chunks_of(portion), parts_of(portion), strict=True):
        assert same_bits(part, whole[box(chunk)])
        assert part.numel()
        assert part.untyped_storage().data_ptr() == portion.to_local().untyped_storage().data_ptr()
    items = portion.__create_write_items__("name", portion)
    assert [tuple(item.index.offset or ()) for item in items] == [starts for starts, _ in chunks_of(portion)]


@pytest.mark.slow
@given(
    share=st.integers(1, 7),
    columns=st.integers(1, 3),
    parts=st.sampled_from([1, 3]),
    grid=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(2, 3)),
)
@settings(max_examples=40)
def test_the_columns_of_all_ranks_make_the_whole(share: int, columns: int, parts: int, grid: tuple[int, int, int]) -> None:
    """Rows of the weight, cut by parts and groups and then by FSDP2 wherever that falls."""
    replicas, shards, tensor = grid
    whole = torch.arange(parts * tensor * share * columns).view(-1, columns)
    found = portions_of(whole, dim=0, parts=parts, replicas=replicas, shards=shards, tensor=tensor)
    assert_tiles(found, whole, replicas)


@pytest.mark.slow
@given(rows=st.integers(1, 7), share=st.integers(1, 3), grid=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(2, 3)))
@settings(max_examples=40)
def test_the_rows_of_all_ranks_make_the_whole(rows: int, share: int, grid: tuple[int, int, int]) -> None:
    """Columns of the weight."""
    replicas, shards, tensor = grid
    whole = torch.arange(rows * tensor * share).view(rows, -1)
    found = portions_of(whole, dim=1, parts=1, replicas=replicas, shards=shards, tensor=tensor)
    assert_tiles(found, whole, replicas)


def assert_tiles(found: list[Portion], whole: Tensor, replicas: int) -> None:
    """Each element is in one chunk of every replica."""
    times = torch.zeros_like(whole)
    for chunk in itertools.chain.from_iterable(chunks_of(portion) for portion in found):
        times[box(chunk)] += 1
    assert torch.equal(times, torch.full_like(whole, replicas))


def test_queries_keys_and_values_in_one_weight_are_three_boxes_and_a_cut_between_them_makes_more() -> None:
    whole = torch.arange(12.0).view(12, 1)  # q 0 to 3, k 4 to 7, v 8 to 11; two ranks have two rows of each
    first, _, last, _ = portions_of(whole, dim=0, parts=3, replicas=1, shards=2, tensor=2)
    assert chunks_of(first) == [((0, 0), (2, 1)), ((4, 0), (1, 1))]
    assert chunks_of(last) == [((5, 0), (1, 1)), ((8, 0), (2, 1))]


def test_a_rank_without_a_row_has_no_chunk() -> None:
    whole = torch.arange(2.0).view(2, 1)
    *_, last = portions_of(whole, dim=0, parts=1, replicas=1, shards=2, tensor=2)
    assert chunks_of(last) == parts_of(last) == []
    assert last.to_local().numel() == 0


def test_the_shape_of_the_whole_is_that_of_all_shares() -> None:
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        cut = Cut(dim=1, index=1, count=2, mesh=init_device_mesh("cpu", (2,)))
        assert cut.whole(torch.Size((3, 4))) == (3, 8)
        assert [place for _, place, _ in cut.spans(4, 0, 4)] == [4]
        assert math.prod(cut.whole(torch.Size((3, 4)))) == 24
    finally:
        dist.destroy_process_group()
