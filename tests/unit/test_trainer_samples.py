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
from keepstep.trainer.config import DataSection, ModelSection, TrainerConfig
from keepstep.trainer.preparing import prepare
from keepstep.trainer.samples import (
    IGNORED,
    ClassSamples,
    DocumentSamples,
    Mask,
    PairSamples,
    Samples,
    StreamSamples,
    samples_of,
)
from keepstep.trainer.streaming import DamagedTokens, StreamedFile, StreamedTokens
from keepstep.trainer.tokens import Extent, TokenArray, Tokens, open_tokens

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
    return samples.ids(np.arange(sum(samples.sizes), dtype=np.uint64))


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
        assert samples.ids(np.array([0, 3], dtype=np.uint64)).tolist() == [[0, 1, 2, 3, 4], [12, 13, 14, 15, 16]]

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


class TestWholeDocuments:
    """Pairs and classes: a document is a sample."""

    LENGTHS = (4, 2, 6)

    def made(self, kind: type[Any], marks: list[int], context: int, *, is_cut: bool = False) -> Samples:
        tokens, starts, extents = corpus([list(self.LENGTHS)])
        samples: Samples = kind(tokens, starts, extents, context, np.array(marks, dtype=np.uint32), is_cut=is_cut)
        return samples

    def rows(self, samples: Samples) -> Any:
        positions = np.arange(3, dtype=np.uint64)
        return samples.rows(positions, positions)

    def test_of_a_pair_the_completion_counts_and_its_end(self) -> None:
        inputs, targets = self.rows(self.made(PairSamples, [2, 1, 5], 7))
        assert inputs[0].tolist() == [1000, 1001, 1002, 1003, END, IGNORED, IGNORED]
        assert targets[0].tolist() == [IGNORED, 1002, 1003, END, IGNORED, IGNORED, IGNORED]
        assert targets[1].tolist() == [1006, END, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED]
        assert targets[2].tolist() == [IGNORED] * 4 + [1013, END, IGNORED]

    def test_a_class_is_asked_for_at_the_last_token(self) -> None:
        inputs, targets = self.rows(self.made(ClassSamples, [7, 0, 3], 7))
        assert inputs[1].tolist() == [1005, 1006, END, IGNORED, IGNORED, IGNORED, IGNORED]
        assert targets.tolist() == [[IGNORED] * 4 + [7, IGNORED, IGNORED], [IGNORED] * 2 + [0] + [IGNORED] * 4, [IGNORED] * 6 + [3]]

    @pytest.mark.parametrize(("kind", "context"), [("PairSamples", 6), ("ClassSamples", 7)])
    def test_a_document_longer_than_the_context_is_refused_or_cut(self, kind: str, context: int) -> None:
        kinds: dict[str, type[Any]] = {"PairSamples": PairSamples, "ClassSamples": ClassSamples}
        self.made(kinds[kind], [1, 1, 1], context)
        with pytest.raises(
            ValueError, match=rf"1 of 3 documents are longer than model.context = {context - 1}, the longest has 7 .* = {context} or"
        ):
            self.made(kinds[kind], [1, 1, 1], context - 1)
        inputs, targets = self.rows(self.made(kinds[kind], [1, 1, 1], 3, is_cut=True))
        assert inputs.shape == targets.shape == (3, 3)
        assert inputs[2].tolist() == [1008, 1009, 1010]
        assert targets[2].tolist() == ([1009, 1010, 1011] if kind == "PairSamples" else [IGNORED, IGNORED, 1])


class TestMask:
    MASK = Mask(seed=3, share=0.15, token=50, vocabulary=52, end_of_text=51)

    def test_it_asks_for_its_share_in_three_ways(self) -> None:
        ids = np.random.default_rng(0).integers(0, 50, (400, 128))
        inputs, targets = self.MASK.rows(ids, np.arange(400, dtype=np.uint64))
        asked = targets != IGNORED
        assert asked.mean() == pytest.approx(0.15, abs=0.005)
        assert (targets[asked] == ids[asked]).all()
        assert (inputs[~asked] == ids[~asked]).all()
        assert (inputs[asked] == 50).mean() == pytest.approx(0.8 + 0.1 / 52, abs=0.02)
        assert (inputs[asked] == ids[asked]).mean() == pytest.approx(0.1 + 0.1 / 52, abs=0.02)

    @given(
        rows=st.lists(st.lists(st.sampled_from([0, 1, 2, 51, IGNORED]), min_size=4, max_size=4), min_size=1, max_size=6),
        share=st.floats(0.01, 0.99),
    )
    def test_padding_and_ends_are_never_asked_for_and_something_always_is(self, rows: list[list[int]], share: float) -> None:
        ids = np.array(rows)
        inputs, targets = self.MASK._replace(share=share).rows(ids, np.arange(len(rows), dtype=np.uint64))
        may = (ids != 51) & (ids != IGNORED)
        assert (targets[~may] == IGNORED).all()
        assert (inputs[~may] == ids[~may]).all()
        assert ((targets != IGNORED).any(1) == may.any(1)).all()

    def test_a_row_is_hidden_alike_wherever_it_is_read_and_otherwise_the_next_time(self) -> None:
        ids = np.random.default_rng(0).integers(0, 50, (6, 64))
        positions = np.arange(6, dtype=np.uint64)
        whole = self.MASK.rows(ids, positions)
        part = self.MASK.rows(ids[2:4], positions[2:4])
        assert np.array_equal(part, whole.part(2, 4))
        assert not np.array_equal(self.MASK.rows(ids, positions + np.uint64(6)).targets, whole.targets)
        assert not np.array_equal(self.MASK._replace(seed=4).rows(ids, positions).targets, whole.targets)


def streamed(folder: Path, tokens: TokenArray, block_bytes: int = 64, cache_bytes: int = 256) -> tuple[StreamedTokens, list[int]]:
    """The tokens in a file, and the places of the reads that were asked for."""
    reads: list[int] = []

    class Noted(PosixStore):
        def get_range(self, key: str, start: int, length: int) -> bytes:
            reads.append(start)
            return super().get_range(key, start, length)

    (folder / "train.bin").write_bytes(tokens.tobytes())
    hashes = hash_blocks(tokens.data.cast("B"), block_bytes)
    files = (StreamedFile(key="train.bin", num_tokens=len(tokens), hashes=hashes),)
    return StreamedTokens(Noted(folder), files, tokens.dtype, block_bytes, cache_bytes), reads


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


def settings(text: Path, context: int, **more: object) -> TrainerConfig:
    return TrainerConfig(data=section(text, **more), model=ModelSection(context=context))


def prepared(text: Path, **more: object) -> tuple[Store, Tokens]:
    store = Store.open(text.parent / "root")
    prepare(TrainerConfig(data=section(text, **more)), store)
    return store, open_tokens(store)


class TestOfARoot:
    def test_each_source_is_split_and_lies_in_one_piece(self, text: Path) -> None:
        _, tokens = prepared(text)
        for part, array in ((tokens.index.train, tokens.train), (tokens.index.held_out, tokens.held_out)):
            first = 0
            for name, extent in zip("ab", part.sources, strict=True):
                mine = tokens.tokenizer.decode(np.asarray(array[np.arange(first, first + extent.tokens)]).tolist())
                assert mine.count(f"{name}: chapter") == mine.count("chapter") > 0
                assert extent.documents >= 1
                first += extent.tokens
            assert first == part.tokens

    def test_documents_begin_where_the_file_says(self, text: Path) -> None:
        _, tokens = prepared(text)
        starts = tokens.starts.astype(np.int64)
        assert len(starts) == tokens.index.train.documents > 10
        assert starts[0] == 0
        assert (tokens.train[starts[1:] - 1] == tokens.tokenizer.end_of_text).all()

    @pytest.mark.parametrize("pack", ["stream", "documents"])
    def test_streaming_gives_the_same_rows(self, text: Path, pack: str) -> None:
        store, tokens = prepared(text)
        config = settings(text, 16, pack=pack)
        mapped = samples_of(tokens, config)
        read = samples_of(open_tokens(store, streaming=True), config)
        assert isinstance(read.tokens, StreamedTokens)
        assert mapped.sizes == read.sizes
        assert np.array_equal(all_rows(mapped), all_rows(read))

    def test_streaming_copies_no_training_tokens_and_needs_none_of_the_others_bytes(self, text: Path, tmp_path: Path) -> None:
        store = Store.open("memory://streamed-tokens")
        prepare(TrainerConfig(data=section(text)), store)
        tokens = open_tokens(store, tmp_path / "scratch", streaming=True)
        assert sorted(path.name.partition("-")[0] for path in (tmp_path / "scratch/tokens").iterdir()) == ["held_out", "held_out", "train"]
        assert [path for path in (tmp_path / "scratch/tokens").iterdir() if path.stat().st_size > 8 * 16 and "train" in path.name] == []
        assert len(tokens.train) == tokens.index.train.tokens

    def test_a_source_without_enough_text_is_named(self, text: Path) -> None:
        _, tokens = prepared(text)
        with pytest.raises(
            ValueError, match=r"data\.sources\[0\] = '.*a' gave \d+ training tokens, fewer than one sample \(model.context = 1"
        ):
            samples_of(tokens, settings(text, tokens.index.train.sources[0].tokens))
        (text / "b" / "0.txt").write_text("  ")
        for i in range(1, 10):
            (text / "b" / f"{i}.txt").unlink()
        with pytest.raises(ValueError, match=r"data\.sources\[1\] = '.*b' holds no text"):
            prepare(TrainerConfig(data=section(text)), Store.open(text.parent / "other"))

    def test_order_weights_and_skips_may_differ_where_the_tokens_are_the_same(self, text: Path) -> None:
        store, tokens = prepared(text)
        same = section(text, weights=[1, 2], order="blocks", block_samples=4, pack="documents", skip=["0:3"], streaming=True)
        assert prepare(TrainerConfig(data=same), store) == tokens.index
        with pytest.raises(ValueError, match=r"another \[data\] section"):
            prepare(TrainerConfig(data=section(text, sources=[str(text / "a")])), store)
