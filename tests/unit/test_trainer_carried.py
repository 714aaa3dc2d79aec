"""Truncated back-propagation through time: what a recurrent model carries from step to step is part of the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trainer_ranks import TINY, commit, manifest_of, train_ranks

from keepstep.storage.store import Store
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.contract import Resume
from keepstep.trainer.data import Feed, feed_for
from keepstep.trainer.ledger import prove
from keepstep.trainer.order import Order

STEPS = 10


class TestTheOrder:
    @given(streams=st.integers(1, 7), length=st.integers(1, 9), epoch=st.integers(0, 3))
    def test_each_row_goes_on_where_it_ended_and_an_epoch_has_every_sample_once(self, streams: int, length: int, epoch: int) -> None:
        size = streams * length
        feed = Feed(order=Order(seed=0, sizes=(size,), kind="streams", streams=streams), samples_per_step=streams)
        steps = range(epoch * length + 1, (epoch + 1) * length + 1)
        rows = np.array([feed.samples(*feed.turns(step)) for step in steps], dtype=np.int64)
        assert sorted(rows.ravel().tolist()) == list(range(size))
        assert (np.diff(rows, axis=0) == 1).all()
        assert [bool(feed.goes_on(*feed.turns(step)).all()) for step in steps] == [False] + [True] * (length - 1)
        assert [feed.order.positions_of(int(rows[0, 0]), epoch * size, (epoch + 1) * size).tolist()] == [[epoch * size]]

    def test_behind_a_skip_every_row_begins_anew_once(self) -> None:
        feed = Feed(order=Order(seed=0, sizes=(40,), kind="streams", streams=4), samples_per_step=4, skips=((13, 14),))
        goes_on = [feed.goes_on(*feed.turns(step)).tolist() for step in range(1, 8)]
        assert goes_on[:3] == [[False] * 4, [True] * 4, [True] * 4]
        assert goes_on[3] == [True, False, False, False]
        assert goes_on[4] == [False, True, True, True]
        assert goes_on[5:] == [[True] * 4] * 2

    @given(rows=st.integers(1, 20), world_size=st.integers(1, 8))
    def test_shares_are_cut_as_rows_of_a_sharded_tensor(self, rows: int, world_size: int) -> None:
        import torch

        feed = Feed(order=Order(seed=0, sizes=(rows,), kind="streams", streams=rows), samples_per_step=rows)
        sizes = [last - first for first, last in (feed.share(1, rank, world_size) for rank in range(world_size))]
        assert [size for size in sizes if size] == [len(chunk) for chunk in torch.arange(rows).chunk(world_size)]

    def test_fewer_samples_than_rows_are_refused(self) -> None:
        config = TrainerConfig.model_validate({"data": {"order": "streams"}, "model": {"context": 16}, "train": {"batch_tokens": 128}})
        with pytest.raises(ValueError, match=r"needs a sample for each of the 8 rows of a batch .* gave 7"):
            feed_for([7], config)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        (folder / f"{i:02}.txt").write_text(f"{i}: all work and no play makes Jack a dull boy. " * (2 + i))
    return folder


def made(root: Path, text: Path, kind: str, **train: Any) -> dict[str, Any]:
    root.mkdir(exist_ok=True)
    return TINY | {
        "run": {"root": str(root), "seed": 3, "steps": STEPS},
        "data": {"tokenizer": "bytes", "source": str(text), "order": "streams"},
        "model": {"kind": kind, "layers": 2, "width": 16, "context": 16, "dropout": 0.0},
        "train": {"batch_tokens": 80} | train,
        "optimizer": {"warmup_steps": 1, "weight_decay": 0.0},
        "checkpoint": {"interval": 4},
    }


def losses(root: Path) -> list[float]:
    records = map(json.loads, (root / "records.jsonl").read_text().splitlines())
    return [record["loss"] for record in {record["step"]: record for record in records if "step" in record}.values()]


def by_hand(config: dict[str, Any]) -> list[float]:
    """The same training by a loop over the tokens, in one process."""
    import torch
    import torch.nn.functional as F

    from keepstep.trainer.models import Memory, build_model
    from keepstep.trainer.parallel import initialise
    from keepstep.trainer.samples import samples_of
    from keepstep.trainer.schedule import learning_rate
    from keepstep.trainer.tokens import open_tokens

    settings = TrainerConfig.model_validate(config)
    tokens = open_tokens(Store.open(settings.run.root))
    model = build_model(settings.model, tokens.index.vocabulary)
    initialise(model, seed=settings.run.seed)
    rows, context = settings.train.batch_tokens // settings.model.context, settings.model.context
    per_stream = sum(samples_of(tokens, settings).sizes) // rows
    ids = torch.from_numpy(np.asarray(tokens.train[np.arange(len(tokens.train))]).astype(np.int64))
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(settings.optimizer.beta1, settings.optimizer.beta2), eps=settings.optimizer.eps, weight_decay=0
    )
    curve, memory = list[float](), Memory()
    for step in range(1, settings.run.steps + 1):
        if (step - 1) % per_stream == 0:
            memory = Memory()
        starts = [(row * per_stream + (step - 1) % per_stream) * context for row in range(rows)]
        window = torch.stack([ids[start : start + context + 1] for start in starts])
        loss = F.cross_entropy(model(window[:, :-1], memory).flatten(0, 1), window[:, 1:].flatten())
        memory.detach()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.clip_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(settings.optimizer, step, settings.run.steps)
        optimizer.step()
        curve.append(loss.item())
    return curve


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_any_number_of_ranks_computes_what_a_loop_over_the_text_does(kind: str, text: Path, tmp_path: Path) -> None:
    """Five rows: on two ranks three and two, on four two, two, one and none."""
    for world_size in (1, 2, 4):
        config = made(tmp_path / str(world_size), text, kind)
        train_ranks(tmp_path / str(world_size), config, world_size=world_size)
        assert losses(tmp_path / str(world_size)) == pytest.approx(by_hand(config), rel=1e-4)
        assert (
            prove(
                Store.open(tmp_path / str(world_size)),
                TrainerConfig.model_validate(config),
                [
                    json.loads(line)
                    for line in (tmp_path / str(world_size) / "records.jsonl").read_text().splitlines()
                    if '"ledger"' in line
                ],
            ).sentence
            == f"ledger: {5 * STEPS} samples, each exactly once"
        )


def resume_from(root: Path, step: int) -> Resume:
    (folder,) = root.glob(f"data/a000001/s{step:09d}-*")
    return commit(root, str(folder.relative_to(root)))


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_samples", [0, 2])
def test_a_restart_goes_on_with_the_state_it_had(text: Path, tmp_path: Path, micro_batch_samples: int) -> None:
    """To the bit on as many ranks, within rounding on another number, and not without the state."""
    root = tmp_path / "root"
    config = made(root, text, "lstm", micro_batch_samples=micro_batch_samples)
    train_ranks(root, config, world_size=2)
    straight = losses(root)
    from_4 = resume_from(root, 4)
    names = {entry.name for rank in manifest_of(root, from_4).ranks for entry in rank.tensors}
    assert {name for name in names if name.startswith("carried.")} == {f"carried.{layer}.{which}" for layer in (0, 1) for which in (0, 1)}
    for attempt, world_size in ((2, 2), (3, 3), (4, 1)):
        (root / "records.jsonl").unlink()
        train_ranks(root, config, world_size=world_size, attempt=attempt, resume=from_4)
        again = losses(root)
        assert again == (straight[4:] if world_size == 2 else pytest.approx(straight[4:], rel=1e-4))
    (root / "records.jsonl").unlink()
    train_ranks(root, config, world_size=2, attempt=5, resume=from_4, mutant="carried")
    assert losses(root)[0] != pytest.approx(straight[4], rel=1e-4)
