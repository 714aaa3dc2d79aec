"""From text to token shards."""

from __future__ import annotations

import hashlib
import math
import random
from pathlib import Path

import numpy as np
import pytest

from keepstep.storage.canonical import seal
from keepstep.storage.store import Store
from keepstep.trainer.config import DataSection
from keepstep.trainer.text import Document
from keepstep.trainer.tokens import FOLDER, TokenIndex, open_tokens, prepare, read_index, split, unigram_nats

FILES = ("tokens/held_out.bin", "tokens/index.json", "tokens/tokenizer.json", "tokens/train-documents.bin", "tokens/train.bin")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.txt").write_text(f"Chapter {i}: in a hole in the ground there lived a hobbit. Ünïcödé too.\n" * (i + 3))
    return folder


def section(text: Path, **more: object) -> DataSection:
    return DataSection.model_validate({"source": str(text), "vocabulary": 300, "held_out": 0.2} | more)


def content(root: Path) -> dict[str, str]:
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in FILES}


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_the_same_text_gives_the_same_bytes(text: Path, tmp_path: Path, tokenizer: str) -> None:
    for name in "ab":
        prepare(section(text, tokenizer=tokenizer), Store.open(tmp_path / name))
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_the_tokens_are_the_documents_with_an_end_after_each(text: Path, tmp_path: Path, tokenizer: str) -> None:
    store = Store.open(tmp_path / "root")
    index = prepare(section(text, tokenizer=tokenizer), store)
    tokens = open_tokens(store)
    assert (index.train.documents, index.held_out.documents) == (8, 2)
    end = tokens.tokenizer.end_of_text
    pieces = np.split(np.array(tokens.train), np.flatnonzero(tokens.train == end) + 1)[:-1]
    decoded = [tokens.tokenizer.decode(piece.tolist()) for piece in pieces]
    texts = {path.read_text() for path in text.iterdir()}
    assert len(decoded) == 8
    assert set(decoded) < texts
    assert tokens.tokenizer.decode(tokens.held_out.tolist()) not in "".join(decoded)


def test_preparing_twice_does_nothing(text: Path, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "root")
    first = prepare(section(text), store)
    (text / "0.txt").unlink()
    told: list[str] = []
    assert prepare(section(text), store, lambda what, share: told.append(what)) == first
    assert told == []


def test_another_recipe_is_refused(text: Path, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "root")
    prepare(section(text), store)
    with pytest.raises(ValueError, match=r"another \[data\] section; undo the change, or choose another run.root"):
        prepare(section(text, vocabulary=280), store)


def test_progress_is_told(text: Path, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    prepare(section(text), Store.open(tmp_path / "root"), lambda what, share: told.append((what, share)))
    assert [share for _, share in told] == sorted(share for _, share in told)
    assert told[-1] == ("tokens ready", 1.0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is an empty folder"),
        (lambda path: path.write_text("  \n"), "holds no text"),
        (lambda path: path.write_text("short"), "one short document only"),
        (lambda path: path.write_bytes(b"fine\n\xff\xfe"), r"is not UTF-8 text \(byte 5\)"),
    ],
)
def test_missing_and_unusable_text_is_named_with_a_remedy(tmp_path: Path, make: object, says: str) -> None:
    source = tmp_path / "source"
    assert callable(make)
    make(source)
    with pytest.raises(ValueError, match=f"data.source = '{source}'.*{says}"):
        prepare(section(source), Store.open(tmp_path / "root"))
    assert read_index(Store.open(tmp_path / "root")) is None


def test_a_protocol_without_a_library_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.source = 'nosuch://x' cannot be read: Protocol not known: nosuch"):
        prepare(DataSection(source="nosuch://x"), Store.open(tmp_path / "root"))


def test_one_long_file_is_several_documents(tmp_path: Path) -> None:
    source = tmp_path / "book.txt"
    source.write_text("".join(f"Line {i} of the book.\n" + ("\n" if i % 10 == 0 else "") for i in range(2000)))
    store = Store.open(tmp_path / "root")
    index = prepare(section(source, tokenizer="bytes"), store)
    assert index.train.documents + index.held_out.documents == 6
    assert index.train.text_bytes + index.held_out.text_bytes == source.stat().st_size


def test_max_bytes_limits_the_text(text: Path, tmp_path: Path) -> None:
    index = prepare(section(text, tokenizer="bytes", max_bytes=1000), Store.open(tmp_path / "root"))
    assert 996 < index.train.text_bytes + index.held_out.text_bytes <= 1000


def test_the_split_is_by_name_and_keeps_both_sides() -> None:
    found = [Document(f"{i}", "x") for i in range(100)]
    train, held_out = split(found, 0.1)
    assert len(held_out) == 10
    assert sorted(train + held_out, key=lambda d: int(d.name)) == found
    assert split(found[:2], 0.001)[1] != []
    assert split(found[:2], 0.49)[0] != []


def test_damaged_tokens_are_not_opened(text: Path, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "root")
    prepare(section(text), store)
    body = bytearray((tmp_path / "root/tokens/train.bin").read_bytes())
    body[5] ^= 1
    (tmp_path / "root/tokens/train.bin").write_bytes(body)
    for scratch in (None, tmp_path / "scratch"):
        with pytest.raises(ValueError, match=r"tokens/train.bin is not what tokens/index.json says; delete the folder tokens/"):
            open_tokens(store, scratch)


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_of_any_file_is_trained_on(text: Path, tmp_path: Path, name: str) -> None:
    store, chance = Store.open(tmp_path / "root"), random.Random(name)
    prepare(section(text, tokenizer="bytes"), store)
    whole = store.get(name)
    for _ in range(25):
        body = bytearray(whole)
        body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
        store.put(name, bytes(body))
        with pytest.raises(ValueError, match="prepare"):
            open_tokens(store)


def test_a_remote_root_is_copied_to_the_node_once(text: Path, tmp_path: Path) -> None:
    store = Store.open("memory://tokens-are-copied")
    index = prepare(section(text), store)
    scratch = tmp_path / "scratch"
    first = open_tokens(store, scratch)
    store.delete_tree(f"{FOLDER}/train.bin")
    second = open_tokens(store, scratch)
    assert np.array_equal(first.train, second.train)
    assert len(first.train) == index.train.tokens
    assert sorted(path.suffix for path in (scratch / FOLDER).iterdir()) == [".bin"] * 3


def test_tokens_that_were_never_prepared_are_missed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no tokens yet: run `keepstep prepare` first"):
        open_tokens(Store.open(tmp_path))


def test_the_index_survives_its_bytes(text: Path, tmp_path: Path) -> None:
    index = prepare(section(text), Store.open(tmp_path / "root"))
    assert TokenIndex.parse(index.body()) == index


def test_an_index_of_another_version_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"tokens/index\.json is not of format 2: .*; go on with that one, or choose another run\.root"):
        TokenIndex.parse(seal({"format": 1}))


def test_unigram_nats_are_the_entropy_of_the_frequencies() -> None:
    counts = np.array([1, 1, 2])
    assert unigram_nats(counts, np.array([0, 1, 2, 2], dtype=np.uint16), smoothing=0) == pytest.approx(1.5 * math.log(2))


def test_end_of_text_in_a_text_is_text(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("before <|endoftext|> after")
    store = Store.open(tmp_path / "root")
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / f"{name}.txt").rename(tmp_path / "text" / f"{name}.txt")
    prepare(section(tmp_path / "text"), store)
    tokens = open_tokens(store)
    assert (tokens.train == tokens.tokenizer.end_of_text).sum() == 1
    assert tokens.tokenizer.decode(tokens.train.tolist()) == "before <|endoftext|> after"
