"""What is done to a text before anything is learnt from it: cleaned, looked for among those that came, put on one side of the split."""

from __future__ import annotations

import random
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.trainer import duplicates, splitting
from keepstep.trainer.cleaning import clean, cut_to
from keepstep.trainer.config import DataSection
from keepstep.trainer.duplicates import open_filter, shingles
from keepstep.trainer.splitting import Split, held_out_of, is_below, teaches

ANY = st.text(st.characters(codec=None), max_size=80)  # lone surrogates included
WORDS = [f"word{i}" for i in range(500)]


class TestCleaning:
    @given(text=ANY, form=st.sampled_from(["none", "nfc", "nfkc"]), strip=st.booleans())
    def test_cleaning_twice_changes_nothing_more(self, text: str, form: str, strip: bool) -> None:
        data = DataSection.model_validate({"normalize": form, "strip_control": strip})
        once = clean(text, data)
        assert clean(once, data) == once
        assert once.encode().decode() == once
        if form != "none":
            assert unicodedata.is_normalized(form.upper(), once)
        if strip:
            assert {c for c in once if unicodedata.category(c) == "Cc"} <= {"\t", "\n"}

    @given(text=st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=50))
    def test_without_controls_and_normalization_nothing_is_changed(self, text: str) -> None:
        assert clean(text, DataSection(normalize="none")) == text

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("a\r\nb\rc\x0cd\u2028e", "a\nb\nc\nd\ne"),
            ("a\x00b\x1bc\x7fd\x9fe\tf", "abcde\tf"),
            ("e\u0301\x00", "\xe9"),
            ("\ud800x", "\ufffdx"),
        ],
    )
    def test_examples(self, text: str, expected: str) -> None:
        assert clean(text, DataSection()) == expected

    def test_compatibility_characters_stay_unless_they_are_not_wanted(self) -> None:
        assert clean("ﬁne ２", DataSection()) == "ﬁne ２"
        assert clean("ﬁne ２", DataSection(normalize="nfkc")) == "fine 2"

    @given(text=st.text(max_size=30), most=st.integers(0, 60))
    def test_a_text_is_cut_between_characters(self, text: str, most: int) -> None:
        cut = cut_to(text, most)
        assert text.startswith(cut)
        assert len(cut.encode()) <= most
        assert cut == text or len((cut + text[len(cut)]).encode()) > most


class TestExactDuplicates:
    @given(texts=st.lists(st.text("ab\0", max_size=3), max_size=40), size=st.integers(1, 7))
    def test_the_first_of_each_stays_however_they_come(self, texts: list[str], size: int) -> None:
        found = open_filter(DataSection(deduplicate="exact"), threads=1)
        kept = [kept for start in range(0, len(texts), size) for kept in found.new(texts[start : start + size]).tolist()]
        assert kept == [text not in texts[:i] for i, text in enumerate(texts)]

    def test_none_are_looked_for_without_being_asked(self) -> None:
        assert open_filter(DataSection(), threads=1).new(["a", "a"]).tolist() == [True, True]


def changed(words: list[str], every: int) -> str:
    return " ".join("other" if i % every == 0 else word for i, word in enumerate(words))


@pytest.mark.slow
class TestNearDuplicates:
    def documents(self) -> list[str]:
        chance = random.Random(1)
        first = [chance.choices(WORDS, k=400) for _ in range(8)]
        near = [changed(words, 150) for words in first]  # three words of 400: 15 of 396 shingles are others
        far = [changed(words, 8) for words in first]  # half of the shingles and more
        return [" ".join(words) for words in first] + near + far + ["short", "short text", "Short"]

    @pytest.mark.parametrize("threads", [1, 3])
    @pytest.mark.parametrize("size", [1, 5, 100])
    def test_similar_ones_go_and_others_stay_however_they_come(self, threads: int, size: int) -> None:
        texts = self.documents()
        found = open_filter(DataSection(deduplicate="near"), threads)
        kept = [kept for start in range(0, len(texts), size) for kept in found.new(texts[start : start + size]).tolist()]
        assert kept == [True] * 8 + [False] * 8 + [True] * 8 + [True, True, False]

    def test_the_threshold_decides(self) -> None:
        texts = self.documents()[:16]
        assert open_filter(DataSection(deduplicate="near", near_threshold=0.99), 2).new(texts).tolist() == [True] * 16

    def test_a_long_document_is_hashed_in_parts(self) -> None:
        words = random.Random(2).choices(WORDS, k=20_000)
        texts = [" ".join(words), changed(words, 5000), " ".join(reversed(words))]
        assert open_filter(DataSection(deduplicate="near"), 2).new(texts).tolist() == [True, False, True]


@given(words=st.lists(st.text("abc\xe9", min_size=1, max_size=4), min_size=1, max_size=30))
def test_equal_shingles_have_equal_hashes_wherever_they_stand_and_others_do_not(words: list[str]) -> None:
    found = np.concatenate(list(shingles("  ".join(words).upper())))
    of = [tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))]
    assert len(found) == len(of)
    assert len(set(found.tolist())) == len(set(of))
    assert found.max() < 2**32
    moved = np.concatenate(list(shingles("other words before " + " ".join(words))))
    assert len(words) < 5 or moved[-len(of) :].tolist() == found.tolist()


def test_the_hashes_of_shingles_do_not_depend_on_how_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(random.Random(3).choices(WORDS, k=300))
    whole = np.concatenate(list(shingles(text)))
    monkeypatch.setattr(duplicates, "_AT_ONCE", 7)
    assert np.concatenate(list(shingles(text))).tolist() == whole.tolist()


names = st.lists(st.text(max_size=5), min_size=2, max_size=30)


class TestSplit:
    def of_many(self, found: list[str], share: float) -> frozenset[int]:
        """As if they were many."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(splitting, "FEW_DOCUMENTS", 1)
            return held_out_of(found, share)

    @given(found=names, share=st.floats(0.001, 0.499))
    def test_of_few_documents_exactly_the_share_is_held_out(self, found: list[str], share: float) -> None:
        assert len(held_out_of(found, share)) == min(max(1, round(len(found) * share)), len(found) - 1)

    @given(found=names, share=st.floats(0.001, 0.499))
    def test_both_sides_have_a_document_and_names_decide_where_they_can(self, found: list[str], share: float) -> None:
        held_out = self.of_many(found, share)
        assert 0 < len(held_out) < len(found)
        natural = {i for i, name in enumerate(found) if is_below(name, share)}
        assert len(natural ^ held_out) <= 1
        if 0 < len(natural) < len(found):
            assert held_out == natural

    @given(found=names, share=st.floats(0.001, 0.499), few=st.integers(1, 31))
    def test_what_teaches_is_the_training_side_and_nothing_else(self, found: list[str], share: float, few: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(splitting, "FEW_DOCUMENTS", few)
            self.check_teaching(found, share)

    def check_teaching(self, found: list[str], share: float) -> None:
        split = Split(share)
        taught = [text for i, name in enumerate(found) for text in split.add(i, name, (str(i),))]
        taught += split.end()[1]
        assert sorted(map(int, taught)) == sorted(set(range(len(found))) - held_out_of(found, share))

    def test_the_share_is_about_what_was_asked_for(self) -> None:
        assert 150 < len(held_out_of([f"a.txt#{i}" for i in range(10_000)], 0.02)) < 250
        assert 4500 < sum(teaches(f"a.txt#{i}", 0.5) for i in range(10_000)) < 5500
        assert all(teaches(f"a.txt#{i}", 1.0) for i in range(100))
