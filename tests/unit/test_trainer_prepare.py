"""`prepare`: the same text gives the same bytes, whatever kills it on the way; and bad text leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepared import config, content, write_text

from keepstep.storage.store import Store
from keepstep.trainer import corpus, encoding, learning
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.preparing import prepare
from keepstep.trainer.sources import find_source
from keepstep.trainer.splitting import is_below
from keepstep.trainer.tokens import Tokens, open_tokens


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text")


def documents(tokens: Tokens) -> list[str]:
    """The texts of both sides, in order."""
    found = []
    for part, starts in ((tokens.train, tokens.starts), (tokens.held_out, tokens.held_out_starts)):
        bounds = [*starts.tolist(), len(part)]
        found += [tokens.tokenizer.decode(part[first:last].tolist()) for first, last in pairwise(bounds)]
    return found


class TestResult:
    @pytest.mark.parametrize("tokenizer", ["bpe", "bytes", "words", "characters"])
    def test_the_same_text_gives_the_same_bytes_however_it_is_worked_on(
        self, text: Path, tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prepare(config(text, tokenizer=tokenizer), Store.open(tmp_path / "a"), threads=1)
        monkeypatch.setattr(corpus, "_LOT_DOCUMENTS", 3)
        monkeypatch.setattr(encoding, "_ENCODERS", 5)
        prepare(config(text, tokenizer=tokenizer), Store.open(tmp_path / "b"), threads=4)
        assert content(tmp_path / "a") == content(tmp_path / "b")

    @pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
    def test_every_document_is_on_one_side_and_ends_with_an_end(self, text: Path, tmp_path: Path, tokenizer: str) -> None:
        store = Store.open(tmp_path / "root")
        index = prepare(config(text, tokenizer=tokenizer), store)
        tokens = open_tokens(store)
        lines = [json.loads(line)["text"] for line in (text / "more.jsonl").read_text().splitlines()]
        assert sorted(documents(tokens)) == sorted([path.read_text() for path in text.glob("*.txt")] + lines)
        assert (tokens.train[tokens.starts[1:].astype(np.int64) - 1] == tokens.tokenizer.end_of_text).all()
        assert index.train.documents + index.held_out.documents == 210
        assert index.held_out.documents == 42

    def test_each_source_has_both_sides(self, tmp_path: Path) -> None:
        for name in "ab":
            (tmp_path / name).mkdir()
            for i in range(2):
                (tmp_path / name / f"{i}.txt").write_text(f"{name}{i}")
        index = prepare(config("", sources=[str(tmp_path / name) for name in "ab"], held_out=0.001), Store.open(tmp_path / "root"))
        assert [extent.documents for part in (index.train, index.held_out) for extent in part.sources] == [1] * 4

    def test_no_tokenizer_learns_from_held_out_text(self, tmp_path: Path) -> None:
        (tmp_path / "text").mkdir()
        for i in range(30):
            (tmp_path / "text" / f"{i}.txt").write_text(chr(0x4E00 + i) * 5)
        store = Store.open(tmp_path / "root")
        index = prepare(config(tmp_path / "text", tokenizer="characters"), store)
        assert index.vocabulary == 2 + index.train.documents
        assert index.train.unknown == 0
        assert index.held_out.unknown == index.held_out.tokens - index.held_out.documents > 0

    def test_one_long_file_is_several_documents(self, tmp_path: Path) -> None:
        source = tmp_path / "book.txt"
        source.write_text("".join(f"Line {i} of the book.\n" + ("\n" if i % 10 == 0 else "") for i in range(2000)))
        index = prepare(config(source), Store.open(tmp_path / "root"))
        assert index.train.documents + index.held_out.documents == 6
        assert index.train.text_bytes + index.held_out.text_bytes == source.stat().st_size

    def test_max_bytes_limits_the_text_of_each_source(self, text: Path, tmp_path: Path) -> None:
        index = prepare(config(text, max_bytes=1000), Store.open(tmp_path / "root"))
        assert 996 < index.train.text_bytes + index.held_out.text_bytes <= 1000
        assert index.report.files == 11

    def test_duplicates_are_left_out_and_counted(self, tmp_path: Path) -> None:
        source = tmp_path / "a.jsonl"
        source.write_text("".join(json.dumps({"text": f"document {i % 10}"}) + "\n" for i in range(40)))
        store = Store.open(tmp_path / "root")
        index = prepare(config(source, deduplicate="exact"), store)
        assert index.report.duplicates == 30
        assert sorted(documents(open_tokens(store))) == [f"document {i}" for i in range(10)]

    @pytest.mark.slow
    def test_near_duplicates_are_left_out_whatever_number_of_threads_looks_for_them(self, tmp_path: Path) -> None:
        source = tmp_path / "a.jsonl"
        texts = [" ".join(f"{i}word{j}" for j in range(200)) for i in range(12)]
        near = [text.replace("word7 ", "other ") for text in texts[:5]]
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts + near))
        for threads in (1, 3):
            store = Store.open(tmp_path / str(threads))
            assert prepare(config(source, deduplicate="near"), store, threads=threads).report.duplicates == 5
            assert sorted(documents(open_tokens(store))) == sorted(texts)
        assert content(tmp_path / "1") == content(tmp_path / "3")

    def test_of_many_documents_names_decide_which_are_held_out(self, tmp_path: Path) -> None:
        source = tmp_path / "a.jsonl"
        source.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(400)))
        store = Store.open(tmp_path / "root")
        index = prepare(config(source, tokenizer="words"), store)
        expected = [f"document {i}" for i in range(400) if is_below(f"a.jsonl#{i}", 0.2)]
        assert documents(open_tokens(store))[index.train.documents :] != expected  # words that nobody learnt
        assert index.held_out.documents == len(expected)
        other = Store.open(tmp_path / "other")
        prepare(config(source), other)
        assert documents(open_tokens(other))[index.train.documents :] == expected

    def test_the_text_is_cleaned(self, tmp_path: Path) -> None:
        source = tmp_path / "a.jsonl"
        source.write_text(json.dumps({"text": "e\u0301\r\n\x00!"}) + "\n" + json.dumps({"text": "\ud83d half"}) + "\n")
        store = Store.open(tmp_path / "root")
        prepare(config(source), store)
        assert sorted(documents(open_tokens(store))) == ["\xe9\n!", "\ufffd half"]

    @pytest.mark.slow
    def test_ids_beyond_16_bits_have_32(self, tmp_path: Path) -> None:
        source = tmp_path / "a.jsonl"
        characters = [chr(i) for i in (*range(0x4E00, 0x9FFF), *range(0x20000, 0x2A6DF), *range(0xAC00, 0xD7A3))]
        source.write_text("".join(json.dumps({"text": "".join(characters)}) + "\n" for _ in range(3)))
        store = Store.open(tmp_path / "root")
        index = prepare(config(source, tokenizer="characters", vocabulary=1 << 20, normalize="none"), store)
        assert (index.dtype, index.vocabulary) == ("uint32", 2 + len(characters))
        assert set(documents(open_tokens(store))) == {"".join(characters)}

    def test_that_of_another_root_is_used_as_it_is(self, text: Path, tmp_path: Path) -> None:
        first = prepare(config(text, tokenizer="bpe"), Store.open(tmp_path / "a"))
        second = prepare(config(text / "more.jsonl", tokenizer=str(tmp_path / "a")), Store.open(tmp_path / "b"))
        assert second.tokenizer_sha256 == first.tokenizer_sha256

    def test_preparing_twice_does_nothing(self, text: Path, tmp_path: Path) -> None:
        store = Store.open(tmp_path / "root")
        first = prepare(config(text), store)
        (text / "0.txt").unlink()
        told: list[str] = []
        assert prepare(config(text), store, lambda what, done, total: told.append(what)) == first
        assert told == []

    @pytest.mark.parametrize("change", [{"vocabulary": 580}, {"normalize": "none"}, {"shard_mb": 3}])
    def test_another_recipe_is_refused(self, text: Path, tmp_path: Path, change: dict[str, object]) -> None:
        store = Store.open(tmp_path / "root")
        prepare(config(text), store)
        with pytest.raises(ValueError, match=r"another \[data\] section; undo the change, or choose another run.root"):
            prepare(config(text, **change), store)
        with pytest.raises(ValueError, match=r"another \[data\] section"):
            prepare(config(text, "masked"), store)

    def test_progress_goes_from_nothing_to_all_bytes_of_both_passes(self, text: Path, tmp_path: Path) -> None:
        told: list[tuple[str, int, int]] = []
        prepare(config(text), Store.open(tmp_path / "root"), lambda *each: told.append(each))
        size = sum(path.stat().st_size for path in text.iterdir())
        assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
        assert {total for _, _, total in told} == {2 * size}
        assert told[0] == ("reading text", 0, 2 * size)
        assert told[-1] == ("writing tokens", 2 * size, 2 * size)
        assert list(dict.fromkeys(what for what, _, _ in told)) == [
            "reading text",
            "learning the tokenizer",
            "encoding text",
            "writing tokens",
        ]


class TestRecords:
    def rows(self, path: Path, rows: Iterable[dict[str, object]]) -> Path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def test_a_pair_is_two_texts_and_its_mark_counts_the_first(self, tmp_path: Path) -> None:
        pairs = [(f"question {i}?", f"answer {i * i}") for i in range(30)] + [("", "no prompt")]
        source = self.rows(tmp_path / "a.jsonl", ({"prompt": prompt, "completion": completion} for prompt, completion in pairs))
        store = Store.open(tmp_path / "root")
        index = prepare(config(source, "pairs"), store)
        tokens, found = open_tokens(store), []
        assert tokens.marks is not None
        assert tokens.held_out_marks is not None
        sides = (tokens.train, tokens.starts, tokens.marks), (tokens.held_out, tokens.held_out_starts, tokens.held_out_marks)
        for part, starts, marks in sides:
            for first, last, mark in zip(starts.tolist(), [*starts[1:].tolist(), len(part)], marks.tolist(), strict=True):
                ids = part[first:last].tolist()
                assert ids[mark - 1] == ids[-1] == tokens.tokenizer.end_of_text
                found.append((tokens.tokenizer.decode(ids[: mark - 1]), tokens.tokenizer.decode(ids[mark:])))
        assert sorted(found) == sorted(pairs)
        assert index.labels == ()

    @pytest.mark.parametrize(("labels", "ordered"), [([10, 2, -1], ("-1", "2", "10")), (["b", "10", "a"], ("10", "a", "b"))])
    def test_a_label_is_its_number_in_order(self, tmp_path: Path, labels: list[object], ordered: tuple[str, ...]) -> None:
        source = self.rows(tmp_path / "a.jsonl", ({"text": f"{labels[i % 3]}", "label": labels[i % 3]} for i in range(30)))
        store = Store.open(tmp_path / "root")
        index = prepare(config(source, "classes"), store)
        tokens = open_tokens(store)
        assert tokens.index.labels == index.labels == ordered
        assert tokens.marks is not None
        assert tokens.held_out_marks is not None
        marks = [*tokens.marks.tolist(), *tokens.held_out_marks.tolist()]
        assert [ordered[mark] for mark in marks] == documents(tokens)

    def test_masked_tokens_have_a_mask(self, text: Path, tmp_path: Path) -> None:
        store = Store.open(tmp_path / "root")
        assert prepare(config(text, "masked"), store).vocabulary == 258
        assert open_tokens(store).tokenizer.mask == 257


BAD: dict[str, tuple[Callable[[Path], Any], dict[str, object], str]] = {
    "missing": (lambda path: None, {}, "does not exist"),
    "empty folder": (lambda path: path.mkdir(), {}, "is an empty folder"),
    "empty file": (lambda path: path.write_text(""), {}, "holds no text"),
    "blank": (lambda path: path.write_text("  \n"), {}, "holds no text"),
    "short": (lambda path: path.write_text("short"), {}, "one short document only"),
    "no UTF-8": (lambda path: path.write_bytes(b"fine\n" * 10_000 + b"\xff\xfe"), {}, r"is not UTF-8 text \(byte 50000\)"),
    "tokenizer": (lambda path: path.write_text("x"), {"tokenizer": "bpee"}, "data.tokenizer = 'bpee' is no run's root"),
}


class TestBadText:
    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
    def test_it_is_named_with_a_remedy_and_leaves_nothing(self, tmp_path: Path, bad: str, tokenizer: str) -> None:
        make, more, says = BAD[bad]
        source, root = tmp_path / "source", tmp_path / "root"
        root.mkdir()
        make(source)
        with pytest.raises(ValueError, match=says if more else f"data.source = '{source}'.*{says}"):
            prepare(config(source, **{"tokenizer": tokenizer} | more), Store.open(root))
        assert content(root) == {}

    @pytest.mark.parametrize("name", ["a.jsonl", "b.txt"])
    def test_bad_text_behind_much_good_text_leaves_nothing(self, text: Path, tmp_path: Path, name: str) -> None:
        (text / "z").mkdir()
        (text / "z" / name).write_bytes(b'{"text": "x"}\n' * 5000 + b'{"txt": "\xff"}\n')
        with pytest.raises(ValueError, match=rf"data.source = '.*': z/{name}.* is not UTF-8"):
            prepare(config(text, tokenizer="bpe"), Store.open(tmp_path / "root"))
        assert content(tmp_path / "root") == {}

    def test_one_huge_line_is_text_like_any_other(self, tmp_path: Path) -> None:
        source = tmp_path / "a.txt"
        source.write_text("word " * 400_000)
        index = prepare(config(source), Store.open(tmp_path / "root"))
        assert index.train.text_bytes + index.held_out.text_bytes == 2_000_000
        assert index.train.documents + index.held_out.documents == 31

    def test_an_error_of_the_text_does_not_wait_for_the_tokenizer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The thread that learns ends with it."""
        import threading

        (tmp_path / "a.txt").write_bytes(b"x" * 100_000 + b"\xff")
        with pytest.raises(ValueError, match="is not UTF-8"):
            prepare(config(tmp_path / "a.txt", tokenizer="bpe"), Store.open(tmp_path / "root"))
        assert [thread for thread in threading.enumerate() if thread.name in ("tokenizer", "encode")] == []

    def test_what_the_library_cannot_learn_is_raised(self, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(vocabulary: int, **more: object) -> tuple[Any, Any]:
            return type("Broken", (), {"train_from_iterator": lambda *_: 1 / 0})(), None

        monkeypatch.setattr(learning, "_bpe", broken)
        with pytest.raises(ZeroDivisionError):
            prepare(config(text, tokenizer="bpe"), Store.open(tmp_path / "root"))


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "near").mkdir()
    for i in range(9):
        (tmp_path / f"far/{i}.txt").write_text(f"text {i} " * 40)
    (tmp_path / "near/link").symlink_to(tmp_path / "far")
    (tmp_path / "far/round").symlink_to(tmp_path / "near")
    source = find_source(str(tmp_path / "near"), "data.source")
    assert [file.name for file in source.files] == [f"link/{i}.txt" for i in range(9)]
    assert all(file.num_bytes > 40 for file in source.files)


def test_what_is_held_out_does_not_depend_on_the_tokenizer(tmp_path: Path) -> None:
    """Of few documents that are long."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " + "word " * 12_000}) + "\n" for i in range(200)))
    split = []
    for tokenizer in ("bytes", "bpe"):
        store = Store.open(tmp_path / tokenizer)
        data = {"source": str(path), "tokenizer": tokenizer, "vocabulary": 300, "held_out": 0.02}
        prepare(TrainerConfig.model_validate({"data": data}), store)
        tokens = open_tokens(store)
        starts = tokens.held_out_starts.astype(int)
        split.append([tokens.tokenizer.decode(tokens.held_out[start : start + 3].tolist())[:3] for start in starts])
    assert split[0]
    assert [int(text.split()[0]) for text in split[0]] == [int(text.split()[0]) for text in split[1]]


def test_a_tokenizer_json_that_changed_after_a_kill_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"a b c {i}"}) + "\n" for i in range(50)))
    words = {"<|endoftext|>": 0, "a": 1, "b": 2, "?": 3}
    kept = tmp_path / "tokenizer.json"

    def write(vocabulary: dict[str, int]) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers

        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(kept))

    write({name: i for name, i in words.items() if name != "?"})
    settings = TrainerConfig.model_validate({"data": {"source": str(tmp_path / "text.jsonl"), "tokenizer": str(kept), "held_out": 0.1}})
    store = Store.open(tmp_path / "root")
    with pytest.raises(ValueError, match=r"data.tokenizer cannot encode a text: .*; put its tokenizer.json right"):
        prepare(settings, store)
    write(words | {"?": 9})  # ids that no token has: the vocabulary goes on to the largest
    assert prepare(settings, store).vocabulary == 10
