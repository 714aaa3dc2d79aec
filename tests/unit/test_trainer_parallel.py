"""Styles of parallelism on four real ranks of two nodes: the same training as in one process, and checkpoints that load in every other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from trainer_ranks import TINY, FolderStaging, commit, manifest_of, run_ranks, train_ranks

from keepstep.storage.store import Store
from keepstep.storage.verify import CheckpointReader
from keepstep.trainer.attach import Attached
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.contract import Resume

pytestmark = pytest.mark.slow

RANKS, STEPS = 4, 3
# train -> ranks of a node; what a rank keeps of the parameters
STYLES: Mapping[str, tuple[dict[str, Any], int]] = {
    "full": ({}, 2),
    "node": ({"sharding": "node"}, 2),
    "none": ({"sharding": "none"}, 2),
    "tensor": ({"tensor_parallel": 2}, 2),
    "tensor-none": ({"tensor_parallel": 2, "sharding": "none"}, 2),
    "tensor-node": ({"tensor_parallel": 2, "sharding": "node", "reshard": True, "micro_batch_samples": 1}, 4),
}
# 9 rows of an MLP's 36 on each of two shards of two groups; queries, keys and values are cut in the middle of the keys
KINDS: Mapping[str, dict[str, Any]] = {
    "gpt": {"heads": 4, "inside": 36, "bias": True},
    "llama": {"kind": "llama", "heads": 4, "kv_heads": 2, "inside": 36, "tied": False},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(8):
        (folder / f"{i}.txt").write_text(f"Chapter {i}. " + "It was a bright cold day in April, and the clocks were striking. " * 30)
    return folder


def config_of(root: Path, text: Path, kind: str, style: str, **model: Any) -> dict[str, Any]:
    """Gradients that are nothing but rounding move no weight: eps is large."""
    return TINY | {
        "run": {"root": str(root), "seed": 3, "steps": STEPS},
        "data": TINY["data"] | {"source": str(text)},
        "model": TINY["model"] | {"dropout": 0.0} | KINDS[kind] | model,
        "optimizer": TINY["optimizer"] | {"eps": 1e-3},
        "train": TINY["train"] | STYLES[style][0],
        "checkpoint": {"interval": 1},
        "trace": {"interval": 1},
    }


def train_alone(rank: int, _: int, root: str, config: Mapping[str, Any]) -> None:
    """Plain modules in one process, and torch's own optimizer on them: what all styles are compared with."""
    from keepstep.trainer.engine import nll_of
    from keepstep.trainer.models import build_model
    from keepstep.trainer.optim import ShardOptimizer, clip_scale
    from keepstep.trainer.parallel import initialise, join
    from keepstep.trainer.run import open_run
    from keepstep.trainer.schedule import learning_rate
    from keepstep.trainer.state import flatten, tensors_of

    parsed = TrainerConfig.model_validate(config)
    run = open_run(parsed, me := Attached(None), join(me))
    model = build_model(parsed.model, run.tokens.index.vocabulary)
    initialise(model, seed=parsed.run.seed)
    optimizer, losses, norms = ShardOptimizer(model, parsed.optimizer), [], []
    for step in range(1, STEPS + 1):
        nll, tokens = nll_of(model, run.share[step][0], torch.device("cpu"))
        torch.autograd.backward(nll / parsed.train.batch_tokens)
        optimizer.take_gradients()
        losses.append(float(nll) / tokens)
        norms.append(optimizer.gradient_square() ** 0.5)
        scale = clip_scale(norms[-1], parsed.optimizer.clip_norm)
        optimizer.update(lr=learning_rate(parsed.optimizer, step, parsed.run.steps), scale=scale)
    torch.save({"losses": losses, "norms": norms, "tensors": dict(flatten(tensors_of(model, optimizer)))}, Path(root, "alone.pt"))


def world_of(rank: int, train: Any, ranks_per_node: int) -> Any:
    """As `join` makes it, in a process group that serves several worlds."""
    from keepstep.trainer.grid import Seat, grid_of
    from keepstep.trainer.parallel import World, meshes_of

    seats = [Seat(rank % ranks_per_node, ranks_per_node) for rank in range(dist.get_world_size())]
    device = torch.device("cpu")
    mesh, tensor = meshes_of(grid_of(train, seats), device)
    return World(rank=rank, size=dist.get_world_size(), device=device, mesh=mesh, tensor=tensor)


def train_in_every_style(rank: int, _: int, root: str, configs: Mapping[str, Any]) -> None:
    """Trains and saves in each style; then each one loads what all have saved."""
    dist.init_process_group("gloo")
    folders = {style: Path(root, style) for style in configs}
    digests = {style: train_in(rank, folders[style], configs[style], STYLES[style][1]) for style in configs}
    if rank == 0:
        Path(root, "digests.json").write_text(json.dumps(digests))
        for folder in folders.values():
            commit_of(folder)
    dist.barrier()
    crossed = {style: load_all(rank, Path(root), configs[style], STYLES[style][1]) for style in configs}
    if rank == 0:
        Path(root, "crossed.json").write_text(json.dumps(crossed))


def train_in(rank: int, folder: Path, config: Mapping[str, Any], ranks_per_node: int) -> dict[str, str]:
    """Digests of the state in the end; its losses and tensors are written down."""
    from keepstep.trainer.checkpoint import Checkpointer
    from keepstep.trainer.loop import advance
    from keepstep.trainer.portions import parts_of, whole
    from keepstep.trainer.run import open_run
    from keepstep.trainer.state import digest, flatten

    parsed = TrainerConfig.model_validate(config)
    run = open_run(parsed, Attached(None), world_of(rank, parsed.train, ranks_per_node))
    agreed = [advance(run, run.share[step]) for step in range(1, STEPS + 1)]
    tensors = {name: whole(tensor) for name, tensor in flatten(run.tensors).items()}
    held = sum(part.numel() for tensor in run.tensors["model"].values() for part in parts_of(tensor))
    norms = {"norms": [one.grad_norm for one in agreed], "params": [one.param_norm for one in agreed]}
    if rank == 0:
        torch.save({"losses": [one.loss for one in agreed], "tensors": tensors, "held": held, **norms}, folder / "trained.pt")
    staging = FolderStaging(folder, attempt=1, rank=rank, world_size=run.world.size)
    assert Checkpointer(staging, rank=rank, attempt=1, nonce="nonce1").save(STEPS, run.tensors, run.rank_state().to_json())
    dist.barrier()
    return digest(run.tensors)


def commit_of(folder: Path) -> Resume:
    (directory,) = folder.glob(f"data/a000001/s{STEPS:09d}-*")
    return commit(folder, str(directory.relative_to(folder)))


def load_all(rank: int, root: Path, config: Mapping[str, Any], ranks_per_node: int) -> dict[str, Any]:
    """By style that has saved: the digests of what it loads, and whether its tensors were cut otherwise."""
    from keepstep.trainer.engines import open_engine
    from keepstep.trainer.restore import restore
    from keepstep.trainer.scaler import LossScaler
    from keepstep.trainer.state import digest, flatten, tensors_of

    parsed = TrainerConfig.model_validate(config)
    engine = open_engine(parsed, world_of(rank, parsed.train, ranks_per_node), VOCABULARY, LossScaler.of("fp32"))
    tensors = tensors_of(engine.sharded, engine.optimizer)
    found = {}
    for style in STYLES:
        for tensor in flatten(tensors).values():
            (tensor.to_local() if hasattr(tensor, "to_local") else tensor).zero_()
        resume = commit_of(root / style) if rank == 0 else None
        dist.barrier()
        directory = next((root / style).glob(f"data/a000001/s{STEPS:09d}-*")).relative_to(root / style)
        resume = resume or Resume(step=STEPS, directory=str(directory), manifest_sha256="")
        reader = CheckpointReader(Store.open(root / style), resume.directory, manifest_of(root / style, resume))
        restored = restore(reader.manifest, reader, tensors)
        found[style] = {**digest(tensors), "resharded": restored.resharded}
    return found


VOCABULARY = 257  # bytes, and the end of a text


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one process and of four in every style."""
    kind, root = request.param, tmp_path_factory.mktemp(request.param)
    (root / "alone").mkdir()
    run_ranks(1, train_alone, str(root), config_of(root / "alone", text, kind, "full"))
    configs = {}
    for style in STYLES:
        (root / style).mkdir()
        configs[style] = config_of(root / style, text, kind, style)
    run_ranks(RANKS, train_in_every_style, str(root), configs)
    return root


@pytest.mark.parametrize("style", STYLES)
def test_every_style_trains_as_one_process_does(trained: Path, style: str) -> None:
    """Losses, gradient norms and their clipping, parameters and moments, within float tolerance."""
    alone, here = torch.load(trained / "alone.pt"), torch.load(trained / style / "trained.pt")
    assert here["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    assert here["norms"] == pytest.approx(alone["norms"], rel=1e-5)
    assert here["tensors"].keys() == alone["tensors"].keys()
    for name, tensor in here["tensors"].items():
        torch.testing.assert_close(tensor, alone["tensors"][name], rtol=1e-4, atol=2e-6, msg=lambda why, name=name: f"{name}: {why}")


@pytest.mark.parametrize("style", STYLES)
def test_the_norm_of_all_parameters_counts_each_of_them_once(trained: Path, style: str) -> None:
    here, full = (torch.load(trained / each / "trained.pt") for each in (style, "full"))
    assert here["params"] == pytest.approx(full["params"], rel=1e-6)


def test_a_rank_keeps_what_its_style_says(trained: Path) -> None:
    total = sum(tensor.numel() for name, tensor in torch.load(trained / "alone.pt")["tensors"].items() if name.startswith("model."))
    held = {style: torch.load(trained / style / "trained.pt")["held"] / total for style in STYLES}
    assert held["none"] == 1
    assert held["node"] == pytest.approx(1 / 2, rel=0.05)
    assert held["full"] == pytest.approx(1 / 4, rel=0.05)
    assert held["full"] < held["tensor"] < held["node"], "blocks are cut by shards and group, embeddings by shards alone"
    assert held["tensor"] < held["tensor-none"] < held["none"]


def test_a_checkpoint_of_every_style_loads_bit_equal_in_every_other(trained: Path) -> None:
    """Parameters and moments: digests of the unsharded tensors. In its own style each rank reads its own chunks straight."""
    digests, crossed = (json.loads((trained / f"{what}.json").read_text()) for what in ("digests", "crossed"))
    for here, loaded in crossed.items():
        for style, found in loaded.items():
            assert {part: found[part] for part in ("model", "optimizer")} == digests[style], f"{style} loaded by {here}"
        assert not loaded[here]["resharded"]


@pytest.mark.parametrize("style", STYLES)
def test_replicas_share_the_writing_and_nothing_is_written_twice(trained: Path, style: str) -> None:
    manifest = manifest_of(trained / style, commit_of(trained / style))  # merging it compares the chunks with the whole
    tensor_bytes = [sum(entry.num_bytes for entry in rank.tensors) for rank in manifest.ranks]
    assert min(tensor_bytes) > sum(tensor_bytes) / RANKS / 2, "a large tensor of a small model is one rank's"


def load_in_fewer(rank: int, world_size: int, root: str, configs: Mapping[str, Any]) -> None:
    dist.init_process_group("gloo")
    crossed = {style: load_all(rank, Path(root), config, world_size) for style, config in configs.items()}
    if rank == 0:
        Path(root, f"crossed-{world_size}.json").write_text(json.dumps(crossed))


@pytest.mark.parametrize(("world_size", "styles"), [(1, ("full",)), (2, ("full", "none", "tensor")), (3, ("full", "none"))])
def test_and_in_worlds_of_other_sizes(trained: Path, text: Path, world_size: int, styles: tuple[str, ...]) -> None:
    kind = "llama" if trained.name.startswith("llama") else "gpt"
    configs = {style: config_of(trained / style, text, kind, style) for style in styles}
    run_ranks(world_size, load_in_fewer, str(trained), configs)
    digests = json.loads((trained / "digests.json").read_text())
    for here, loaded in json.loads((trained / f"crossed-{world_size}.json").read_text()).items():
        for style, found in loaded.items():
            assert {part: found[part] for part in ("model", "optimizer")} == digests[style], f"{style} loaded by {here}"


def digests_by_rank(rank: int, _: int, root: str, config: Mapping[str, Any]) -> None:
    """With dropout: what several ranks hold of the same parameters must have had the same gradients."""
    from keepstep.trainer.loop import advance
    from keepstep.trainer.run import open_run
    from keepstep.trainer.state import byte_view

    dist.init_process_group("gloo")
    parsed = TrainerConfig.model_validate(config)
    run = open_run(parsed, Attached(None), world_of(rank, parsed.train, 2))
    for step in range(1, STEPS + 1):
        advance(run, run.share[step])
    mine = {name: bytes(byte_view(shard.detach().contiguous())).hex() for name, shard in run.engine.optimizer.shards.items()}
    told: list[Any] = [None] * RANKS
    dist.all_gather_object(told, mine)
    if rank == 0:
        Path(root, "told.json").write_text(json.dumps(told))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_several_ranks_hold_stays_the_same_to_the_bit(text: Path, tmp_path: Path, precision: str) -> None:
    """Two replicas of a group of two: embeddings and norms on four ranks, the parts of linear layers on two."""
    config = config_of(tmp_path, text, "gpt", "tensor-none", dropout=0.2)
    run_ranks(RANKS, digests_by_rank, str(tmp_path), config | {"train": config["train"] | {"precision": precision}})
    told = json.loads((tmp_path / "told.json").read_text())
    for name in told[0]:
        is_cut = any(part in name for part in ("qkv", "up", "out.weight"))
        assert told[0][name] == told[2][name], name
        assert told[1][name] == told[3][name], name
        assert (told[0][name] == told[1][name]) is not is_cut, name


def resumed(root: Path, config: dict[str, Any], *, step: int = 2, **options: Any) -> tuple[dict[int, str], dict[str, Any]]:
    """Losses and result of an attempt that begins with the checkpoint of a step; see test_trainer_exactness.py."""
    (folder,) = root.glob(f"data/a000001/s{step:09d}-*")
    (root / "records.jsonl").unlink()
    resume = commit(root, str(folder.relative_to(root)))
    train_ranks(root, config, world_size=RANKS, ranks_per_node=2, attempt=2, resume=resume, **options)
    return outcome(root, 2)


def outcome(root: Path, attempt: int) -> tuple[dict[int, str], dict[str, Any]]:
    records = map(json.loads, (root / "records.jsonl").read_text().splitlines())
    (folder,) = root.glob(f"data/a{attempt:06d}/s{STEPS + 1:09d}-*")
    result = json.loads((folder / "rank-00000.json").read_text())["state"]["result"]
    return {record["step"]: record["loss_hex"] for record in records if "step" in record}, result


def straight(root: Path, text: Path, kind: str, style: str, **train: Any) -> tuple[dict[str, Any], dict[int, str], dict[str, Any]]:
    """A run with dropout and a checkpoint in its middle that nobody disturbs: (config, losses, result)."""
    config = config_of(root, text, kind, style, dropout=0.2)
    config |= {"run": config["run"] | {"steps": STEPS + 1}, "train": config["train"] | train, "checkpoint": {"interval": 2}}
    train_ranks(root, config, world_size=RANKS, ranks_per_node=2)
    return config, *outcome(root, 1)


@pytest.mark.parametrize(
    ("kind", "style", "train"),
    [
        ("gpt", "node", {"activation_checkpointing": True}),
        ("gpt", "none", {"precision": "bf16"}),
        ("gpt", "tensor", {}),
        ("llama", "tensor-none", {"activation_checkpointing": True, "precision": "bf16"}),
    ],
)
def test_a_resumed_run_of_every_style_has_the_bits_of_an_undisturbed_one(
    text: Path, tmp_path: Path, kind: str, style: str, train: dict[str, Any]
) -> None:
    """Losses, digests of model and optimizer, random streams of all ranks."""
    config, losses, result = straight(tmp_path, text, kind, style, **train)
    again, again_result = resumed(tmp_path, config)
    assert again == {step: loss for step, loss in losses.items() if step > 2}
    assert again_result == result


def test_a_run_goes_on_in_another_style_and_consumes_the_same_samples(text: Path, tmp_path: Path) -> None:
    """From shards to tensor parallelism on as many ranks: other shares, and streams that follow from them."""
    config = config_of(tmp_path, text, "gpt", "full")
    config |= {"run": config["run"] | {"steps": STEPS + 1}, "checkpoint": {"interval": 2}}
    train_ranks(tmp_path, config, world_size=RANKS, ranks_per_node=2)
    losses, result = outcome(tmp_path, 1)
    ledger = ledgers(tmp_path)
    again, again_result = resumed(tmp_path, config | {"train": config["train"] | {"tensor_parallel": 2}})
    expected = [float.fromhex(loss) for step, loss in losses.items() if step > 2]
    assert [float.fromhex(loss) for loss in again.values()] == pytest.approx(expected, rel=1e-5)
    assert again_result["perplexity"] == pytest.approx(result["perplexity"], rel=1e-4)
    assert again_result["model_sha256"] != result["model_sha256"], "sums are rounded otherwise"
    for step, entries in ledgers(tmp_path).items():
        assert len(entries) == 2, "a group of two consumes one share"
        assert (entries[0][0], entries[-1][1]) == (ledger[step][0][0], ledger[step][-1][1])


def ledgers(root: Path) -> dict[int, list[list[int]]]:
    records = map(json.loads, (root / "records.jsonl").read_text().splitlines())
    return {record["step"]: record["ledger"] for record in records if "step" in record}


@pytest.mark.parametrize(("kind", "style"), [("gpt", "node"), ("llama", "tensor")])
def test_a_replay_groups_its_processes_as_the_ranks_were(text: Path, tmp_path: Path, kind: str, style: str) -> None:
    """All of them are on one machine, and yet sums are those of nodes; one process for all ranks comes close."""
    from keepstep.trainer.replay import Stretch, View, replay

    raw, losses, _ = straight(tmp_path, text, kind, style)
    config = TrainerConfig.model_validate(raw)
    stretch = Stretch(config=config, attempt=1, world_size=RANKS, after=0, last=STEPS + 1, threads=1, num_nodes=2)
    replayed = replay([stretch], None, on_one_process=False, view=View(step=2))
    seen = [sample["position"] for view in replayed.views for sample in view["samples"]]
    assert sorted(seen) == list(range(8, 16)), "each sample of step 2 is shown once"
    assert {step: record["loss_hex"] for step, record in replayed.records.items()} == losses
    alone = [record["loss"] for record in replay([stretch], None, on_one_process=True).records.values()]
    assert alone == pytest.approx([float.fromhex(loss) for loss in losses.values()], rel=1e-5)


@pytest.mark.parametrize("style", ["full", "none"])
def test_bf16_computes_over_float32_weights_and_repeats_to_the_bit(text: Path, tmp_path: Path, style: str) -> None:
    outcomes = []
    for number in range(2):
        root = tmp_path / str(number)
        root.mkdir()
        outcomes.append(straight(root, text, "llama", style, precision="bf16")[1:])
    assert outcomes[0] == outcomes[1]
    (folder,) = root.glob(f"data/a000001/s{STEPS + 1:09d}-*")
    manifest = manifest_of(root, commit(root, str(folder.relative_to(root))))
    assert {entry.dtype for rank in manifest.ranks for entry in rank.tensors} == {"float32"}, "weights, moments and counts"
    (tmp_path / "float32").mkdir()
    _, losses, _ = straight(tmp_path / "float32", text, "llama", style)
    assert losses != outcomes[0][0], "something was rounded"


def test_exact_reduction_refuses_other_styles(text: Path, tmp_path: Path) -> None:
    from keepstep.trainer.engines import open_engine
    from keepstep.trainer.scaler import LossScaler

    config = config_of(tmp_path, text, "gpt", "tensor") | {"cluster": {"exact_reduction": True, "logical_ranks": 4}}
    with pytest.raises(ValueError, match=r"cluster.exact_reduction = true has an order of its own .* train.tensor_parallel = 2 must be 1"):
        open_engine(TrainerConfig.model_validate(config), None, VOCABULARY, LossScaler.of("fp32"))  # type: ignore[arg-type]


def test_recurrent_layers_are_not_compiled(text: Path, tmp_path: Path) -> None:
    """Sixteen positions of three layers take minutes."""
    from keepstep.trainer.engines import open_engine
    from keepstep.trainer.scaler import LossScaler

    config = config_of(tmp_path, text, "gpt", "full") | {
        "model": TINY["model"] | {"kind": "lstm"},
        "train": TINY["train"] | {"compile": True},
    }
    with pytest.raises(ValueError, match=r'train.compile = true is for transformers, and model.kind = "lstm" has kernels of its own'):
        open_engine(TrainerConfig.model_validate(config), None, VOCABULARY, LossScaler.of("fp32"))  # type: ignore[arg-type]


def refused(rank: int, _: int, config: Mapping[str, Any], expected: str) -> None:
    from keepstep.trainer.engines import open_engine
    from keepstep.trainer.parallel import join
    from keepstep.trainer.scaler import LossScaler

    parsed = TrainerConfig.model_validate(config)
    with pytest.raises(ValueError, match=expected):
        open_engine(parsed, join(Attached(None), train=parsed.train), VOCABULARY, LossScaler.of("fp32"))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"heads": 1}, "run.toml: train.tensor_parallel = 2 must divide model.heads = 1: every rank computes as many heads"),
        ({"kind": "llama", "heads": 4, "kv_heads": 1}, "train.tensor_parallel = 2 must divide model.kv_heads = 1"),
        ({"heads": 4, "inside": 35}, "must divide the inner width of blocks.0.mlp.up, which is 35: set model.inside"),
        ({"kind": "lstm"}, 'is for model.kind = "gpt", "bert", "llama", not for "lstm": set it to 1'),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(text: Path, tmp_path: Path, model: dict[str, Any], expected: str) -> None:
    config = config_of(tmp_path, text, "gpt", "tensor") | {"model": TINY["model"] | model}
    run_ranks(2, refused, config, expected)
