"""Tokenizers: what is learnt, that nothing is lost, and that what exists can be used."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibrarysOwn
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from keepstep.trainer import tokenizer as tokenizers
from keepstep.trainer import unigram
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.learning import existing, open_learner
from keepstep.trainer.tokenizer import MASK, Tokenizer, as_array, load_tokenizer

TEXTS = [f"Chapter {i}: it's in a hole in the ground, there lived a hobbit.\n\n  Ünïcödé — 漢字 {i * i}!" for i in range(60)]
LEARNT = ("bpe", "unigram", "words", "characters")
ANY = st.text(st.characters(codec="utf-8"), max_size=60)


def learnt(kind: str, texts: Sequence[str] = TEXTS, *, objective: str = "next-token", **data: Any) -> Tokenizer:
    config = TrainerConfig.model_validate({"data": {"tokenizer": kind, "vocabulary": 600} | data, "train": {"objective": objective}})
    learner = open_learner(config)
    for start in range(0, len(texts), 7):
        learner.feed(texts[start : start + 7])
    return learner.finish()


@pytest.fixture(scope="module", params=[*LEARNT, "bytes"])
def made(request: pytest.FixtureRequest) -> Tokenizer:
    return learnt(request.param)


@pytest.fixture(scope="module", params=["bpe", "unigram", "bytes"])
def on_bytes(request: pytest.FixtureRequest) -> Tokenizer:
    return learnt(request.param)


class TestAll:
    def test_what_it_was_made_of_comes_back(self, made: Tokenizer) -> None:
        for text, ids in zip(TEXTS, made.encode_all(TEXTS), strict=True):
            assert made.decode(list(ids)) == text
            assert max(ids) < made.size

    def test_its_file_is_the_same_tokenizer(self, made: Tokenizer) -> None:
        again = load_tokenizer(made.to_json())
        assert type(again) is type(made)
        assert again.to_json() == made.to_json()
        assert [list(ids) for ids in again.encode_all(TEXTS)] == [list(ids) for ids in made.encode_all(TEXTS)]
        assert (again.size, again.end_of_text, again.mask, again.unknown) == (made.size, made.end_of_text, made.mask, made.unknown)

    def test_end_of_text_in_a_text_is_text_and_as_a_token_vanishes(self, made: Tokenizer) -> None:
        (ids,) = made.encode_all(["a<|endoftext|>b"])
        assert made.end_of_text not in list(ids)
        assert made.decode([*ids, made.end_of_text]) == made.decode(list(ids)) != ""
        assert made.decode([made.end_of_text]) == ""

    def test_ids_are_an_array_without_loss(self, made: Tokenizer) -> None:
        for ids in made.encode_all(TEXTS):
            assert as_array(ids).tolist() == list(ids)

    def test_an_empty_text_has_no_tokens(self, made: Tokenizer) -> None:
        assert [list(ids) for ids in made.encode_all(["", "a", ""])][::2] == [[], []]

    def test_a_mask_is_added_for_those_who_ask(self, made: Tokenizer) -> None:
        assert made.mask is None

    @pytest.mark.parametrize("kind", [*LEARNT, "bytes"])
    def test_a_mask_survives_its_file_and_is_never_in_a_text(self, kind: str) -> None:
        made = load_tokenizer(learnt(kind, objective="masked").to_json())
        assert made.mask is not None
        assert made.mask < made.size
        assert made.mask not in list(made.encode_all([f"a {MASK} b{MASK}"])[0])
        assert made.decode([made.mask]) == MASK


class TestLossless:
    @given(text=ANY)
    def test_any_text_comes_back_from_bytes(self, on_bytes: Tokenizer, text: str) -> None:
        assert on_bytes.decode(list(on_bytes.encode_all([text])[0])) == text

    @given(text=st.text("aehilno' \n\t.,:0", max_size=60))
    def test_characters_that_are_known_come_back(self, text: str) -> None:
        made = learnt("characters", ["aehilno' \n\t.,:0"])
        assert made.decode(list(made.encode_all([text])[0])) == text

    @given(text=ANY)
    def test_words_come_back_where_all_are_known(self, text: str) -> None:
        made = learnt("words", [text, "x"], vocabulary=1000)
        assert made.decode(list(made.encode_all([text])[0])) == text


class TestWords:
    def test_the_frequent_ones_are_known_and_the_rest_is_unknown(self) -> None:
        made = learnt("words", ["a a a b b c", " a b"], min_frequency=2, vocabulary=600)
        assert made.unknown == 1
        ids = made.encode_all(["a b c d"])[0]
        assert [i == made.unknown for i in ids] == [True, False, True, True]  # "a" came once without a space
        assert made.decode(list(ids)) == "<|unknown|> b<|unknown|><|unknown|>"

    def test_the_vocabulary_has_a_limit_with_the_special_ones_in_it(self) -> None:
        assert learnt("words", [" ".join(map(str, range(1000)))], vocabulary=100).size == 100


class TestCharacters:
    def test_the_most_frequent_are_known_ties_by_code_point(self) -> None:
        made = learnt("characters", ["bbbbaacdd"], vocabulary=5)
        assert made.size == 5
        assert made.decode([2, 3, 4]) == "bad"
        assert list(made.encode_all(["abcd"])[0]) == [3, 2, 1, 4]

    def test_rare_ones_are_unknown(self) -> None:
        made = learnt("characters", ["aab"], min_frequency=2)
        assert list(made.encode_all(["ab"])[0]) == [2, 1]

    def test_the_library_gives_the_same_ids_from_its_file(self) -> None:
        made = learnt("characters", objective="masked")
        library = LibrarysOwn.from_str(made.to_json().decode())
        library.encode_special_tokens = True
        for text in [*TEXTS, "unknown: 猫\U0001f600 <|mask|>"]:
            assert library.encode(text).ids == list(made.encode_all([text])[0])


class TestBpe:
    def test_it_is_what_the_library_learns(self) -> None:
        own = LibrarysOwn(models.BPE())
        own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
        own.train_from_iterator(TEXTS, trainer)
        assert [encoding.ids for encoding in own.encode_batch(TEXTS)] == [list(ids) for ids in learnt("bpe").encode_all(TEXTS)]

    @pytest.mark.parametrize("kind", ["bpe", "unigram", "words"])
    def test_a_long_text_in_parts_has_the_same_tokens(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        made, text = learnt(kind), " ".join(TEXTS)
        whole = list(made.encode_all([text])[0])
        monkeypatch.setattr(tokenizers, "_WHOLE_CHARS", 50)
        assert len(list(tokenizers._parts(text))) > 20
        assert list(made.encode_all([text, "x"])[0]) == whole


class TestUnigram:
    def test_pieces_that_cover_the_text_are_kept_and_probable(self) -> None:
        scores = unigram.learn({"abab": 50, "ab": 30, "cd": 5, "abcd": 3, "x": 1}, list("abcdxyz"), 9)
        assert len(scores) == 9
        assert set("abcdxyz") < set(scores)
        assert {"ab", "abab"} <= set(scores)
        assert scores["ab"] > scores["y"]

    def test_the_vocabulary_has_a_limit_and_holds_all_bytes(self) -> None:
        made = learnt("unigram", vocabulary=512)
        assert 258 < made.size <= 512
        assert len(made.encode_all([TEXTS[0]])[0]) < 0.7 * len(TEXTS[0].encode())

    @pytest.mark.slow
    def test_it_compresses_as_well_as_the_librarys_own_training(self) -> None:
        import pydoc_data.topics

        texts = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
        library = LibrarysOwn(models.Unigram())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        library.train_from_iterator(texts, trainers.UnigramTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False))
        theirs = sum(len(encoding.ids) for encoding in library.encode_batch(texts))
        ours = sum(len(ids) for ids in learnt("unigram", texts, vocabulary=2000).encode_all(texts))
        assert ours < 1.03 * theirs


PROGRAM = """
import hashlib, sys
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.learning import open_learner
from pydoc_data.topics import topics
learner = open_learner(TrainerConfig.model_validate({"data": {"tokenizer": sys.argv[1], "vocabulary": 700}}))
for name in sorted(topics)[:40]:
    learner.feed([topics[name]])
print(hashlib.sha256(learner.finish().to_json()).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", LEARNT)
def test_other_processes_with_other_hashes_and_threads_learn_the_same(kind: str) -> None:
    found = set()
    for seed, threads, parallel in (("0", "1", "false"), ("1", "1", "true"), ("2", "4", "true")):
        environment = {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": parallel, **_paths()}
        answer = subprocess.run(
            [sys.executable, "-c", PROGRAM, kind], env=environment, capture_output=True, text=True, timeout=120, check=True
        )
        found.add(answer.stdout)
    assert len(found) == 1


def _paths() -> dict[str, str]:
    import os

    return {name: os.environ[name] for name in ("PYTHONPATH", "PATH") if name in os.environ}


def wordpiece(**more: Any) -> LibrarysOwn:
    """Like BERT's: with a normalizer, and with tokens that it puts around a text."""
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "hello", "##s", "world"])} | more
    own = LibrarysOwn(models.WordPiece(vocabulary, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.decoder = decoders.WordPiece()
    own.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    own.enable_truncation(3)
    own.enable_padding(length=5)
    return own


class TestExisting:
    def test_nothing_is_added_to_a_text_and_nothing_cut_off(self, tmp_path: Path) -> None:
        wordpiece().save(str(tmp_path / "tokenizer.json"))
        made = existing(str(tmp_path / "tokenizer.json"), with_mask=False)
        assert [list(ids) for ids in made.encode_all(["hello world hellos worlds", "x"])] == [[4, 6, 4, 5, 6, 5], [1]]
        assert (made.end_of_text, made.unknown, made.mask, made.size) == (3, 1, None, 7)

    def test_a_mask_is_added_where_it_has_none(self, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.json"
        wordpiece().save(str(path))
        assert existing(str(path), with_mask=True).mask == 7
        wordpiece(**{"[MASK]": 7, "more": 8}).save(str(path))
        assert (existing(str(path), with_mask=True).mask, existing(str(path), with_mask=False).mask) == (7, 7)

    def test_that_of_another_runs_root_is_taken(self, tmp_path: Path) -> None:
        made = learnt("bpe")
        (tmp_path / "root/tokens").mkdir(parents=True)
        (tmp_path / "root/tokens/tokenizer.json").write_bytes(made.to_json())
        assert existing(str(tmp_path / "root"), with_mask=False).to_json() == made.to_json()

    @pytest.mark.parametrize(
        ("body", "says"),
        [
            (b"[]", "cannot be used: it is no JSON object"),
            (b'{"x": 1}', "cannot be used: it is no tokenizer.json of the library tokenizers"),
            (b"{", "cannot be used: "),
        ],
    )
    def test_what_is_none_is_named(self, tmp_path: Path, body: bytes, says: str) -> None:
        (tmp_path / "a.json").write_bytes(body)
        with pytest.raises(ValueError, match=rf"^data.tokenizer = '.*a\.json' {says}"):
            existing(str(tmp_path / "a.json"), with_mask=False)

    def test_one_that_cannot_end_a_text_is_refused(self, tmp_path: Path) -> None:
        LibrarysOwn(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "a.json"))
        with pytest.raises(ValueError, match=r"has no token that ends a text; one of <\|endoftext\|>, </s>, .* must be in its vocabulary"):
            existing(str(tmp_path / "a.json"), with_mask=False)

    @pytest.mark.parametrize("where", ["bpee", "/no/such/root", "/no/such/tokenizer.json"])
    def test_one_that_is_not_there_is_named(self, where: str) -> None:
        with pytest.raises(ValueError, match=rf"^data.tokenizer = '{where}' (is no run's root|does not exist)"):
            existing(where, with_mask=False)
