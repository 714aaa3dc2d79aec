"""A committed checkpoint in one process: text and perplexity."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_ranks import TINY, commit, train_ranks, write_log
from typer.testing import CliRunner

from keepstep.orchestrator.cli import app
from keepstep.orchestrator.errors import InputError
from keepstep.storage.errors import DamagedCheckpoint
from keepstep.trainer.evaluate import evaluate_root
from keepstep.trainer.generate import choose, generate
from keepstep.trainer.matching import CheckpointMismatch

STEPS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with commits at steps 2 and 4."""
    made = tmp_path_factory.mktemp("run")
    (made / "text").mkdir()
    for i in range(4):
        (made / f"text/{i}.txt").write_text("Call me Ishmael. Some years ago - never mind how long precisely - having little money. " * 9)
    config: dict[str, Any] = TINY | {
        "run": {"root": str(made), "steps": STEPS},
        "data": {"source": str(made / "text"), "tokenizer": "bytes"},
        "checkpoint": {"interval": 2},
        "evaluate": {"max_tokens": 10**6},
    }
    train_ranks(made, config, world_size=2)
    write_toml(made / "run.toml", config)
    folders = [next(made.glob(f"data/a000001/s{step:09d}-*")) for step in (2, 4)]
    write_log(made, 2, [commit(made, str(folder.relative_to(made))) for folder in folders])
    return made


def write_toml(path: Path, config: dict[str, dict[str, Any]]) -> None:
    lines = [
        f"[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()) for section, keys in config.items()
    ]
    path.write_text("\n".join(lines))


@pytest.mark.slow
def test_evaluation_in_one_process_gives_the_perplexity_of_the_ranks(root: Path) -> None:
    (folder,) = root.glob("data/a000001/s000000004-*")
    result = json.loads((folder / "rank-00000.json").read_text())["state"]["result"]
    alone = evaluate_root(str(root))
    assert alone["step"] == STEPS
    assert alone["perplexity"] == pytest.approx(result["perplexity"], rel=1e-5)
    assert (alone["tokens"], alone["unigram_nats"]) == (result["held_out_tokens"], result["unigram_nats"])


@pytest.mark.slow
def test_text_is_a_function_of_checkpoint_prompt_and_seed(root: Path) -> None:
    text = generate(str(root), "Call me", max_tokens=20, seed=1)
    assert text.startswith("Call me")
    assert len(text.encode(errors="replace")) >= len(b"Call me")
    assert text == generate(str(root), "Call me", max_tokens=20, seed=1)
    assert text != generate(str(root), "Call me", max_tokens=20, seed=2)
    assert text != generate(str(root), "Call me", max_tokens=20, seed=1, step=2)
    greedy = generate(str(root), "Call me", max_tokens=20, temperature=0, seed=1)
    assert greedy == generate(str(root), "Call me", max_tokens=20, temperature=0, seed=2)


@pytest.mark.slow
def test_a_prompt_may_be_empty_or_longer_than_the_context(root: Path) -> None:
    generate(str(root), "", max_tokens=2)
    long = "x" * 100
    assert generate(str(root), long, max_tokens=2).startswith(long)


@pytest.mark.slow
def test_a_step_that_is_not_committed_is_named(root: Path) -> None:
    with pytest.raises(ValueError, match=r"step 3 is not committed in .*; committed are 2, 4"):
        generate(str(root), "x", step=3)


@pytest.mark.slow
def test_damage_is_noticed(root: Path) -> None:
    (shard,) = root.glob("data/a000001/s000000002-*/__1_0.distcp")
    sound = shard.read_bytes()
    shard.write_bytes(sound[:2000] + bytes([sound[2000] ^ 1]) + sound[2001:])
    try:
        with pytest.raises(DamagedCheckpoint, match=r"__1_0.distcp: block 0"):
            generate(str(root), "x", step=2)
    finally:
        shard.write_bytes(sound)


@pytest.mark.slow
def test_a_model_with_another_layer_is_refused_unless_the_layer_is_named(root: Path, tmp_path: Path) -> None:
    deeper = tmp_path / "deeper"
    shutil.copytree(root, deeper)
    (deeper / "run.toml").write_text((root / "run.toml").read_text().replace("layers = 2", "layers = 3"))
    with pytest.raises(CheckpointMismatch, match=r"6 missing in it: model.blocks.2.attention.out.weight, "):
        evaluate_root(str(deeper))
    loaded = evaluate_root(str(deeper), partial=["model.blocks.2.*"])
    assert len(loaded["skipped"]) == 6
    assert loaded["perplexity"] > 1
    told = CliRunner().invoke(app, ["evaluate", str(deeper), "--json", "--partial", "model.blocks.2.*"])
    assert json.loads(told.stdout) == loaded  # what is not loaded has the run's initial values, not chance
    texts = [generate(str(deeper), "Call", max_tokens=3, partial=["model.blocks.2.*"]) for _ in range(2)]
    assert texts[0] == texts[1]
    wrong = CliRunner().invoke(app, ["generate", str(deeper), "--partial", "head"])
    assert isinstance(wrong.exception, InputError)
    assert "--partial head matches no tensor" in str(wrong.exception)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run: there is no run.toml in it"):
        generate(str(tmp_path), "x")


def test_a_run_without_commits_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("")
    with pytest.raises(ValueError, match="holds no committed checkpoint yet"):
        evaluate_root(str(tmp_path))


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"max_tokens": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be 0 or more"):
        generate("nowhere", "x", **wrong)


def test_sampling_follows_the_probabilities_among_the_top_k() -> None:
    logits = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    generator = torch.Generator().manual_seed(0)
    drawn = [choose(logits, temperature=1.0, top_k=2, generator=generator) for _ in range(500)]
    assert set(drawn) == {2, 3}
    assert drawn.count(3) / 500 == pytest.approx(4 / 7, abs=0.07)
    assert choose(logits, temperature=0, top_k=0, generator=generator) == 3
    assert {choose(logits, temperature=1.0, top_k=0, generator=generator) for _ in range(200)} == {0, 1, 2, 3}
