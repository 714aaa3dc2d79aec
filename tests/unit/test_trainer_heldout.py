"""Which held-out rows there are, and what text their targets stand for."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.figures import ClassCounts, Evaluation
from keepstep.trainer.heldout import completed_bytes, held_out_of
from keepstep.trainer.samples import IGNORED
from keepstep.trainer.tokenizer import END_OF_TEXT, ByteTokenizer, Tokenizer, load_tokenizer
from keepstep.trainer.tokens import Extent, TokenArray

TEXTS = st.lists(st.text(max_size=12), min_size=1, max_size=5)
CONTEXT = 6


def learnt() -> Tokenizer:
    """Byte-level BPE of 300 tokens."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["das große Mädchen", "the quick brown fox", "\U0001f642\U0001f642 und \ufffd"] * 3, trainer)
    return load_tokenizer(made.to_str().encode())


def encoded(tokenizer: Tokenizer, texts: list[str]) -> TokenArray:
    return np.array([i for ids in tokenizer.encode_all(texts) for i in (*ids, tokenizer.end_of_text)], dtype=np.uint16)


def config(objective: str, **train: Any) -> TrainerConfig:
    return TrainerConfig.model_validate({"model": {"context": CONTEXT}, "train": {"objective": objective, **train}})


class Masking:
    """Bytes, one of which hides others."""

    mask, end_of_text, size = 255, 256, 257
    decode = staticmethod(ByteTokenizer().decode)


def tokens_of(documents: list[list[int]], marks: list[int] | None = None, labels: tuple[str, ...] = ()) -> Any:
    ids = np.array([i for document in documents for i in document], dtype=np.uint16)
    starts = np.cumsum([0, *map(len, documents[:-1])]).astype(np.uint64)
    held_out = SimpleNamespace(sources=(Extent(documents=len(documents), tokens=len(ids)),))
    return SimpleNamespace(
        index=SimpleNamespace(held_out=held_out, vocabulary=257, labels=labels),
        held_out=ids,
        held_out_starts=starts,
        held_out_marks=None if marks is None else np.array(marks, dtype=np.uint32),
        tokenizer=Masking(),
    )


@given(TEXTS, st.booleans(), st.data())
def test_the_characters_that_tokens_complete_add_up_to_the_text(texts: list[str], is_learnt: bool, data: st.DataObject) -> None:
    tokenizer = TOKENIZER if is_learnt else ByteTokenizer()
    ids = encoded(tokenizer, texts)
    assert completed_bytes(tokenizer, ids, len(ids)) == sum(len(text.encode()) for text in texts)
    count = data.draw(st.integers(0, len(ids)))
    before, after = (completed_bytes(tokenizer, ids, n) for n in (count, min(count + 1, len(ids))))
    assert before <= after


TOKENIZER = learnt()


def test_a_character_counts_with_the_token_that_completes_it() -> None:
    ids = encoded(ByteTokenizer(), ["a€b"])
    assert [completed_bytes(ByteTokenizer(), ids, count) for count in range(len(ids) + 1)] == [0, 1, 1, 1, 4, 5, 5]


def test_bits_per_byte_is_the_loss_of_the_text_by_its_bytes() -> None:
    tokens = tokens_of([[*"größer".encode(), 256], [*b"ok", 256]])
    held_out = held_out_of(tokens, config("next-token"))
    assert held_out.text_bytes == len("größer".encode()) + 2 - 1, "the first byte is given"
    evaluation = Evaluation(nats=9.0, tokens=10, text_bytes=held_out.text_bytes)
    assert evaluation.bits_per_byte == pytest.approx(9.0 / math.log(2) / 9)
    limited = held_out_of(tokens, config("next-token"), 3)
    assert limited.text_bytes == len("rö".encode())


def test_windows_follow_each_other_and_the_last_is_filled_up() -> None:
    held_out = held_out_of(tokens_of([[*range(9), 256]]), config("next-token"))
    rows = held_out.rows(range(held_out.num_rows))
    assert rows.inputs.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, *[IGNORED] * 3]]
    assert rows.targets.tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 256, *[IGNORED] * 3]]


def test_what_is_masked_in_a_window_does_not_depend_on_who_asks() -> None:
    held_out = held_out_of(tokens_of([[*range(40), 256]]), config("masked", mask_share=0.3))
    together = held_out.rows(range(held_out.num_rows))
    for number in range(held_out.num_rows):
        alone = held_out.rows(range(number, number + 1))
        assert (alone.inputs == together.inputs[number]).all()
        assert (alone.targets == together.targets[number]).all()
    asked = together.targets != IGNORED
    assert 0 < asked.sum() < 40
    assert (together.inputs[~asked & (together.inputs != IGNORED)] < 257).all()
    assert held_out.text_bytes is None


def test_of_pairs_the_completion_is_asked_for() -> None:
    tokens = tokens_of([[1, 2, 256, 3, 4, 256], [5, 256, 6, 256]], marks=[3, 2])
    held_out = held_out_of(tokens, config("pairs"))
    rows = held_out.rows(range(held_out.num_rows))
    assert [1, 2, 256, 3, 4, 256] in rows.inputs.tolist()
    assert sorted(rows.targets.tolist()) == [[IGNORED, IGNORED, 3, 4, 256, IGNORED], [IGNORED, 6, 256, IGNORED, IGNORED, IGNORED]]


def test_of_classes_the_label_is_asked_for_and_max_tokens_counts_whole_documents() -> None:
    tokens = tokens_of([[1, 2, 256], [3, 4, 256], [5, 6, 256]], marks=[1, 0, 1], labels=("no", "yes"))
    held_out = held_out_of(tokens, config("classes"))
    assert (held_out.num_rows, held_out.labels) == (3, ("no", "yes"))
    rows = held_out.rows(range(3))
    classes = dict(zip(rows.inputs[:, 0].tolist(), rows.targets.max(axis=1).tolist(), strict=True))
    assert classes == {1: 1, 3: 0, 5: 1}
    assert held_out_of(tokens, config("classes"), 7).num_rows == 2
    assert held_out_of(tokens, config("classes"), 1).num_rows == 1, "at least one document"


def test_some_documents_of_a_file_that_is_sorted_by_class_are_of_every_class() -> None:
    tokens = tokens_of([[1, 256]] * 50 + [[2, 256]] * 50, marks=[0] * 50 + [1] * 50, labels=("no", "yes"))
    some = held_out_of(tokens, config("classes"), 60)
    assert some.num_rows == 30
    assert 5 < some.rows(range(30)).targets.max(axis=1).sum() < 25


def test_prompts_that_leave_no_room_for_a_completion_are_refused_also_where_pairs_are_cut() -> None:
    tokens = tokens_of([[1, 2, 256, 3, 256], [*range(9), 256, 3, 256]], marks=[3, 10])
    with pytest.raises(ValueError, match=r"of 1 of 2 pairs the prompt alone fills model\.context = 6.* model\.context = 10 or more"):
        held_out_of(tokens, config("pairs", truncate=True))


def test_documents_that_are_too_long_are_refused_before_the_training() -> None:
    tokens = tokens_of([[1, 2, 256, *range(9), 256]], marks=[3])
    with pytest.raises(ValueError, match=r"model\.context"):
        held_out_of(tokens, config("pairs"))
    assert held_out_of(tokens, config("pairs", truncate=True)).num_rows == 1, "cut at its end"


@pytest.mark.parametrize("objective", ["pairs", "classes"])
def test_tokens_of_a_text_are_no_documents_with_labels(objective: str) -> None:
    with pytest.raises(ValueError, match=r"another run\.root"):
        held_out_of(tokens_of([[1, 256]]), config(objective))


def test_a_row_for_company_asks_for_nothing() -> None:
    rows = held_out_of(tokens_of([[1, 2, 256]]), config("next-token")).rows(range(0))
    assert rows.inputs.shape == (1, CONTEXT)
    assert (rows.targets == IGNORED).all()


def test_macro_figures_leave_out_classes_that_never_occur() -> None:
    one = ClassCounts(label="a", predicted=2, actual=4, right=2)
    other = ClassCounts(label="b", predicted=3, actual=1, right=1)
    never = ClassCounts(label="c", predicted=0, actual=0, right=0)
    found = Evaluation(nats=1.0, tokens=5, first=3, classes=(one, other, never)).macro()
    assert found == {"precision": pytest.approx((1 + 1 / 3) / 2), "recall": pytest.approx(0.75), "f1": pytest.approx((2 / 3 + 0.5) / 2)}
