"""What restoring refuses."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from keepstep.storage.manifest import Manifest, RankIndex, TensorEntry
from keepstep.trainer.restore import CheckpointMismatch, restore

SAVED = {"a": torch.arange(6.0).view(3, 2), "b": torch.tensor(5.0)}


class Bytes:
    """A verified reader of one made-up file."""

    def __init__(self) -> None:
        self.body = b"".join(tensor.numpy().tobytes() for tensor in SAVED.values())
        self.reads = 0

    def read_into(self, file: str, offset: int, destination: memoryview, /) -> None:
        self.reads += 1
        destination[:] = self.body[offset : offset + destination.nbytes]


def manifest(saved: Mapping[str, torch.Tensor] = SAVED) -> Manifest:
    entries, end = [], 0
    for name, tensor in saved.items():
        shape = tuple(tensor.shape)
        entries.append(
            TensorEntry(
                name=f"model.{name}",
                file="f",
                offset=end,
                num_bytes=tensor.nbytes,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=shape,
                starts=(0,) * tensor.ndim,
                global_shape=shape,
            )
        )
        end += tensor.nbytes
    rank = RankIndex(attempt=1, step=1, rank=0, world_size=1, directory="d", files=(), tensors=tuple(entries))
    return Manifest(attempt=1, step=1, directory="d", world_size=1, ranks=(rank,))


def empty() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in SAVED.items()}


def test_tensors_are_filled_in_place() -> None:
    mine = empty()
    restored = restore(manifest(), Bytes(), {"model": mine})
    assert all(torch.equal(mine[name], SAVED[name]) for name in SAVED)
    assert (restored.num_bytes, restored.resharded) == (28, False)


def test_a_tensor_that_is_no_plain_memory_is_filled_through_a_copy() -> None:
    mine = empty() | {"a": torch.zeros(2, 3).T}
    restore(manifest(), Bytes(), {"model": mine})
    assert torch.equal(mine["a"], SAVED["a"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"c": torch.zeros(1)}, "model.c is missing in it"),
        ({"a": None}, "model.a is not in this model"),
        ({"a": torch.zeros(2, 3)}, r"model.a is float32 \[3, 2\] in it and float32 \[2, 3\] here"),
        ({"a": torch.zeros(3, 2, dtype=torch.bfloat16)}, r"model.a is float32 \[3, 2\] in it and bfloat16 \[3, 2\] here"),
    ],
)
def test_another_model_is_refused_before_a_byte_is_read(change: dict[str, torch.Tensor | None], says: str) -> None:
    mine = {name: tensor for name, tensor in (empty() | change).items() if tensor is not None}
    reader = Bytes()
    with pytest.raises(CheckpointMismatch, match=says):
        restore(manifest(), reader, {"model": mine})
    assert reader.reads == 0


def test_parts_that_are_not_asked_for_are_not_read() -> None:
    reader = Bytes()
    restore(manifest(), reader, {"optimizer": {}})
    assert reader.reads == 0
