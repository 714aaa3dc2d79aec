"""Real ranks under exact reduction: how many there are does not show in any bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_ranks import TINY, commit, manifest_of, run_ranks, train_ranks

from keepstep.trainer.contract import Resume

pytestmark = pytest.mark.slow
LOGICAL = 4
STEPS = 6
Config = dict[str, Any]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Everything that could show the world size: dropout, ten samples for four logical ranks, micro-batches of two, clipping, and vectors
    and tables whose rows no world size divides."""
    text = tmp_path_factory.mktemp("text")
    for i in range(8):
        (text / f"{i}.txt").write_text(f"Chapter {i}. " + "It was a bright cold day in April, and the clocks were striking. " * 30)
    return TINY | {
        "data": TINY["data"] | {"source": str(text)},
        "model": TINY["model"] | {"width": 40, "dropout": 0.2},
        "optimizer": TINY["optimizer"] | {"clip_norm": 0.5},
        "train": {"batch_tokens": 160, "micro_batch_samples": 2},
        "checkpoint": {"interval": 2},
        "evaluate": {"max_tokens": 1500},  # three batches of windows
        "cluster": {"exact_reduction": True, "logical_ranks": LOGICAL},
        "run": {"seed": 3, "steps": STEPS},
    }


@dataclass(frozen=True)
class Outcome:
    """What must not depend on the number of ranks."""

    steps: list[tuple[int, str, float]]  # step, loss, gradient norm
    model: str
    optimizer: str
    state: str
    perplexity: float


def rooted(config: Config, root: Path) -> Config:
    return config | {"run": config["run"] | {"root": str(root)}}


def outcome(root: Path, attempt: int = 1) -> Outcome:
    records = [record for record in map(json.loads, (root / "records.jsonl").read_text().splitlines()) if "step" in record]
    (folder,) = root.glob(f"data/a{attempt:06d}/s{STEPS:09d}-*")
    result = json.loads((folder / "rank-00000.json").read_text())["state"]["result"]
    steps = [(record["step"], record["loss_hex"], record["grad_norm"]) for record in records]
    return Outcome(steps, result["model_sha256"], result["optimizer_sha256"], result["state_sha256"], result["perplexity"])


def resume_from(root: Path, attempt: int, step: int) -> Resume:
    (folder,) = root.glob(f"data/a{attempt:06d}/s{step:09d}-*")
    return commit(root, str(folder.relative_to(root)))


def trained(config: Config, root: Path, world_size: int, **options: Any) -> Outcome:
    root.mkdir(exist_ok=True)
    train_ranks(root, rooted(config, root), world_size=world_size, **options)
    return outcome(root, options.get("attempt", 1))


@pytest.fixture(scope="module")
def four(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """One rank per logical rank."""
    root = tmp_path_factory.mktemp("four")
    found = trained(config, root, LOGICAL)
    assert [step for step, *_ in found.steps] == list(range(1, STEPS + 1))
    assert all(norm > 0.5 for *_, norm in found.steps), "the gradients are clipped"
    return root, found


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_any_number_of_ranks_has_the_same_bits(config: Config, four: tuple[Path, Outcome], tmp_path: Path, world_size: int) -> None:
    """Five: one of them has nothing to compute."""
    assert trained(config, tmp_path, world_size) == four[1]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_half_precision_too(config: Config, four: tuple[Path, Outcome], tmp_path: Path, precision: str) -> None:
    half = config | {"train": config["train"] | {"precision": precision}}
    one, *others = [trained(half, tmp_path / str(world_size), world_size) for world_size in (1, 3, 4)]
    assert others == [one, one]
    assert one.steps != four[1].steps, "it makes a difference"


def test_a_run_goes_on_with_the_same_bits_in_a_world_of_another_size(config: Config, four: tuple[Path, Outcome], tmp_path: Path) -> None:
    """4 -> 2 -> 3 -> 4: each attempt begins with a checkpoint that another number of ranks has made."""
    mine = rooted(config, tmp_path)
    train_ranks(tmp_path, mine, world_size=4, stop_at=1)
    train_ranks(tmp_path, mine, world_size=2, attempt=2, resume=resume_from(tmp_path, 1, 1), stop_at=3)
    train_ranks(tmp_path, mine, world_size=3, attempt=3, resume=resume_from(tmp_path, 2, 3), stop_at=5)
    assert trained(config, tmp_path, 4, attempt=4, resume=resume_from(tmp_path, 3, 5)) == four[1]


def normal(config: Config) -> Config:
    """FSDP2 in the usual way, without dropout: only rounding differs."""
    return {key: value for key, value in config.items() if key != "cluster"} | {"model": config["model"] | {"dropout": 0.0}}


def test_it_computes_what_the_normal_engine_computes(config: Config, tmp_path: Path) -> None:
    exact = trained(config | {"model": config["model"] | {"dropout": 0.0}}, tmp_path / "exact", 2)
    plain = trained(normal(config), tmp_path / "plain", 2)
    for one, other in zip(exact.steps, plain.steps, strict=True):
        assert float.fromhex(one[1]) == pytest.approx(float.fromhex(other[1]), rel=1e-5)
        assert one[2] == pytest.approx(other[2], rel=1e-4)
    assert exact.perplexity == pytest.approx(plain.perplexity, rel=1e-4)


def test_checkpoints_are_cut_alike_and_either_engine_goes_on_with_the_others(config: Config, tmp_path: Path) -> None:
    exact, plain = config | {"model": config["model"] | {"dropout": 0.0}}, normal(config)
    both = {}
    for name, first, second in (("exact", exact, plain), ("plain", plain, exact)):
        root = tmp_path / name
        root.mkdir()
        train_ranks(root, rooted(first, root), world_size=3, stop_at=2)
        made = resume_from(root, 1, 2)
        cut = [[(t.name, t.dtype, t.shape, t.starts, t.offset) for t in rank.tensors] for rank in manifest_of(root, made).ranks]
        both[name] = cut, trained(second, root, 3, attempt=2, resume=made)
    assert both["exact"][0] == both["plain"][0]
    one, other = both["exact"][1], both["plain"][1]
    assert [float.fromhex(loss) for _, loss, _ in one.steps] == pytest.approx([float.fromhex(loss) for _, loss, _ in other.steps], rel=1e-5)


def add_in_rank_order() -> None:
    """Each rank adds up what it computes, and the sums of the ranks are added one after the other."""
    from keepstep.trainer import exact

    def in_order(node: Any, find: Callable[[Any], Any], add: Callable[[Any, Any], Any]) -> Any:
        total, first = None, node[0]
        while first < node[1]:
            part, first = next((part, last) for last in range(node[1], first, -1) if (part := find((first, last))) is not None)
            total = part if total is None else add(total, part)
        return total

    exact.nodes_within = lambda part, leaves: [(part.start, part.stop)] if part else []  # type: ignore[attr-defined]
    exact.add_up = in_order  # type: ignore[attr-defined]


def seed_by_rank() -> None:
    import torch.distributed as dist

    from keepstep.trainer import rng

    seed = rng.seed_everything
    rng.seed_everything = lambda seed_, step, *share: seed(seed_, step, dist.get_rank())  # type: ignore[assignment]


def norm_by_shard() -> None:
    """As the normal engine: each shard has a norm."""
    from keepstep.trainer import exact

    exact._row_squares = lambda shards: [float(shard.grad.norm().double().square()) for shard in shards if shard.numel()]  # type: ignore


def update_in_one_kernel() -> None:
    from keepstep.trainer import engines

    plain = engines.ShardOptimizer
    engines.ShardOptimizer = lambda model, config, fused: plain(model, config)  # type: ignore[misc, assignment]


MUTANTS = (add_in_rank_order, seed_by_rank, norm_by_shard, update_in_one_kernel)


def train_mutant(rank: int, world_size: int, root: str, config: Config, mutate: Callable[[], None]) -> None:
    import trainer_ranks

    mutate()
    trainer_ranks._train(rank, world_size, root, config, 1, None, 0, "")


@pytest.mark.parametrize("mutate", MUTANTS, ids=[mutate.__name__.replace("_", "-") for mutate in MUTANTS])
def test_whatever_depends_on_the_number_of_ranks_shows(config: Config, tmp_path: Path, mutate: Callable[[], None]) -> None:
    if mutate is update_in_one_kernel and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("without vector units the fused kernel has no ends")
    found = []
    for world_size in (1, 3):
        root = tmp_path / str(world_size)
        root.mkdir()
        run_ranks(world_size, train_mutant, str(root), rooted(config, root), mutate)
        found.append(outcome(root))
    assert found[0] != found[1]
