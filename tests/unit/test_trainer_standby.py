"""A rank of a hot standby builds, makes a throw-away step, waits, and then trains on with the bits of a rank that never waited."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trainer_ranks import TINY, FolderStaging, commit, run_ranks, spec_of, train_ranks

from keepstep.trainer import attach as door
from keepstep.trainer.attach import Attached
from keepstep.trainer.contract import MARKS, STANDS_BY_OFFSET, Resume, read_marks

RANKS = 2
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"train": {"precision": "bf16", "reshard": False, "micro_batch_samples": 1}},
    "fp16": {"train": {"precision": "fp16"}, "trace": {"interval": 1}},
    "exact": {"cluster": {"exact_reduction": True, "logical_ranks": 4}},
    "replicas": {"train": {"sharding": "none", "activation_checkpointing": True}},
    "tensor": {"train": {"tensor_parallel": 2}},
    "compiled": {"train": {"compile": True}, "model": {"layers": 1}},
}


def config_of(root: Path, text: Path, way: str) -> dict[str, Any]:
    own = {"run": {"root": str(root), "seed": 3, "steps": 4}, "data": {"source": str(text)}, "checkpoint": {"interval": 2}}
    sections = TINY | own | WAYS[way]
    return {name: {**TINY.get(name, {}), **own.get(name, {}), **WAYS[way].get(name, {})} for name in sections}


def train_standby(rank: int, world_size: int, root: str, config: dict[str, Any], attempt: int, resume: Resume | None) -> None:
    """As a rank process of keepstep does: attached without an attempt, which comes with the order."""
    from keepstep.trainer.config import TrainerConfig
    from keepstep.trainer.loop import train
    from keepstep.trainer.parallel import join
    from keepstep.trainer.run import open_run

    folder = Path(root)
    asked: list[int] = []

    def order() -> str:
        asked.append(1)
        return spec_of(folder, rank, attempt, resume).to_json()

    door.be_standby(order)
    me = Attached(replace(spec_of(folder, rank, 100 + attempt, None), attempt=0))
    me.__dict__["staging"] = FolderStaging(folder, attempt=attempt, rank=rank, world_size=world_size)
    parsed = TrainerConfig.model_validate(config)
    run = open_run(parsed, me, join(me, train=parsed.train))
    assert asked == [1]
    assert me.spec
    assert (me.spec.attempt, me.resume) == (attempt, resume)
    train(run)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"Chapter {i}. " + "It was a bright cold day in April, and the clocks were striking. " * 20)
    return folder


def outcome(root: Path, attempt: int) -> tuple[Any, dict[int, dict[str, Any]]]:
    """(result, step records without times) of an attempt; the result holds digests of the whole state, streams included."""
    (folder,) = root.glob(f"data/a{attempt:06d}/s000000004-*")
    result = json.loads((folder / "rank-00000.json").read_text())["state"]["result"]
    lines = [json.loads(line) for line in (root / "records.jsonl").read_text().splitlines()]
    timed = {"seconds", "tokens_per_s", "trained_s"}
    return result, {line["step"]: {key: value for key, value in line.items() if key not in timed} for line in lines if "step" in line}


def checkpoint_2(root: Path) -> Resume:
    (folder,) = root.glob("data/a000001/s000000002-*")
    return commit(root, str(folder.relative_to(root)))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_throw_away_step_leaves_no_trace(way: str, text: Path, tmp_path: Path) -> None:
    """From scratch, and from a checkpoint: every digest, loss and figure of the layers is that of ranks that never waited."""
    straight, hot = tmp_path / "straight", tmp_path / "hot"
    for root in (straight, hot):
        root.mkdir()
    train_ranks(straight, config_of(straight, text, way), world_size=RANKS)
    expected = outcome(straight, 1)
    train_ranks(hot, config_of(hot, text, way), world_size=RANKS, stop_at=1)  # nothing is committed: tokens are there, that is all
    (hot / "records.jsonl").unlink()
    run_ranks(RANKS, train_standby, str(hot), config_of(hot, text, way), 2, None)
    assert outcome(hot, 2) == expected
    (straight / "records.jsonl").unlink()
    run_ranks(RANKS, train_standby, str(straight), config_of(straight, text, way), 2, checkpoint_2(straight))
    result, records = outcome(straight, 2)
    assert result == expected[0]
    assert records == {step: record for step, record in expected[1].items() if step > 2}


def test_standby_returns_at_once_where_nobody_waits(tmp_path: Path) -> None:
    me = Attached(spec_of(tmp_path, 0, 1, None))
    page = tmp_path / "scratch/progress-1-0"
    assert not me.waits
    assert page.read_bytes()[STANDS_BY_OFFSET] == 0
    me.standby()
    assert page.read_bytes()[STANDS_BY_OFFSET] == 1
    Attached(None).standby()  # under plain torchrun, too


def test_what_a_standby_has_reached_counts_for_its_attempt(tmp_path: Path) -> None:
    resume = Resume(step=7, directory="data/a000001/s000000007-x", manifest_sha256="0")
    ordered = spec_of(tmp_path, 0, 2, resume)
    door.be_standby(ordered.to_json)
    me = Attached(replace(spec_of(tmp_path, 0, 100, None), attempt=0))
    assert me.waits
    assert me.resume is None
    for name in ("forked", "joined", "built"):
        me.mark(name)
    me.standby()
    assert not me.waits
    assert (me.spec, me.resume) == (ordered, resume)
    old, new = ((tmp_path / f"scratch/progress-{attempt}-0").read_bytes() for attempt in (100, 2))
    built = MARKS.index("built") + 1
    assert read_marks(new)[:built] == read_marks(old)[:built]
    assert not any(read_marks(new)[built:])
