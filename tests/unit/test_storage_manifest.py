"""Rank indexes, the manifest, and the hashes of blocks."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.storage.canonical import seal, unseal
from keepstep.storage.errors import IncompleteCheckpoint
from keepstep.storage.manifest import FileEntry, Manifest, RankIndex, TensorEntry, coverage_gap, hash_block, hash_blocks, merge

DIRECTORY = "data/a000001/s000000010-00000000"


def chunk(starts: tuple[int, ...], shape: tuple[int, ...], whole: tuple[int, ...] = (4, 6), **changes: object) -> TensorEntry:
    entry = TensorEntry(
        name="w", file="__0_0.distcp", offset=0, num_bytes=0, dtype="torch.float32", shape=shape, starts=starts, global_shape=whole
    )
    return replace(entry, **changes)  # type: ignore[arg-type]


def rank_index(rank: int, world_size: int = 2, **changes: object) -> RankIndex:
    """Rows of a (2 * world_size, 6) tensor of four-byte elements."""
    name = f"__{rank}_0.distcp"
    index = RankIndex(
        attempt=1,
        step=10,
        rank=rank,
        world_size=world_size,
        directory=DIRECTORY,
        files=(FileEntry(name=name, num_bytes=60, block_bytes=40, hashes=("a" * 16, "b" * 16)),),
        tensors=(chunk((2 * rank, 0), (2, 6), (2 * world_size, 6), file=name, offset=12, num_bytes=48),),
        state={"rng": "00ff", "position": 0.1},
    )
    return replace(index, **changes)  # type: ignore[arg-type]


class TestMerge:
    def test_the_order_of_indexes_does_not_change_a_byte(self) -> None:
        indexes = [rank_index(rank, 3) for rank in range(3)]
        assert merge(indexes).body() == merge(indexes[::-1]).body()
        assert merge(indexes).sha256() == merge(indexes[::-1]).sha256()

    def test_bytes_come_back_as_they_were(self) -> None:
        manifest = merge([rank_index(0), rank_index(1)])
        assert Manifest.parse(manifest.body()) == manifest
        assert Manifest.parse(manifest.body()).body() == manifest.body()
        assert RankIndex.parse(rank_index(1).body()) == rank_index(1)

    def test_the_index_is_what_the_format_says(self) -> None:
        fields = json.loads(rank_index(1).body())
        assert sorted(fields) == ["attempt", "check", "directory", "files", "format", "rank", "state", "step", "tensors", "world_size"]
        assert fields["files"][0] == {"name": "__1_0.distcp", "bytes": 60, "block_bytes": 40, "hashes": ["a" * 16, "b" * 16]}
        assert sorted(fields["tensors"][0]) == ["bytes", "dtype", "file", "global_shape", "name", "offset", "shape", "starts"]

    def test_sizes_add_up(self) -> None:
        manifest = merge([rank_index(0), rank_index(1)])
        assert manifest.num_bytes == 120
        assert sorted(manifest.files) == ["__0_0.distcp", "__1_0.distcp"]

    @pytest.mark.parametrize(
        ("indexes", "why"),
        [
            ([], "no rank index"),
            ([rank_index(0)], r"ranks missing \[1\]"),
            ([rank_index(0), rank_index(0)], r"ranks missing \[1\], too many \[0, 0\]"),
            ([rank_index(0), rank_index(1), rank_index(2)], "too many"),
            ([rank_index(0), rank_index(1, step=11)], "different checkpoints"),
            ([rank_index(0), rank_index(1, attempt=2)], "different checkpoints"),
            ([rank_index(0), rank_index(1, directory="data/x")], "different checkpoints"),
            ([rank_index(0), rank_index(1, files=rank_index(0).files, tensors=())], "listed by rank 0 and by rank 1"),
            ([rank_index(0), rank_index(1, tensors=())], "12 elements of 24"),
            ([rank_index(0), rank_index(1, tensors=(replace(rank_index(1).tensors[0], offset=13),))], "does not lie within"),
            ([rank_index(0), rank_index(1, tensors=(replace(rank_index(1).tensors[0], file="x"),))], "does not lie within"),
        ],
    )
    def test_what_is_no_whole_is_refused(self, indexes: list[RankIndex], why: str) -> None:
        with pytest.raises(IncompleteCheckpoint, match=why):
            merge(indexes)


class TestCoverage:
    def test_one_chunk_may_be_the_whole_tensor(self) -> None:
        assert coverage_gap([chunk((0, 0), (4, 6))]) == ""
        assert coverage_gap([chunk((), (), ())]) == ""

    def test_an_empty_shard_covers_nothing(self) -> None:
        assert coverage_gap([chunk((0, 0), (4, 6)), chunk((4, 0), (0, 6))]) == ""
        assert coverage_gap([chunk((0,), (0,), (0,))]) == ""

    def test_quarters_make_a_whole(self) -> None:
        assert coverage_gap([chunk((row, column), (2, 3)) for row in (0, 2) for column in (0, 3)]) == ""

    @pytest.mark.parametrize(
        ("chunks", "why"),
        [
            ([chunk((0, 0), (2, 6))], "12 elements of 24"),
            ([chunk((0, 0), (2, 6)), chunk((1, 0), (2, 6))], "overlap"),
            ([chunk((0, 0), (2, 3)), chunk((0, 3), (2, 3)), chunk((2, 0), (2, 3)), chunk((1, 0), (2, 3))], "overlap"),
            ([chunk((0, 0), (2, 6)), chunk((3, 0), (2, 6))], "sticks out"),
            ([chunk((0,), (2, 6))], "cannot lie in"),
            ([chunk((0, 0), (2, 6)), chunk((2, 0), (2, 6), dtype="torch.int8")], "disagree"),
            ([chunk((0, 0), (2, 6)), chunk((2, 0), (2, 6), (5, 6))], "disagree"),
        ],
    )
    def test_gaps_and_overlaps_are_found(self, chunks: list[TensorEntry], why: str) -> None:
        assert why in coverage_gap(chunks)

    @given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 4), st.randoms())
    def test_rows_in_any_order_cover_and_no_two_may_be_the_same(self, heights: list[int], width: int, chance: object) -> None:
        whole = (sum(heights), width)
        chunks = [chunk((sum(heights[:index]), 0), (height, width), whole) for index, height in enumerate(heights)]
        chance.shuffle(chunks)  # type: ignore[attr-defined]
        assert coverage_gap(chunks) == ""
        assert coverage_gap([*chunks, chunks[0]]) != ""
        assert len(chunks) == 1 or coverage_gap(chunks[1:]) != ""


class TestParsing:
    @pytest.mark.parametrize(
        ("change", "why"),
        [
            ({"format": 2}, "not of format 1"),
            ({"step": "10"}, "step is '10', not int"),
            ({"files": None}, "files is None, not list"),
            ({"files": [{"name": "x", "bytes": 41, "block_bytes": 40, "hashes": ["a"]}]}, "1 block hashes"),
            ({"tensors": [{"name": "w"}]}, "tensor 'w': file is None"),
            ({"state": []}, "not dict"),
        ],
    )
    def test_a_wrong_field_is_named(self, change: dict[str, object], why: str) -> None:
        fields = unseal(rank_index(0).body(), "rank index")
        with pytest.raises(ValueError, match=why):
            RankIndex.parse(seal(fields | change))

    def test_a_flipped_bit_of_a_rank_index_is_found(self) -> None:
        body = rank_index(0, state={"rng": 5}).body()
        with pytest.raises(ValueError, match="its check does not fit"):
            RankIndex.parse(body.replace(b'"rng":5', b'"rng":4'))

    def test_what_is_no_json_is_said_so(self) -> None:
        with pytest.raises(ValueError, match="manifest is no JSON"):
            Manifest.parse(b"{")

    def test_a_state_that_json_cannot_hold_is_refused(self) -> None:
        with pytest.raises(ValueError, match="JSON"):
            rank_index(0, state={"loss": float("nan")}).body()


class TestBlocks:
    @given(st.binary(max_size=100), st.integers(1, 40))
    def test_every_block_has_its_hash_in_one_piece_or_in_many(self, data: bytes, block_bytes: int) -> None:
        hashes = hash_blocks(memoryview(data), block_bytes)
        blocks = [data[at : at + block_bytes] for at in range(0, len(data), block_bytes)]
        assert hashes == tuple(hash_block(block) for block in blocks)
        assert hashes == tuple(hash_block(block[:3], block[3:4], block[4:]) for block in blocks)

    def test_a_hash_is_xxh3_of_64_bits_in_hex(self) -> None:
        assert hash_blocks(memoryview(b"keepstep")) == ("b71e3b012e43f446",)
