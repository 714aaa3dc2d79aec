"""From samples to rows of tokens: cut anywhere, or at documents; mapped, or read block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.storage.manifest import hash_blocks
from keepstep.storage.posix import PosixStore
from keepstep.storage.store import Store
from keepstep.trainer.config import DataSection
from keepstep.trainer.samples import IGNORED, DocumentSamples, Samples, StreamSamples, samples_of
from keepstep.trainer.streaming import DamagedTokens, StreamedTokens
from keepstep.trainer.tokens import Extent, TokenArray, Tokens, open_tokens, prepare

END = 999
texts = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=6), min_size=1, max_size=4)  # lengths of documents, by source


def corpus(lengths: list[list[int]]) -> tuple[TokenArray, Any, tuple[Extent, ...]]:
    """(tokens, starts, extents): every token but the documents' ends is there once."""
    flat = [length for source in lengths for length in source]
    starts = np.cumsum([0, *(length + 1 for length in flat)])
    tokens = np.arange(1000, 1000 + starts[-1]).astype(np.uint16)
    tokens[starts[1:] - 1] = END
    extents = tuple(Extent(documents=len(source), tokens=sum(source) + len(source)) for source in lengths)
    return tokens, starts[:-1].astype(np.uint64), extents


def all_rows(samples: Samples) -> Any:
    return samples.rows(np.arange(sum(samples.sizes), dtype=np.uint64))


class TestStream:
    @given(lengths=texts, context=st.integers(1, 12))
    def test_each_sample_is_a_window_of_its_own_source(self, lengths: list[list[int]], context: int) -> None:
        tokens, _, extents = corpus(lengths)
        samples = StreamSamples(tokens, extents, context)
        expected, first = [], 0
        for extent in extents:
            starts = range(first, first + extent.tokens - context, context)
            expected += [tokens[start : start + context + 1].tolist() for start in starts]
            first += extent.tokens
        assert all_rows(samples).tolist() == expected

    def test_a_target_is_the_token_after_its_input(self) -> None:
        samples = StreamSamples(np.arange(100, dtype=np.uint16), (Extent(documents=1, tokens=100),), 4)
        assert samples.rows(np.array([0, 3], dtype=np.uint64)).tolist() == [[0, 1, 2, 3, 4], [12, 13, 14, 15, 16]]

    def test_the_last_sample_has_its_target(self) -> None:
        assert StreamSamples(np.zeros(33, dtype=np.uint16), (Extent(documents=1, tokens=33),), 16).sizes == (2,)
        assert StreamSamples(np.zeros(32, dtype=np.uint16), (Extent(documents=1, tokens=32),), 16).sizes == (1,)


class TestDocuments:
    @given(lengths=texts, context=st.integers(1, 12))
    def test_every_token_of_every_document_but_its_first_is_a_target_once(self, lengths: list[list[int]], context: int) -> None:
        tokens, starts, extents = corpus(lengths)
        samples = DocumentSamples(tokens, starts, extents, context)
        rows = all_rows(samples)
        targets = rows[:, 1:][rows[:, 1:] != IGNORED].tolist() if len(rows) else []
        assert targets == np.delete(tokens, starts.astype(np.int64)).tolist()

    @given(lengths=texts, context=st.integers(1, 12))
    def test_no_sample_holds_parts_of_two_documents_and_padding_comes_last(self, lengths: list[list[int]], context: int) -> None:
        tokens, starts, extents = corpus(lengths)
        samples = DocumentSamples(tokens, starts, extents, context)
        assert samples.sizes == tuple(sum(-(-length // context) for length in source) for source in lengths)
        for row in all_rows(samples).tolist():
            held = row[: row.index(IGNORED)] if IGNORED in row else row
            assert len(held) >= 2
            assert END not in held[:-1]
            assert set(row[len(held) :]) <= {IGNORED}

    def test_a_long_document_takes_several_samples(self) -> None:
        tokens, starts, extents = corpus([[5, 1]])
        rows = all_rows(DocumentSamples(tokens, starts, extents, 2)).tolist()
        assert rows == [[1000, 1001, 1002], [1002, 1003, 1004], [1004, END, IGNORED], [1006, END, IGNORED]]


def streamed(folder: Path, tokens: TokenArray, block_bytes: int = 64, cache_bytes: int = 256) -> tuple[StreamedTokens, list[int]]:
    """The tokens in a file, and the places of the reads that were asked for."""
    reads: list[int] = []

    class Noted(PosixStore):
        def get_range(self, key: str, start: int, length: int) -> bytes:
            reads.append(start)
            return super().get_range(key, start, length)

    (folder / "train.bin").write_bytes(tokens.tobytes())
    hashes = hash_blocks(tokens.data.cast("B"), block_bytes)
    return StreamedTokens(Noted(folder), "train.bin", tokens.dtype, len(tokens), block_bytes, hashes, cache_bytes), reads


class TestStreaming:
    def test_it_reads_what_the_file_holds_in_any_order(self, tmp_path: Path) -> None:
        tokens = np.arange(1003, dtype=np.uint16)
        read, _ = streamed(tmp_path, tokens)
        chance = np.random.default_rng(1)
        for shape in ((1,), (7, 5), (0, 5), (40, 30), (0,), (1,)):
            places = chance.integers(0, 1003, shape)
            assert np.array_equal(read[places], tokens[places])

    def test_it_reads_only_the_blocks_that_are_asked_for_wherever_they_lie(self, tmp_path: Path) -> None:
        """Resuming at the end of a text costs what beginning it costs: nothing is skipped through."""
        read, reads = streamed(tmp_path, np.arange(10_000, dtype=np.uint16))
        assert read[np.array([9_999, 9_990])].tolist() == [9_999, 9_990]
        assert reads == [9_984 * 2]

    def test_blocks_next_to_each_other_are_read_once_and_few_are_kept(self, tmp_path: Path) -> None:
        read, reads = streamed(tmp_path, np.arange(32 * 50, dtype=np.uint16))
        for start in range(0, 32 * 50, 8):
            read[np.arange(start, start + 8)]
            assert len(read._cache) <= 4
        assert reads == [64 * i for i in range(50)]
        read[np.arange(32 * 50)]
        assert len(read._cache) <= 4

    @pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
    def test_a_damaged_block_is_named_and_the_others_are_read(self, tmp_path: Path, harm: str) -> None:
        tokens = np.arange(320, dtype=np.uint16)
        read, reads = streamed(tmp_path, tokens)
        body = bytearray(tokens.tobytes())
        body[70] ^= 4
        file = tmp_path / "train.bin"
        {"flip": lambda: file.write_bytes(body), "cut": lambda: file.write_bytes(body[:100]), "gone": file.unlink}[harm]()
        with pytest.raises(
            DamagedTokens, match=r"bytes 64 to 128 of train\.bin \(data\.streaming\) are not what was prepared; put .* or delete"
        ):
            read[np.array([40])]
        if harm == "flip":
            assert reads == [64, 64], "once more, before it counts"
            assert read[np.array([0])].tolist() == [0]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    for name in "ab":
        (tmp_path / "text" / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "text" / name / f"{i}.txt").write_text(f"{name}: chapter {i} of a book.\n" * (i + 3 + 5 * (name == "b")))
    return tmp_path / "text"


def section(text: Path, **more: object) -> DataSection:
    sources = [str(text / name) for name in "ab"]
    return DataSection.model_validate({"sources": sources, "tokenizer": "bytes", "held_out": 0.2} | more)


def prepared(text: Path, **more: object) -> tuple[Store, Tokens]:
    store = Store.open(text.parent / "root")
    prepare(section(text, **more), store)
    return store, open_tokens(store)


class TestOfARoot:
    def test_each_source_is_split_and_lies_in_one_piece(self, text: Path) -> None:
        _, tokens = prepared(text)
        for part, array in ((tokens.index.train, tokens.train), (tokens.index.held_out, tokens.held_out)):
            first = 0
            for name, extent in zip("ab", part.sources, strict=True):
                mine = tokens.tokenizer.decode(np.asarray(array[np.arange(first, first + extent.tokens)]).tolist())
                assert mine.count(f"{name}: chapter") == mine.count("chapter") > 0
                assert extent.documents == (8 if part is tokens.index.train else 2)
                first += extent.tokens
            assert first == part.tokens

    def test_documents_begin_where_the_file_says(self, text: Path) -> None:
        _, tokens = prepared(text)
        starts = tokens.starts.astype(np.int64)
        assert len(starts) == tokens.index.train.documents == 16
        assert starts[0] == 0
        assert (tokens.train[starts[1:] - 1] == tokens.tokenizer.end_of_text).all()

    @pytest.mark.parametrize("pack", ["stream", "documents"])
    def test_streaming_gives_the_same_rows(self, text: Path, pack: str) -> None:
        store, tokens = prepared(text)
        data = section(text, pack=pack)
        mapped = samples_of(tokens, data, 16)
        read = samples_of(open_tokens(store, streaming=True), data, 16)
        assert isinstance(read.tokens, StreamedTokens)
        assert mapped.sizes == read.sizes
        assert np.array_equal(all_rows(mapped), all_rows(read))

    def test_streaming_copies_no_training_tokens_and_needs_none_of_the_others_bytes(self, text: Path, tmp_path: Path) -> None:
        store = Store.open("memory://streamed-tokens")
        prepare(section(text), store)
        tokens = open_tokens(store, tmp_path / "scratch", streaming=True)
        assert sorted(path.name.partition("-")[0] for path in (tmp_path / "scratch/tokens").iterdir()) == ["held_out", "train"]
        assert [path for path in (tmp_path / "scratch/tokens").iterdir() if path.stat().st_size > 8 * 16 and "train" in path.name] == []
        assert len(tokens.train) == tokens.index.train.tokens

    def test_a_source_without_enough_text_is_named(self, text: Path) -> None:
        _, tokens = prepared(text)
        with pytest.raises(
            ValueError, match=r"data\.sources\[0\] = '.*a' gave \d+ training tokens, fewer than one sample \(model.context = 1"
        ):
            samples_of(tokens, section(text), tokens.index.train.sources[0].tokens)
        (text / "b" / "0.txt").write_text("  ")
        for i in range(1, 10):
            (text / "b" / f"{i}.txt").unlink()
        with pytest.raises(ValueError, match=r"data\.sources\[1\] = '.*b' holds no text"):
            prepare(section(text), Store.open(text.parent / "other"))

    def test_order_weights_and_skips_may_differ_where_the_tokens_are_the_same(self, text: Path) -> None:
        store, tokens = prepared(text)
        same = section(text, weights=[1, 2], order="blocks", block_samples=4, pack="documents", skip=["0:3"], streaming=True)
        assert prepare(same, store) == tokens.index
        with pytest.raises(ValueError, match=r"another \[data\] section"):
            prepare(section(text, sources=[str(text / "a")]), store)
