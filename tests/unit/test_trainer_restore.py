"""What restoring refuses."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterable, Mapping

import pytest
import torch

from keepstep.storage.manifest import Manifest, RankIndex, TensorEntry
from keepstep.storage.verify import Piece
from keepstep.trainer import restore as restoring
from keepstep.trainer.matching import CheckpointMismatch
from keepstep.trainer.restore import restore

SAVED = {"a": torch.arange(6.0).view(3, 2), "b": torch.tensor(5.0)}


class Bytes:
    """A verified reader of one made-up file."""

    def __init__(self) -> None:
        self.body = b"".join(tensor.numpy().tobytes() for tensor in SAVED.values())
        self.reads = 0

    def read_pieces(self, pieces: Iterable[Piece], /) -> None:
        for piece in pieces:
            self.reads += 1
            piece.destination[:] = self.body[piece.offset : piece.offset + piece.destination.nbytes]


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


def test_copies_need_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[int]] = []

    class Watched(Bytes):
        def read_pieces(self, pieces: Iterable[Piece], /) -> None:
            pieces = list(pieces)
            calls.append([piece.destination.nbytes for piece in pieces])
            super().read_pieces(pieces)

    monkeypatch.setattr(restoring, "_COPIES_BYTES", 30)
    saved = {name: torch.arange(6.0).view(2, 3) for name in "abcd"}
    mine = {name: torch.zeros(2, 3) if name in "bd" else torch.zeros(3, 2).T for name in saved}
    reader = Watched()
    reader.body = b"".join(tensor.numpy().tobytes() for tensor in saved.values())
    restore(manifest(saved), reader, {"model": mine})
    assert all(torch.equal(mine[name], saved[name]) for name in saved)
    assert calls == [[24, 24], [24, 24]]  # one copy each, and what needs none


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"c": torch.zeros(1)}, "1 missing in it: model.c$"),
        ({"a": None}, "1 not in this model: model.a$"),
        ({"a": torch.zeros(2, 3)}, r"1 of another shape: model.a \(\[3, 2\] in it, \[2, 3\] here\)$"),
        ({"a": torch.zeros(3, 2, dtype=torch.bfloat16)}, r"1 of another dtype: model.a \(float32 in it, bfloat16 here\)$"),
    ],
)
def test_another_model_is_refused_before_a_byte_is_read(change: dict[str, torch.Tensor | None], says: str) -> None:
    mine = {name: tensor for name, tensor in (empty() | change).items() if tensor is not None}
    reader = Bytes()
    with pytest.raises(CheckpointMismatch, match=says):
        restore(manifest(), reader, {"model": mine})
    assert reader.reads == 0


def test_every_difference_is_told_by_kind_and_counted() -> None:
    saved = {f"old{i:02d}": torch.zeros(1) for i in range(25)} | {"x": torch.zeros(2, 3), "same": torch.zeros(4)}
    mine = {"new": torch.zeros(1), "x": torch.zeros(3, 2, dtype=torch.int64), "same": torch.zeros(4)}
    with pytest.raises(CheckpointMismatch) as caught:
        restore(manifest(saved), Bytes(), {"model": mine})
    text, differences = str(caught.value), caught.value.differences
    assert "1 missing in it: model.new; 25 not in this model: model.old00, " in text
    assert text.endswith(
        "model.old19 and 5 more; 1 of another shape: model.x ([2, 3] in it, [3, 2] here);"
        " 1 of another dtype: model.x (float32 in it, int64 here)"
    )
    assert (differences.missing, len(differences.extra)) == (("model.new",), 25)
    assert (dict(differences.reshaped), dict(differences.recast)) == (
        {"model.x": ((2, 3), (3, 2))},
        {"model.x": ("float32", "int64")},
    )
    assert all(f"  model.old{i:02d}\n" in caught.value.report for i in range(25))
    assert str(pickle.loads(pickle.dumps(caught.value))) == text  # a rank's error crosses to its agent


class TestPartial:
    """Only what is named may differ."""

    MINE: Mapping[str, torch.Tensor] = {"a": torch.full((2, 2), 7.0), "b": torch.tensor(0.0), "new": torch.full((3,), 8.0)}

    def test_what_is_named_is_skipped_and_told_and_keeps_its_value(self, caplog: pytest.LogCaptureFixture) -> None:
        mine = {name: tensor.clone() for name, tensor in self.MINE.items()}
        with caplog.at_level(logging.WARNING):
            restored = restore(manifest(), Bytes(), {"model": mine}, partial=("model.n*", "model.a"))
        assert restored.skipped == ("model.a", "model.new")
        assert (mine["b"], mine["a"][0, 0], mine["new"][0]) == (5.0, 7.0, 8.0)
        assert "skipped 2 tensors that differ, as told: model.a, model.new" in caplog.text

    def test_everything_else_stays_strict(self) -> None:
        with pytest.raises(CheckpointMismatch) as caught:
            restore(manifest(), Bytes(), {"model": dict(self.MINE)}, partial=("model.new",))
        assert caught.value.differences.names() == {"model.a"}

    def test_a_tensor_that_is_named_and_fits_is_loaded(self) -> None:
        mine = empty()
        assert restore(manifest(), Bytes(), {"model": mine}, partial=("*",)).skipped == ()
        assert all(torch.equal(mine[name], SAVED[name]) for name in SAVED)

    def test_a_pattern_that_matches_nothing_is_a_mistake(self) -> None:
        with pytest.raises(ValueError, match=r"--partial blocks.\* matches no tensor; the names are model.a, model.b"):
            restore(manifest(), Bytes(), {"model": empty()}, partial=("blocks.*",))


def test_parts_that_are_not_asked_for_are_not_read() -> None:
    reader = Bytes()
    restore(manifest(), reader, {"optimizer": {}})
    assert reader.reads == 0
