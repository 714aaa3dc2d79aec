"""Token files of a root, opened: mapped, copied or streamed, and never others than those that were prepared."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.storage.canonical import seal
from keepstep.storage.store import Store
from keepstep.trainer import encoding, spool
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.index import FOLDER, TokenIndex, describe
from keepstep.trainer.preparing import prepare, unigram_nats
from keepstep.trainer.tokens import MappedTokens, open_tokens

FILES = tuple(
    f"tokens/{name}"
    for name in ("held_out-00000.bin", "held_out-documents.bin", "index.json", "tokenizer.json", "train-00000.bin", "train-documents.bin")
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.txt").write_text(f"Chapter {i}: in a hole in the ground there lived a hobbit. Ünïcödé too.\n" * (i + 3))
    return folder


def config(text: Path, **more: object) -> TrainerConfig:
    return TrainerConfig.model_validate({"data": {"source": str(text), "tokenizer": "bytes", "held_out": 0.2, "shard_mb": 1} | more})


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a kilobyte, in blocks of 256 bytes."""
    monkeypatch.setattr(encoding, "MEGABYTE", 1024)
    monkeypatch.setattr(spool, "HASHED_BYTES", 256)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), data=st.data())
def test_arrays_that_follow_each_other_are_one(lengths: list[int], data: st.DataObject) -> None:
    whole = np.arange(sum(lengths), dtype=np.uint16)
    read = MappedTokens(np.split(whole, np.cumsum(lengths)[:-1]))
    places = data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=20))
    bounds = st.none() | st.integers(-len(whole) - 2, len(whole) + 2)
    part = slice(data.draw(bounds), data.draw(bounds), data.draw(st.sampled_from([None, 1, 2])))
    assert len(read) == len(whole)
    assert read[np.array(places, dtype=np.int64).reshape(1, -1)].tolist() == [whole[np.array(places, dtype=np.int64)].tolist()]
    assert read[part].tolist() == whole[part].tolist()
    assert read[part].dtype == np.uint16


@pytest.mark.usefixtures("small_files")
def test_several_files_are_read_as_one_mapped_copied_and_streamed(text: Path, tmp_path: Path) -> None:
    one = Store.open(tmp_path / "one")
    several = Store.open("memory://several-files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "MEGABYTE", 1 << 20)
        expected = prepare(config(text), one)
    index = prepare(config(text), several)
    assert len(index.train.shards) > 3
    assert all(shard.tokens <= 512 for shard in index.train.shards)
    assert (index.train.tokens, index.train.documents) == (expected.train.tokens, expected.train.documents)
    whole = open_tokens(one)
    copied = open_tokens(several, tmp_path / "scratch")
    streamed = open_tokens(several, tmp_path / "other", streaming=True)
    places = np.random.default_rng(1).integers(0, index.train.tokens, (40, 30))
    for tokens in (copied, streamed):
        assert np.array_equal(tokens.train[:], whole.train[:])
        assert np.array_equal(tokens.train[places], whole.train[places])
        assert np.array_equal(tokens.held_out[5:400], whole.held_out[5:400])
        assert np.array_equal(tokens.starts, whole.starts)
        assert np.array_equal(tokens.held_out_starts, whole.held_out_starts)
        assert tokens.marks is tokens.held_out_marks is None


def test_damaged_tokens_are_not_opened(text: Path, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "root")
    prepare(config(text), store)
    path = tmp_path / "root/tokens/train-00000.bin"
    body = bytearray(path.read_bytes())
    body[5] ^= 1
    path.write_bytes(body)
    for scratch in (None, tmp_path / "scratch"):
        with pytest.raises(ValueError, match=r"tokens/train-00000.bin is not what tokens/index.json says; delete the folder tokens/"):
            open_tokens(store, scratch)


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_of_any_file_is_trained_on(text: Path, tmp_path: Path, name: str) -> None:
    store, chance = Store.open(tmp_path / "root"), random.Random(name)
    prepare(config(text), store)
    assert store.list(FOLDER) == list(FILES)
    whole = store.get(name)
    for _ in range(25):
        body = bytearray(whole)
        body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
        store.put(name, bytes(body))
        with pytest.raises(ValueError, match="prepare"):
            open_tokens(store)


def test_a_remote_root_is_copied_to_the_node_once(text: Path, tmp_path: Path) -> None:
    store = Store.open("memory://tokens-are-copied")
    index = prepare(config(text), store)
    scratch = tmp_path / "scratch"
    first = open_tokens(store, scratch)
    store.delete("tokens/train-00000.bin")
    second = open_tokens(store, scratch)
    assert np.array_equal(first.train[:], second.train[:])
    assert len(first.train) == index.train.tokens
    assert sorted(path.suffix for path in (scratch / FOLDER).iterdir()) == [".bin"] * 4


def test_tokens_that_were_never_prepared_are_missed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no tokens yet: run `keepstep prepare` first"):
        open_tokens(Store.open(tmp_path))


def test_the_index_survives_its_bytes(text: Path, tmp_path: Path) -> None:
    index = prepare(config(text), Store.open(tmp_path / "root"))
    assert TokenIndex.parse(index.body()) == index


def test_an_index_of_another_version_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"tokens/index\.json is not of format 3: .*; go on with that one, or choose another run\.root"):
        TokenIndex.parse(seal({"format": 2}))


def test_the_report_adds_up(text: Path, tmp_path: Path) -> None:
    (text / "nothing.txt").write_text("")
    (text / "blank.txt").write_text(" \n")
    store = Store.open(tmp_path / "root")
    figures = describe(prepare(config(text), store))
    assert (figures["files"], figures["empty_files"], figures["empty_documents"]) == (12, 2, 1)
    assert figures["train_documents"] + figures["held_out_documents"] == 10
    size = sum(path.stat().st_size for path in text.iterdir())
    assert figures["train_tokens"] + figures["held_out_tokens"] == size - 2 + 10
    assert figures["bytes_per_token"] == round((size - 2) / (size - 2 + 10), 3)
    assert (figures["vocabulary"], figures["unknown_share"], figures["duplicates_dropped"]) == (257, 0, 0)


def test_unigram_nats_are_the_entropy_of_the_frequencies() -> None:
    counts = np.array([1, 1, 2, 0])
    assert unigram_nats(counts, counts, smoothing=0) == pytest.approx(1.5 * math.log(2))
    assert unigram_nats(counts, np.array([0, 0, 0, 3]), smoothing=1) == pytest.approx(math.log(8))
