"""Classes of texts, by our model and by transformers' of the same values."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keepstep.trainer.classify import probabilities
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.foreign import check_kind, write_folder
from keepstep.trainer.models import build_model
from keepstep.trainer.parallel import initialise
from keepstep.trainer.tokenizer import ByteTokenizer
from keepstep.trainer.trained import Trained

LABELS = ("bad", "good", "so-so")
TEXTS = ("A film to fall asleep over.", "Go!", "")


def learnt(**model: Any) -> Trained:
    """Random, but with weights that tell texts apart."""
    sections = {"model": {"layers": 2, "width": 32, "heads": 4, "context": 32, **model}, "train": {"objective": "classes"}}
    config, tokenizer = TrainerConfig.model_validate(sections), ByteTokenizer()
    made = build_model(config.model, tokenizer.size, outputs=len(LABELS), train=config.train)
    initialise(made, seed=1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    tokens: Any = SimpleNamespace(tokenizer=tokenizer, tokenizer_json=tokenizer.to_json(), index=SimpleNamespace(labels=LABELS))
    return Trained(config=config, tokens=tokens, model=made.eval(), step=1)


@pytest.mark.parametrize("kind", ["gpt", "llama", "bert", "lstm"])
@torch.no_grad()
def test_the_class_is_asked_for_at_the_end_of_the_text(kind: str) -> None:
    trained = learnt(kind=kind)
    for text in TEXTS:
        ids = torch.tensor([[*text.encode(), 256]])
        found = probabilities(trained, text)
        torch.testing.assert_close(torch.tensor(found), torch.softmax(trained.model(ids)[0, -1], 0), atol=1e-5, rtol=1e-4)
        assert sum(found) == pytest.approx(1)
    assert len({tuple(probabilities(trained, text)) for text in TEXTS}) == len(TEXTS)


def test_a_text_that_is_too_long_is_refused_unless_texts_were_cut_in_training() -> None:
    trained = learnt()
    with pytest.raises(ValueError, match=r"a text has 33 tokens, more than model.context = 32, and train.truncate = false: shorten it"):
        probabilities(trained, "x" * 32)
    trained.config.train.__dict__["truncate"] = True
    assert probabilities(trained, "x" * 32) == probabilities(trained, "x" * 99)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"bias": True, "tied": False}, {"kind": "llama", "kv_heads": 2}], ids=["gpt", "gpt2", "llama"])
@torch.no_grad()
def test_transformers_gives_the_same_probabilities(tmp_path: Path, fields: dict[str, Any]) -> None:
    from transformers import AutoModelForSequenceClassification

    trained = learnt(**fields)
    expected = [probabilities(trained, text) for text in TEXTS]
    check_kind(trained)
    write_folder(trained, tmp_path, {"format": "pt"})
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, local_files_only=True).eval()
    assert tuple(theirs.config.id2label.values()) == LABELS
    for text, found in zip(TEXTS, expected, strict=True):
        logits = theirs(torch.tensor([[*text.encode(), 256]])).logits[0]
        torch.testing.assert_close(torch.softmax(logits, 0), torch.tensor(found), atol=1e-5, rtol=1e-4)


def test_a_model_of_transformers_with_classes_is_no_model_of_transformers_any_more() -> None:
    trained = learnt()
    config = trained.config.model_copy(update={"model": trained.config.model.model_copy(update={"kind": "hf"})})
    with pytest.raises(ValueError, match=r"the output layer of classes does not belong to the config\.json"):
        check_kind(Trained(config=config, tokens=trained.tokens, model=trained.model, step=1))
