"""Every family of models under real ranks: sharded as unsharded, stopped and resumed as undisturbed, its course pinned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from trainer_ranks import TINY, commit, train_ranks

from keepstep.trainer.contract import Resume

pytestmark = pytest.mark.slow

STEPS = 6
KINDS: Mapping[str, dict[str, dict[str, Any]]] = {
    "gpt": {"model": {"kind": "gpt"}},
    "llama": {"model": {"kind": "llama", "kv_heads": 1, "tied": False}},
    "bert": {"model": {"kind": "bert"}, "train": {"objective": "masked"}},
    "rnn": {"model": {"kind": "rnn"}},
    "lstm": {"model": {"kind": "lstm"}, "data": {"order": "streams"}},
    "gru": {"model": {"kind": "gru", "tied": False}},
}
# Losses of steps 1 and 6 without dropout on one rank, as first computed, to what rounding may change elsewhere.
COURSE: Mapping[str, tuple[float, float]] = {
    "gpt": (5.54749, 5.04259),
    "llama": (5.55631, 5.11661),
    "bert": (5.55027, 5.12639),
    "rnn": (5.54612, 5.46107),
    "lstm": (5.54905, 5.47848),
    "gru": (5.54689, 5.51511),
}


@dataclass(frozen=True)
class Trained:
    root: Path
    config: dict[str, Any]

    def losses(self) -> dict[int, str]:
        records = map(json.loads, (self.root / "records.jsonl").read_text().splitlines())
        return {record["step"]: record["loss_hex"] for record in records if "step" in record}

    def result(self, attempt: int) -> dict[str, Any]:
        (folder,) = self.root.glob(f"data/a{attempt:06d}/s{STEPS:09d}-*")
        result: dict[str, Any] = json.loads((folder / "rank-00000.json").read_text())["state"]["result"]
        return result

    def resume_from(self, step: int) -> Resume:
        (folder,) = self.root.glob(f"data/a000001/s{step:09d}-*")
        return commit(self.root, str(folder.relative_to(self.root)))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(8):
        (folder / f"{i}.txt").write_text(f"Chapter {i}. " + "It was a bright cold day in April, and the clocks were striking. " * 30)
    return folder


def trained(kind: str, text: Path, root: Path, *, world_size: int, dropout: float) -> Trained:
    root.mkdir()
    own = KINDS[kind]
    config = TINY | {
        "run": {"root": str(root), "seed": 3, "steps": STEPS},
        "data": TINY["data"] | {"source": str(text)} | own.get("data", {}),
        "model": TINY["model"] | {"dropout": dropout} | own["model"],
        "train": TINY["train"] | own.get("train", {}),
        "checkpoint": {"interval": 2},
    }
    train_ranks(root, config, world_size=world_size)
    return Trained(root, config)


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_is_unsharded_within_rounding_and_the_course_is_known(kind: str, text: Path, tmp_path: Path) -> None:
    alone = trained(kind, text, tmp_path / "alone", world_size=1, dropout=0.0)
    sharded = trained(kind, text, tmp_path / "sharded", world_size=3, dropout=0.0)
    losses, others = ([float.fromhex(loss) for loss in run.losses().values()] for run in (alone, sharded))
    assert others == pytest.approx(losses, rel=2e-5)
    assert (losses[0], losses[-1]) == pytest.approx(COURSE[kind], abs=2e-4)
    assert sharded.result(1)["perplexity"] == pytest.approx(alone.result(1)["perplexity"], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_undisturbed_to_the_bit(kind: str, text: Path, tmp_path: Path) -> None:
    run = trained(kind, text, tmp_path / "root", world_size=2, dropout=0.1)
    losses, result = run.losses(), run.result(1)
    (run.root / "records.jsonl").unlink()
    train_ranks(run.root, run.config, world_size=2, attempt=2, resume=run.resume_from(2))
    assert run.losses() == {step: loss for step, loss in losses.items() if step > 2}
    assert run.result(2) == result
