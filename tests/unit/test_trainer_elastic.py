"""Real ranks on any data, in any number: the same samples, the same mean, the same checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trainer_ranks import TINY, commit, train_ranks

from keepstep.storage.store import Store
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.contract import Resume
from keepstep.trainer.ledger import prove

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of documents of many lengths, the shortest much shorter than a sample."""
    folder = tmp_path_factory.mktemp("text")
    for name in "ab":
        (folder / name).mkdir()
        for i in range(12):
            (folder / name / f"{i:02}.txt").write_text((f"{name}{i}: all work and no play makes Jack a dull boy. " * (1 + i))[: 3 + 5 * i])
    return folder


def config(root: Path, text: Path, *, batch_tokens: int = 64, steps: int = 6, **data: Any) -> dict[str, Any]:
    return TINY | {
        "run": {"root": str(root), "seed": 3, "steps": steps},
        "data": TINY["data"] | {"sources": [str(text / name) for name in "ab"], "weights": [2.0, 1.0]} | data,
        "model": TINY["model"] | {"dropout": 0.0},
        "train": {"batch_tokens": batch_tokens},
        "checkpoint": {"interval": 2},
    }


def records_in(root: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (root / "records.jsonl").read_text().splitlines())
    return list({record["step"]: record for record in records if "step" in record}.values())


def proved(root: Path, made: dict[str, Any], *skips: str) -> str:
    return prove(Store.open(root), TrainerConfig.model_validate(made), records_in(root), skips=skips).sentence


def resume_from(root: Path, step: int, attempt: int) -> Resume:
    (folder,) = root.glob(f"data/a{attempt:06d}/s{step:09d}-*")
    return commit(root, str(folder.relative_to(root)))


def reference(root: Path, made: dict[str, Any]) -> list[tuple[float, float, int]]:
    """(loss, norm of its gradient, targets) of each step, as anybody would write it: a mean over the targets that are no padding."""
    import torch
    import torch.nn.functional as F

    from keepstep.trainer.schedule import learning_rate

    config, model, feed, samples = opened(root, made)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(config.optimizer.beta1, config.optimizer.beta2), eps=config.optimizer.eps, weight_decay=0
    )
    curve = []
    for step in range(1, config.run.steps + 1):
        rows = torch.from_numpy(samples.ids(feed.samples(*feed.turns(step))))
        loss = F.cross_entropy(model(rows[:, :-1].clamp(min=0)).flatten(0, 1), rows[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(config.optimizer, step, config.run.steps)
        optimizer.step()
        curve.append((loss.item(), norm.item(), int((rows[:, 1:] != -100).sum())))
    return curve


def opened(root: Path, made: dict[str, Any]) -> tuple[TrainerConfig, Any, Any, Any]:
    """(config, whole model as it is initialised, feed, samples)."""
    from keepstep.trainer.data import feed_for
    from keepstep.trainer.models import build_model
    from keepstep.trainer.parallel import initialise
    from keepstep.trainer.samples import samples_of
    from keepstep.trainer.tokens import open_tokens

    config = TrainerConfig.model_validate(made)
    tokens = open_tokens(Store.open(root))
    samples = samples_of(tokens, config)
    model = build_model(config.model, tokens.index.vocabulary)
    model.to_empty(device="cpu")
    initialise(model, seed=config.run.seed)
    return config, model, feed_for(samples.sizes, config), samples


def test_padding_does_not_count_whoever_computes_it(text: Path, tmp_path: Path) -> None:
    """Two samples a step, of one to sixteen targets each, for one rank, and for three, of which one has no sample."""
    curves = {}
    for world_size in (1, 3):
        root = tmp_path / str(world_size)
        root.mkdir()
        made = config(root, text, batch_tokens=32, steps=6, pack="documents") | {"optimizer": {"warmup_steps": 1, "weight_decay": 0.0}}
        train_ranks(root, made, world_size=world_size)
        curves[world_size] = records_in(root)
        assert proved(root, made) == "ledger: 12 samples, each exactly once"
    expected = reference(tmp_path / "1", made)
    assert len({tokens for _, _, tokens in expected}) > 2, "steps weigh their tokens differently"
    for curve in curves.values():
        for record, (loss, norm, tokens) in zip(curve, expected, strict=True):
            assert record["tokens"] == tokens
            assert record["loss"] == pytest.approx(loss, rel=1e-5)
            assert record["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_a_history_of_several_world_sizes_orders_and_ways_to_read_is_proved_to_be_the_prefix(text: Path, tmp_path: Path) -> None:
    """4, 2, 3, 4 ranks, resumed from the commit before each end, with a step that is lost each time."""
    made = config(tmp_path, text, batch_tokens=80, steps=8, order="blocks", block_samples=3, streaming=True)
    resume = None
    for attempt, (world_size, stop_at) in enumerate(((4, 3), (2, 5), (3, 7), (4, 0)), start=1):
        train_ranks(tmp_path, made, world_size=world_size, attempt=attempt, resume=resume, stop_at=stop_at)
        resume = resume_from(tmp_path, 2 * attempt, attempt)
    assert [len(record["ledger"]) for record in records_in(tmp_path)] == [4, 4, 2, 2, 3, 3, 4, 4]
    assert proved(tmp_path, made) == "ledger: 40 samples, each exactly once"


def test_a_run_that_skips_later_is_one_that_skipped_from_the_start(text: Path, tmp_path: Path) -> None:
    """Skips behind the commit may come; those before it are the history, and may not change."""
    first, second = (tmp_path / name for name in "ab")
    for root in (first, second):
        root.mkdir()
    late = config(first, text)
    train_ranks(first, late, world_size=2, stop_at=4)
    train_ranks(first, late, world_size=2, attempt=2, resume=resume_from(first, 4, 1), skips=("17:19",))
    early = config(second, text, skip=["17:19"])
    train_ranks(second, early, world_size=2)
    assert [record["loss_hex"] for record in records_in(first)] == [record["loss_hex"] for record in records_in(second)]
    assert records_in(first)[-1]["samples"] == [22, 26]
    assert proved(first, late, "17:19") == proved(second, early) == "ledger: 24 samples, each exactly once"
    resume = resume_from(first, 6, 2)
    with pytest.raises(
        AssertionError, match=r"skips differs: up to its position 26 it had left out 17:19, and this run leaves out nothing"
    ):
        train_ranks(first, config(first, text, steps=8), world_size=2, attempt=3, resume=resume)


def test_another_order_does_not_continue_a_history(text: Path, tmp_path: Path) -> None:
    train_ranks(tmp_path, config(tmp_path, text), world_size=1, stop_at=2)
    resume = resume_from(tmp_path, 2, 1)
    with pytest.raises(
        AssertionError, match=r"order differs: kind was shuffled and is sequential now, quotas was \[2, 1\] and is \[1, 1\] now"
    ):
        train_ranks(tmp_path, config(tmp_path, text, order="sequential", weights=[1.0, 1.0]), world_size=1, attempt=2, resume=resume)
