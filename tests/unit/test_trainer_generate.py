"""A committed checkpoint in one process: text and perplexity."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from trainer_ranks import TINY, commit, train_ranks, write_log
from typer.testing import CliRunner

from keepstep.orchestrator.cli import app
from keepstep.orchestrator.errors import InputError
from keepstep.storage.errors import DamagedCheckpoint
from keepstep.trainer.evaluate import evaluate_root
from keepstep.trainer.generate import generate
from keepstep.trainer.matching import CheckpointMismatch
from keepstep.trainer.sampling import Sampling

STEPS = 4


def text_of(root: str, prompt: str, *, temperature: float = 0.8, **options: Any) -> str:
    return "".join(news for (news,) in generate(root, [prompt], sampling=Sampling(temperature=temperature), **options))


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
    text = text_of(str(root), "Call me", max_tokens=20, seed=1)
    assert text.startswith("Call me")
    assert len(text.encode(errors="replace")) >= len(b"Call me")
    assert text == text_of(str(root), "Call me", max_tokens=20, seed=1)
    assert text != text_of(str(root), "Call me", max_tokens=20, seed=2)
    assert text != text_of(str(root), "Call me", max_tokens=20, seed=1, step=2)
    greedy = text_of(str(root), "Call me", max_tokens=20, temperature=0, seed=1)
    assert greedy == text_of(str(root), "Call me", max_tokens=20, temperature=0, seed=2)


@pytest.mark.slow
def test_a_prompt_may_be_empty_or_longer_than_the_context(root: Path) -> None:
    text_of(str(root), "", max_tokens=2)
    long = "x" * 100
    assert text_of(str(root), long, max_tokens=2).startswith(long)


@pytest.mark.slow
def test_a_step_that_is_not_committed_is_named(root: Path) -> None:
    with pytest.raises(ValueError, match=r"step 3 is not committed in .*; committed are 2, 4"):
        text_of(str(root), "x", step=3)


@pytest.mark.slow
def test_damage_is_noticed(root: Path) -> None:
    (shard,) = root.glob("data/a000001/s000000002-*/__1_0.distcp")
    sound = shard.read_bytes()
    shard.write_bytes(sound[:2000] + bytes([sound[2000] ^ 1]) + sound[2001:])
    try:
        with pytest.raises(DamagedCheckpoint, match=r"__1_0.distcp: block 0"):
            text_of(str(root), "x", step=2)
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
    texts = [text_of(str(deeper), "Call", max_tokens=3, partial=["model.blocks.2.*"]) for _ in range(2)]
    assert texts[0] == texts[1]
    wrong = CliRunner().invoke(app, ["generate", str(deeper), "--partial", "head"])
    assert isinstance(wrong.exception, InputError)
    assert "--partial head matches no tensor" in str(wrong.exception)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run: there is no run.toml in it"):
        text_of(str(tmp_path), "x")


def test_a_run_without_commits_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("")
    with pytest.raises(ValueError, match="holds no committed checkpoint yet"):
        evaluate_root(str(tmp_path))


def test_nothing_to_do_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens = 0 must be 1 or more"):
        text_of("nowhere", "x", max_tokens=0)


@pytest.mark.slow
def test_several_prompts_are_continued_as_each_alone(root: Path) -> None:
    prompts = ["Call", "", "Call me Ishmael"]
    batches = list(generate(str(root), prompts, max_tokens=12, seed=4))
    assert ["".join(parts) for parts in zip(*batches, strict=True)] == [
        text_of(str(root), prompt, max_tokens=12, seed=4) for prompt in prompts
    ]
    told = CliRunner().invoke(app, ["generate", str(root), *(word for prompt in prompts for word in ("--prompt", prompt)), "--tokens", "5"])
    assert told.stdout.count("Call") >= 2


@pytest.mark.slow
def test_a_model_of_pairs_completes_a_prompt_as_it_learnt_to(tmp_path: Path) -> None:
    """Behind the token that ends a prompt in training."""
    pairs = [{"prompt": prompt, "completion": completion} for prompt, completion in (("aa", "xyz"), ("bb", "zzy"))]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs * 20)))
    config: dict[str, Any] = TINY | {
        "run": {"root": str(tmp_path), "steps": 60},
        "data": {"source": str(tmp_path / "pairs.jsonl"), "tokenizer": "bytes"},
        "train": {"objective": "pairs", "batch_tokens": 128},
        "optimizer": {"lr": 1e-2, "warmup_steps": 5},
        "checkpoint": {"interval": 60},
    }
    train_ranks(tmp_path, config, world_size=1)
    write_toml(tmp_path / "run.toml", config)
    (folder,) = tmp_path.glob("data/a000001/s000000060-*")
    write_log(tmp_path, 1, [commit(tmp_path, str(folder.relative_to(tmp_path)))])
    assert [text_of(str(tmp_path), prompt, temperature=0) for prompt in ("aa", "bb")] == ["aaxyz", "bbzzy"]


@pytest.mark.slow
def test_prompts_are_completed_alike_by_ranks_that_share_a_model(tmp_path: Path) -> None:
    """A tensor-parallel group is one rank where prompts are dealt out."""
    pairs = [{"prompt": f"{i}", "completion": f"{i + 1}"} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    found = []
    for tensor_parallel in (1, 2):
        root = tmp_path / str(tensor_parallel)
        root.mkdir()
        config: dict[str, Any] = TINY | {
            "run": {"root": str(root), "steps": 10},
            "data": {"source": str(tmp_path / "pairs.jsonl"), "tokenizer": "bytes", "held_out": 0.4},
            "model": TINY["model"] | {"dropout": 0.0},
            "train": {"objective": "pairs", "batch_tokens": 128, "tensor_parallel": tensor_parallel},
            "optimizer": {"lr": 1e-2, "warmup_steps": 5},
            "evaluate": {"generate": 20},
        }
        train_ranks(root, config, world_size=2)
        (folder,) = root.glob("data/a000001/s000000010-*")
        result = json.loads((folder / "rank-00000.json").read_text())["state"]["result"]
        found.append((result["completed"], result["chrf"]))
    assert found[0] == (20, pytest.approx(found[1][1], abs=5))
    assert found[1][0] == 20
