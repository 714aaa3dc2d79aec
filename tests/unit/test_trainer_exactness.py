"""Real ranks: stop anywhere, resume in new processes, end with the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from trainer_ranks import TINY, commit, manifest_of, run_ranks, train_ranks

from keepstep.storage.store import Store
from keepstep.storage.verify import CheckpointReader
from keepstep.trainer.contract import Resume

pytestmark = pytest.mark.slow
STEPS = 6
WORLD = 2


@dataclass(frozen=True)
class Straight:
    """An undisturbed run with checkpoints at every second step."""

    root: Path
    config: dict[str, Any]
    losses: dict[int, str]
    result: dict[str, Any]

    def resume_from(self, step: int) -> Resume:
        (folder,) = self.root.glob(f"data/a000001/s{step:09d}-*")
        return commit(self.root, str(folder.relative_to(self.root)))


def losses_in(root: Path) -> dict[int, str]:
    records = map(json.loads, (root / "records.jsonl").read_text().splitlines())
    return {record["step"]: record["loss_hex"] for record in records if "step" in record}


def result_of(root: Path, attempt: int, step: int) -> dict[str, Any]:
    (folder,) = root.glob(f"data/a{attempt:06d}/s{step:09d}-*")
    result: dict[str, Any] = json.loads((folder / "rank-00000.json").read_text())["state"]["result"]
    return result


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    text = tmp_path_factory.mktemp("text")
    for i in range(8):
        (text / f"{i}.txt").write_text(f"Chapter {i}. " + "It was a bright cold day in April, and the clocks were striking. " * 30)
    return TINY | {"data": TINY["data"] | {"source": str(text)}, "checkpoint": {"interval": 2}, "run": {"seed": 3, "steps": STEPS}}


def rooted(config: dict[str, Any], root: Path, **run: Any) -> dict[str, Any]:
    return config | {"run": config["run"] | {"root": str(root)} | run}


@pytest.fixture(scope="module")
def straight(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Straight:
    root = tmp_path_factory.mktemp("straight")
    mine = rooted(config, root)
    train_ranks(root, mine, world_size=WORLD)
    return Straight(root, mine, losses_in(root), result_of(root, 1, STEPS))


def resumed(straight: Straight, attempt: int, **options: Any) -> tuple[dict[int, str], dict[str, Any]]:
    """Losses and result of an attempt that begins with the checkpoint of step 2."""
    (straight.root / "records.jsonl").unlink()
    train_ranks(straight.root, straight.config, attempt=attempt, resume=straight.resume_from(2), **({"world_size": WORLD} | options))
    return losses_in(straight.root), result_of(straight.root, attempt, STEPS)


def test_a_resumed_run_has_the_losses_and_the_state_of_an_undisturbed_one(straight: Straight) -> None:
    losses, result = resumed(straight, 2)
    assert losses == {step: loss for step, loss in straight.losses.items() if step > 2}
    assert result == straight.result


def test_a_node_with_more_cores_computes_with_as_many_threads_as_the_run_began_with(straight: Straight) -> None:
    losses, result = resumed(straight, 7, mutant="cores")
    assert losses == {step: loss for step, loss in straight.losses.items() if step > 2}
    assert result == straight.result
    (folder,) = straight.root.glob(f"data/a000007/s{STEPS:09d}-*")
    assert json.loads((folder / "rank-00000.json").read_text())["state"]["parts"]["threads"] == 1


def with_workers(config: dict[str, Any], workers: int) -> dict[str, Any]:
    return config | {"train": config["train"] | {"loader_workers": workers}}


def test_the_same_run_again_has_the_same_bits_whoever_reads_its_batches(straight: Straight, tmp_path: Path) -> None:
    train_ranks(tmp_path, with_workers(rooted(straight.config, tmp_path), 1), world_size=WORLD)
    assert losses_in(tmp_path) == straight.losses
    assert result_of(tmp_path, 1, STEPS) == straight.result


@pytest.mark.parametrize("mutant", ["rng", "optimizer"])
def test_forgetting_a_part_of_the_state_shows(straight: Straight, mutant: str) -> None:
    losses, result = resumed(straight, 3 + len(mutant), mutant=mutant)
    assert losses[STEPS] != straight.losses[STEPS]
    assert result["state_sha256"] != straight.result["state_sha256"]


def test_another_world_size_loads_the_same_state_and_consumes_the_same_samples(straight: Straight, tmp_path: Path) -> None:
    no_dropout = straight.config | {"model": TINY["model"] | {"dropout": 0.0}}
    train_ranks(tmp_path, rooted(no_dropout, tmp_path), world_size=WORLD)
    two = losses_in(tmp_path)
    for attempt, world_size in ((2, 1), (3, 3)):
        (folder,) = tmp_path.glob("data/a000001/s000000002-*")
        train_ranks(
            tmp_path,
            rooted(no_dropout, tmp_path),
            world_size=world_size,
            attempt=attempt,
            resume=commit(tmp_path, str(folder.relative_to(tmp_path))),
        )
        for step in range(3, STEPS + 1):
            assert float.fromhex(losses_in(tmp_path)[step]) == pytest.approx(float.fromhex(two[step]), rel=1e-5)


@pytest.mark.parametrize(
    ("train", "world_size"),
    [
        ({"micro_batch_samples": 3}, 2),
        ({"reshard": True}, 2),
        ({"batch_tokens": 32}, 3),
        ({"precision": "bf16"}, 2),
        ({"precision": "fp16"}, 2),
    ],
    ids=["micro-batches", "reshard", "a rank without samples", "bf16", "fp16"],
)
def test_the_losses_do_not_depend_on_how_a_batch_is_cut(
    config: dict[str, Any], tmp_path: Path, train: dict[str, Any], world_size: int
) -> None:
    plain, cut = tmp_path / "plain", tmp_path / "cut"
    no_dropout = config | {"model": TINY["model"] | {"dropout": 0.0}}
    for root, size, more in ((plain, 1, {key: value for key, value in train.items() if key == "batch_tokens"}), (cut, world_size, train)):
        root.mkdir()
        train_ranks(root, rooted(no_dropout | {"train": TINY["train"] | more}, root), world_size=size)
    near = {"bf16": 2e-2, "fp16": 1e-3}.get(train.get("precision", ""), 1e-5)
    expected = {step: pytest.approx(float.fromhex(loss), rel=near) for step, loss in losses_in(plain).items()}
    assert {step: float.fromhex(loss) for step, loss in losses_in(cut).items()} == expected


def looks_late(rank: int, world_size: int, root: str, config: dict[str, Any]) -> None:
    """Rank 1 looks for tokens after rank 0 has made them."""
    import trainer_ranks

    from keepstep.trainer import run

    if rank == 1:
        run.read_index = lambda store: "found"
    trainer_ranks._train(rank, world_size, root, config, 1, None, 0, "")


def test_a_rank_that_looks_late_for_tokens_still_meets_the_others(config: dict[str, Any], tmp_path: Path) -> None:
    run_ranks(2, looks_late, str(tmp_path), rooted(config, tmp_path))
    assert sorted(losses_in(tmp_path)) == list(range(1, STEPS + 1))


def test_a_stop_saves_at_its_step_and_the_rest_follows_later_also_with_workers(straight: Straight, tmp_path: Path) -> None:
    mine = with_workers(rooted(straight.config, tmp_path), 2)
    train_ranks(tmp_path, mine, world_size=WORLD, stop_at=3)
    assert sorted(losses_in(tmp_path)) == [1, 2, 3]
    assert result_of(tmp_path, 1, 3) is None, "a node that must leave has no time for digests"
    (folder,) = tmp_path.glob("data/a000001/s000000003-*")
    train_ranks(tmp_path, mine, world_size=WORLD, attempt=2, resume=commit(tmp_path, str(folder.relative_to(tmp_path))))
    assert losses_in(tmp_path) == straight.losses
    assert result_of(tmp_path, 2, STEPS) == straight.result


def test_a_finished_run_saves_nothing_again(straight: Straight) -> None:
    train_ranks(straight.root, straight.config, world_size=WORLD, attempt=9, resume=straight.resume_from(STEPS))
    assert not list(straight.root.glob("data/a000009/*"))


STOCK_LOAD = """
import json, sys
import torch
import torch.distributed.checkpoint as dcp

shapes = json.loads(sys.argv[2])
state = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
dcp.load(state, checkpoint_id=sys.argv[1])
print(json.dumps({name: float(tensor.double().sum()) for name, tensor in state.items()}))
assert not any(name.startswith("keepstep") for name in sys.modules)
"""


def test_stock_torch_loads_a_checkpoint(straight: Straight) -> None:
    resume = straight.resume_from(4)
    manifest = manifest_of(straight.root, resume)
    shapes = {entry.name: entry.global_shape for rank in manifest.ranks for entry in rank.tensors}
    command = [sys.executable, "-W", "ignore", "-c", STOCK_LOAD, str(straight.root / resume.directory), json.dumps(shapes)]
    loaded = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)
    assert loaded == pytest.approx(sums(straight.root, resume))
    assert loaded["optimizer.norm.weight.step"] == 4.0


def sums(root: Path, resume: Resume) -> dict[str, float]:
    """The sum of each tensor, from the manifest's byte ranges."""
    import torch

    manifest = manifest_of(root, resume)
    reader = CheckpointReader(Store.open(root), resume.directory, manifest)
    found: dict[str, float] = {}
    for rank in manifest.ranks:
        for entry in rank.tensors:
            assert entry.dtype == "float32"
            body = bytearray(entry.num_bytes)
            reader.read_into(entry.file, entry.offset, memoryview(body))
            found[entry.name] = found.get(entry.name, 0.0) + float(torch.frombuffer(body, dtype=torch.float32).double().sum())
    return found


def test_the_model_part_converts_to_one_plain_file(straight: Straight, tmp_path: Path) -> None:
    """torch's own converter finds {"model": ..., "optimizer": ...}: the names survive as a nested dictionary."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    from keepstep.trainer.config import ModelSection
    from keepstep.trainer.models import build_model

    dcp_to_torch_save(str(straight.root / straight.resume_from(4).directory), tmp_path / "plain.pt")
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)
    build_model(ModelSection(**TINY["model"]), 257).load_state_dict(plain["model"])
    assert set(plain) == {"model", "optimizer"}
