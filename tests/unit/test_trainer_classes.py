"""Classes, learnt upon a base that learnt the next token: with real ranks, told by the command line, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer_foreign import GPT2, sections, text, toml, trained
from trainer_ranks import commit, train_ranks, write_log
from typer.testing import CliRunner

from keepstep.orchestrator.cli import app
from keepstep.orchestrator.errors import InputError
from keepstep.trainer.classify import classify
from keepstep.trainer.export import export

pytestmark = pytest.mark.slow

STEPS = 50
WORDS = {"bad": ("dull", "awful", "poor", "lame"), "good": ("fine", "lovely", "superb", "grand")}


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reviews") / "reviews.jsonl"
    lines = [{"text": f"{number} {word}", "label": label} for number in range(20) for label, words in WORDS.items() for word in words]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return trained(folder / "root", sections(folder / "root", text(folder / "text"), model=GPT2), world_size=1)


@pytest.mark.parametrize("rank", [0, 4])
def test_classes_are_learnt_upon_a_base_with_and_without_adaptation(base: Path, reviews: Path, tmp_path: Path, rank: int) -> None:
    from transformers import AutoModelForSequenceClassification

    root = learnt(tmp_path / "root", base, reviews, lora={"rank": rank, "alpha": 32.0})
    found = classify(str(root), ["3 lovely", "12 awful"])
    assert found[0]["good"] > 0.9
    assert found[1]["bad"] > 0.9
    told = CliRunner().invoke(app, ["classify", str(root), "--text", "3 lovely"])
    assert told.stdout == f"good {found[0]['good']:.4f}\n"
    refused = CliRunner().invoke(app, ["generate", str(root)])
    assert isinstance(refused.exception, InputError)
    assert "use `keepstep classify`" in str(refused.exception)
    export(str(root), tmp_path / "out", form="hf")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    logits = theirs(torch.tensor([[*b"3 lovely", 256]])).logits[0].detach()
    torch.testing.assert_close(torch.softmax(logits, 0), torch.tensor(list(found[0].values())), atol=1e-4, rtol=1e-3)


def learnt(root: Path, base: Path, reviews: Path, **train: Any) -> Path:
    """By two ranks."""
    tuned = {"objective": "classes", "start": str(base), "start_without": ["head.weight"], "batch_tokens": 512, **train}
    changed = {"model": {**GPT2, "dropout": 0.0}, "run": {"steps": STEPS}, "checkpoint": {"interval": STEPS}, "optimizer": {"lr": 0.005}}
    config = sections(root, reviews, train=tuned, **changed)
    root.mkdir()
    (root / "run.toml").write_text(toml(config))
    train_ranks(root, config, world_size=2)
    (folder,) = root.glob(f"data/a000001/s{STEPS:09d}-*")
    write_log(root, 2, [commit(root, str(folder.relative_to(root)))])
    return root
