"""A laid-out file is what torch.save would have written."""

from __future__ import annotations

import io

import pytest
import torch
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan

from keepstep.trainer.template import ALIGNMENT, lay_out, pattern_of

TENSORS = {
    "matrix": torch.arange(12, dtype=torch.float32).view(3, 4),
    "scalar": torch.tensor(7.0),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "counts": torch.arange(5),
    "flags": torch.tensor([True, False]),
    "as long as torch's own records": torch.arange(40, dtype=torch.uint8),
}


@pytest.mark.parametrize("name", TENSORS)
def test_header_bytes_and_trailer_make_what_torch_load_reads(name: str) -> None:
    tensor = TENSORS[name]
    pattern = pattern_of(tensor.dtype, tuple(tensor.shape))
    body = bytearray(pattern.num_bytes)
    for offset, piece in pattern.pieces:
        body[offset : offset + len(piece)] = piece
    body[pattern.data_offset : pattern.data_offset + pattern.data_bytes] = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
    assert torch.equal(torch.load(io.BytesIO(body), weights_only=True), tensor)


@pytest.mark.parametrize("name", TENSORS)
def test_the_bytes_are_those_of_torch_save(name: str) -> None:
    tensor = TENSORS[name]
    plain = io.BytesIO()
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    torch.save(tensor.clone(), plain)
    torch.serialization.set_crc32_options(before)
    pattern = pattern_of(tensor.dtype, tuple(tensor.shape))
    assert pattern.num_bytes == len(plain.getvalue())
    assert all(plain.getvalue()[offset : offset + len(piece)] == piece for offset, piece in pattern.pieces)


def test_a_template_places_tensors_side_by_side_and_gives_views_of_their_bytes() -> None:
    template = lay_out(create_default_local_save_plan(TENSORS, is_coordinator=True).items)
    buffer = memoryview(bytearray(template.num_bytes))
    template.prefill(buffer)
    for placed, view in zip(template.placed, template.views(buffer), strict=True):
        view.copy_(TENSORS[placed.index.fqn])
    for placed in template.placed:
        assert placed.offset % ALIGNMENT == placed.data_offset % ALIGNMENT == 0
        archive = io.BytesIO(buffer[placed.offset : placed.offset + placed.pattern.num_bytes])
        assert torch.equal(torch.load(archive, weights_only=True), TENSORS[placed.index.fqn])


def test_laying_out_leaves_torch_saves_checksums_as_they_were() -> None:
    pattern_of.cache_clear()
    pattern_of(torch.float32, (3,))
    assert torch.serialization.get_crc32_options()
