"""Real ranks meet samples that spoil their step: found at once, by all alike, with the sample and the module that are to blame."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trainer_ranks
from planted import plant
from trainer_ranks import TINY, commit, run_ranks

from keepstep.storage.faults import ENV_FAULTS
from keepstep.trainer.contract import Resume

pytestmark = pytest.mark.slow
STEPS = 5


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A text without repetitions: a sample is known by its tokens."""
    text = tmp_path_factory.mktemp("text")
    chance = random.Random(1)
    for i in range(8):
        (text / f"{i}.txt").write_text(" ".join("".join(chance.choices("abcdefghij", k=chance.randint(2, 6))) for _ in range(200)))
    return TINY | {"data": TINY["data"] | {"source": str(text)}, "checkpoint": {"interval": 2}, "run": {"seed": 3, "steps": STEPS}}


def meets(
    rank: int, world_size: int, root: str, config: dict[str, Any], faults: str, prepare: Callable[[], None] | None, resume: Any
) -> None:
    """Trains until a step is refused, and writes down what this rank was told."""
    from keepstep.trainer.guard import BadStep

    os.environ[ENV_FAULTS] = faults
    if prepare:
        prepare()
    with pytest.raises(BadStep) as caught:
        trainer_ranks._train(rank, world_size, root, config, 2 if resume else 1, resume, 0, "")
    told = {"kind": caught.value.kind, "step": caught.value.step, "skips": caught.value.skips, "ranks": caught.value.ranks}
    (Path(root) / f"told-{rank}.json").write_text(json.dumps(told | {"sentence": str(caught.value)}))


def told_after(
    config: dict[str, Any],
    root: Path,
    faults: str = "",
    *,
    world_size: int = 2,
    prepare: Callable[[], None] | None = None,
    resume: Resume | None = None,
    **sections: dict[str, Any],
) -> dict[str, Any]:
    """What all ranks say of the step that they refuse."""
    mine = config | {name: config.get(name, {}) | section for name, section in sections.items()}
    root.mkdir(exist_ok=True)
    run_ranks(world_size, meets, str(root), mine | {"run": mine["run"] | {"root": str(root)}}, faults, prepare, resume)
    told = [json.loads((root / f"told-{rank}.json").read_text()) for rank in range(world_size)]
    assert told == [told[0]] * world_size, "all ranks say the same"
    assert told[0]["kind"] == "bad-step"
    assert "\n" not in told[0]["sentence"]
    return told[0]


def records_in(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "records.jsonl").read_text().splitlines()]


def rejected_in(root: Path) -> dict[str, Any]:
    (line,) = [record["rejected"] for record in records_in(root) if "rejected" in record]
    return line


def draws_nothing() -> None:
    """Fails where an autopsy touches a random stream, or does not say that it may take long."""
    from keepstep.trainer import guard, rng

    examine = guard.examine

    def watched(run: Any, *arguments: Any) -> Any:
        streams = {name: stream.capture() for name, stream in rng.STREAMS.items()}
        announced, report = [], run.me.report
        run.me.report = lambda phase, step, within_s=0.0: (announced.append(within_s), report(phase, step, within_s=within_s))
        found = examine(run, *arguments)
        assert {name: stream.capture() for name, stream in rng.STREAMS.items()} == streams
        assert (announced[0] > 0, announced[-1]) == (True, 0)
        return found

    guard.examine = watched


@pytest.mark.parametrize(
    ("world_size", "position", "rank", "train"),
    [(2, 21, 1, {"reshard": True, "precision": "bf16"}), (3, 18, 1, {"micro_batch_samples": 2})],
    ids=["resharded, bf16", "uneven shares, micro-batches"],
)
def test_one_sample_that_makes_the_loss_nan_is_named_with_rank_and_module(
    config: dict[str, Any], tmp_path: Path, world_size: int, position: int, rank: int, train: dict[str, Any]
) -> None:
    told = told_after(
        config,
        tmp_path / "root",
        f"trainer.sample:position={position}:module=blocks.1.attention",
        world_size=world_size,
        prepare=draws_nothing,
        train=TINY["train"] | train,
    )
    assert (told["step"], told["skips"], told["ranks"]) == (3, [f"{position}:{position + 1}"], [rank])
    start = f"step 3: the loss of rank {rank} is nan; first in blocks.1.attention; samples {position}:{position + 1} ('"
    assert told["sentence"].startswith(start)
    assert len(told["sentence"]) <= len(start) + 80
    line = rejected_in(tmp_path / "root")
    assert line["samples"] == [{"position": position, "rank": rank, "loss": None}]
    assert (line["step"], line["module"], line["why"]) == (3, "blocks.1.attention", told["sentence"])
    assert sorted(record["step"] for record in records_in(tmp_path / "root") if "step" in record) == [1, 2], "the bad step is no step"


@pytest.mark.parametrize("module", ["tokens", "blocks.1.mlp.up"])
def test_one_sample_whose_gradient_alone_is_nan_is_named_with_rank_and_module(config: dict[str, Any], tmp_path: Path, module: str) -> None:
    told = told_after(config, tmp_path / "root", f"trainer.sample:position=21:module={module}:way=gradient", prepare=draws_nothing)
    assert (told["step"], told["skips"], told["ranks"]) == (3, ["21:22"], [1])
    assert told["sentence"].startswith(f"step 3: the gradient of rank 1 is nan; first in the backward pass of {module}; samples 21:22 ('")


def test_a_sample_with_a_steep_gradient_is_found_where_people_ask_for_it(config: dict[str, Any], tmp_path: Path) -> None:
    train = TINY["train"] | {"spike": {"window": 8, "gradient_factor": 10}}
    told = told_after(config, tmp_path / "root", "trainer.sample:position=37:module=blocks.1:way=steep", train=train)
    assert (told["step"], told["skips"], told["ranks"]) == (5, ["37:38"], [1])
    line = rejected_in(tmp_path / "root")
    assert line["bound"] == pytest.approx(10 * line["median"])
    start = f"step 5: the gradient is {line['value']:.4g}, beyond {line['bound']:.4g} (median of the recent steps {line['median']:.4g}); "
    assert told["sentence"].startswith(start + "samples 37:38 of rank 1 ('")


def looks_like_plain_torchrun() -> None:
    from keepstep.trainer import guard

    guard.examine, examine = lambda run, *rest: (setattr(run.me, "spec", None), examine(run, *rest))[1], guard.examine


def test_several_samples_are_all_named_and_without_keepstep_the_exception_says_how_to_go_on(config: dict[str, Any], tmp_path: Path) -> None:
    faults = ";".join(f"trainer.sample:position={position}" for position in (8, 11, 12))
    told = told_after(config, tmp_path / "root", faults, prepare=looks_like_plain_torchrun)
    assert (told["step"], told["skips"], told["ranks"]) == (2, ["8:9", "11:13"], [0, 1])
    assert told["sentence"].startswith("step 2: the loss of ranks 0, 1 is nan; first in model; samples 8:9, 11:13 ('")
    assert told["sentence"].endswith('; to train without them, add [data] skip = ["8:9", "11:13"] to run.toml')


def infinite_on_rank_1() -> None:
    """As dropout may do, or a card: no sample shows it again."""
    from keepstep.trainer import loop

    agree = loop.agree

    def spoil(run: Any, step: int, sums: Any, parts: Any) -> Any:
        return agree(run, step, sums._replace(nll=float("inf")) if (run.world.rank, step) == (1, 3) else sums, parts)

    loop.agree = spoil


def test_where_no_sample_is_to_blame_the_whole_batch_is(config: dict[str, Any], tmp_path: Path) -> None:
    told = told_after(config, tmp_path / "root", prepare=infinite_on_rank_1)
    assert (told["step"], told["skips"], told["ranks"]) == (3, ["16:24"], [1])
    assert told["sentence"] == "step 3: the loss of rank 1 is inf; no sample alone is to blame, so all of them are: 16:24"


def breaks_a_parameter() -> None:
    """After the second step, on rank 1: a flipped bit, say."""
    from keepstep.trainer import loop

    record = loop.record_step

    def spoil(run: Any, *arguments: Any, **more: Any) -> None:
        record(run, *arguments, **more)
        if (run.world.rank, run.step) == (1, 2):
            run.engine.optimizer.shards["blocks.1.mlp.up.weight"].data[0, 0] = float("nan")

    loop.record_step = spoil


def test_a_parameter_that_was_broken_before_is_no_samples_fault(config: dict[str, Any], tmp_path: Path) -> None:
    told = told_after(config, tmp_path / "root", prepare=breaks_a_parameter)
    assert (told["step"], told["skips"]) == (3, [])
    assert told["sentence"].endswith(
        "first in blocks.1.mlp.up; blocks.1.mlp.up.weight was not finite before this step, so no sample is to blame"
    )


KNOWN_BY_HEART = {
    "data": {"tokenizer": "bytes"},
    "model": {"layers": 1, "width": 32, "heads": 2, "context": 16, "dropout": 0.1},
    "optimizer": {"warmup_steps": 2, "lr": 1e-2},
    "train": {"batch_tokens": 64, "spike": {"window": 8}},
    "run": {"seed": 3, "steps": 30},
    "checkpoint": {"interval": 20},
    "evaluate": {"max_tokens": 64},
}


def test_samples_of_chance_are_a_spike_and_are_one_again_soon_after_a_restart_at_any_world_size(tmp_path: Path) -> None:
    """Two of the four samples of step 25, in a text that is known by heart by then. The checkpoint of step 20 keeps what was usual: nothing
    else could tell five steps later."""
    root, text = tmp_path / "root", tmp_path / "text"
    text.mkdir()
    plant(text, (97, 99), seed=3, context=16)
    config = KNOWN_BY_HEART | {"data": {"tokenizer": "bytes", "source": str(text)}}
    told = told_after(config, root)
    line, records = rejected_in(root), records_in(root)
    assert (told["step"], told["skips"], told["ranks"]) == (25, ["97:98", "99:100"], [0, 1])
    assert line["median"] + 1.5 <= line["bound"] < line["value"]
    start = f"step 25: the loss is {line['value']:.4g}, beyond {line['bound']:.4g} (median of the recent steps {line['median']:.4g}); "
    assert told["sentence"].startswith(start + "samples 97:98, 99:100 of ranks 0, 1 ('")
    assert max(record["loss"] for record in records if record.get("step", 0) > 20) < line["median"] + 1.5
    worst, other = line["samples"]
    assert worst["loss"] > other["loss"] > line["bound"]
    (folder,) = root.glob("data/a000001/s000000020-*")
    resume = commit(root, str(folder.relative_to(root)))
    (root / "records.jsonl").unlink()
    assert told_after(config, root, resume=resume) == told
    assert rejected_in(root) == line
    assert told_after(config, root, world_size=1, resume=resume)["skips"] == told["skips"]


def test_under_exact_reduction_the_sample_is_found_in_whichever_share_it_lies(config: dict[str, Any], tmp_path: Path) -> None:
    """Three logical ranks on two: rank 1 has two shares, and more passes than rank 0."""
    cluster = {"exact_reduction": True, "logical_ranks": 3}
    told = told_after(config, tmp_path / "root", "trainer.sample:position=19:module=tokens:way=gradient", cluster=cluster)
    assert (told["step"], told["skips"], told["ranks"]) == (3, ["19:20"], [1])
    assert told["sentence"].startswith("step 3: the gradient of rank 1 is nan; first in the backward pass of tokens; samples 19:20 ('")
