"""What a run begins with: the checkpoint, the file or the folder that train.start names, the same bits for every rank and attempt, or a
sentence that says what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from foreign import foreign_folder, reference
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file, save_file
from sharded_state import same_bits, simulated
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from trainer_ranks import FolderStaging, commit, write_log

from keepstep.storage.records import Commit
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store
from keepstep.trainer.attach import Attached
from keepstep.trainer.checkpoint import Checkpointer
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.export import export
from keepstep.trainer.models import LanguageModel, build_model, initial_value, is_lora
from keepstep.trainer.optim import ShardOptimizer, local
from keepstep.trainer.origin import START_KEY, look
from keepstep.trainer.parallel import World, initialise, join, shard, whole
from keepstep.trainer.start import StartChanged, StartMismatch, begin
from keepstep.trainer.state import tensors_of

V = 40
MODEL: dict[str, Any] = {"layers": 2, "width": 32, "heads": 4, "context": 16, "dropout": 0.0}


def config_of(start: Path | str = "", *, model: Mapping[str, Any] | None = None, seed: int = 9, **train: Any) -> TrainerConfig:
    return TrainerConfig.model_validate(
        {"run": {"seed": seed}, "model": {**MODEL, **(model or {})}, "train": {"start": str(start), **train}}
    )


def model_of(config: TrainerConfig, *, vocabulary: int = V) -> LanguageModel:
    outputs = 3 if config.train.objective == "classes" else 0
    return build_model(config.model, vocabulary, outputs=outputs, train=config.train)


def begun(config: TrainerConfig, root: Path, *, ranks: int = 1, vocabulary: int = V) -> list[dict[str, Tensor]]:
    """The initial values of a run of so many ranks: of each rank its parts by name."""
    parts = []
    for rank in range(ranks):
        with simulated(rank, ranks):
            mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=(f"rank{rank}",))  # torch would take it for that of another rank
            world = World(rank=rank, size=ranks, device=torch.device("cpu"), mesh=mesh)
            model = model_of(config, vocabulary=vocabulary)
            shard(model, world, precision="fp32", reshard=True)
            parameters = tensors_of(model, ShardOptimizer(model, config.optimizer))["model"]
            begin(config, Store.open(root), world, model, parameters)
            parts.append({name: local(tensor).clone() for name, tensor in parameters.items()})
    return parts


def values(config: TrainerConfig, root: Path, *, vocabulary: int = V, ranks: int = 1) -> dict[str, Tensor]:
    """The same, whole: FSDP2 cuts by rows."""
    parts = begun(config, root, ranks=ranks, vocabulary=vocabulary)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(same_bits(found[name], expected[name]) for name in expected)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Of the run that begins."""
    (tmp_path / "new").mkdir()
    return tmp_path / "new"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A run with a commit at step 20; another one can be added with `save`."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/run.toml").write_text("")
    write_log(tmp_path / "base", 1, [])
    save(tmp_path / "base", config_of(), step=20)
    return tmp_path / "base"


def save(root: Path, config: TrainerConfig, *, step: int, vocabulary: int = V) -> dict[str, Tensor]:
    """One more commit, with values that follow from the step."""
    join(Attached(None))
    try:
        model = model_of(config, vocabulary=vocabulary)
        initialise(model, seed=step)
        randomise(model)
        staging = FolderStaging(root, attempt=1, rank=0, world_size=1)
        state = tensors_of(model, ShardOptimizer(model, config.optimizer))
        assert Checkpointer(staging, rank=0, attempt=1, nonce="nonce1").save(step, state, {"step": step})
    finally:
        dist.destroy_process_group()
    (folder,) = root.glob(f"data/*/s{step:09d}-*")
    made = commit(root, str(folder.relative_to(root)))
    RunLog.open(Store.open(root)).append(
        Commit(term=1, attempt=1, step=step, directory=made.directory, manifest_sha256=made.manifest_sha256, world_size=1)
    )
    return {name: whole(parameter).clone() for name, parameter in model.named_parameters()}


def randomise(model: LanguageModel) -> None:
    """What LoRA would begin with as 0 is not."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_lora(name):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))


def values_at(step: int) -> dict[str, Tensor]:
    model = model_of(config_of())
    return {name: initial_value(model, name, parameter.shape, step) for name, parameter in model.named_parameters()}


class TestFromARun:
    @pytest.mark.parametrize("ranks", [1, 2, 3, 8])
    def test_every_rank_reads_its_parts_of_the_newest_commit_in_any_world(self, base: Path, root: Path, ranks: int) -> None:
        assert equal(values(config_of(base), root, ranks=ranks), values_at(20))

    def test_a_step_can_be_named(self, base: Path, root: Path) -> None:
        save(base, config_of(), step=40)
        assert equal(values(config_of(f"{base}@20"), root), values_at(20))

    def test_what_was_meant_is_decided_once(self, base: Path, root: Path) -> None:
        """An attempt that was killed before its first commit, and the base run went on."""
        first = values(config_of(base), root)
        save(base, config_of(), step=40)
        assert equal(values(config_of(base), root, ranks=2), first)
        assert json.loads((root / START_KEY).read_text())["step"] == 20

    def test_another_beginning_of_the_same_run_is_refused(self, base: Path, root: Path) -> None:
        begun(config_of(base), root)
        with pytest.raises(ValueError, match=r'train.start = ".*@20", but this run began with ".*/base" \(start.json in its root\)'):
            begun(config_of(f"{base}@20"), root)

    def test_what_is_frozen_begins_there_as_well(self, base: Path, root: Path) -> None:
        assert equal(values(config_of(base, freeze=["tokens.*"]), root), values_at(20))

    def test_an_adaptation_begins_beside_what_was_learnt(self, base: Path, root: Path) -> None:
        config = config_of(base, lora={"rank": 2})
        found, model = values(config, root, ranks=2), model_of(config)
        assert equal({name: value for name, value in found.items() if not is_lora(name)}, values_at(20))
        lora = {name: initial_value(model, name, value.shape, 9) for name, value in found.items() if is_lora(name)}
        assert lora
        assert equal({name: found[name] for name in lora}, lora)

    def test_an_adaptation_goes_on_from_one_of_the_same_rank(self, base: Path, root: Path) -> None:
        saved = save(base, config_of(lora={"rank": 2}), step=40)
        assert equal(values(config_of(base, lora={"rank": 2}), root), saved)

    def test_a_head_of_classes_begins_with_random_values_where_that_is_said(self, base: Path, root: Path) -> None:
        config = config_of(base, objective="classes", start_without=["head.weight"])
        found = values(config, root)
        assert same_bits(found.pop("head.weight"), initial_value(model_of(config), "head.weight", torch.Size((3, 32)), 9))
        assert equal(found, values_at(20))

    def test_what_start_without_names_begins_with_random_values_even_if_it_would_fit(self, base: Path, root: Path) -> None:
        config = config_of(base, start_without=["blocks.1.*", "tokens.weight"])
        found, model = values(config, root, vocabulary=V + 1), model_of(config, vocabulary=V + 1)
        for name, value in found.items():
            is_new = name.startswith(("blocks.1.", "tokens."))
            assert same_bits(value, initial_value(model, name, value.shape, 9 if is_new else 20)), name

    def test_a_checkpoint_that_is_damaged_is_noticed(self, base: Path, root: Path) -> None:
        (path,) = base.glob("data/*/*/__0_0.distcp")
        body = bytearray(path.read_bytes())
        body[len(body) // 3] ^= 1
        path.write_bytes(body)
        with pytest.raises(StartChanged, match=r"__0_0.distcp: block 0"):
            begun(config_of(base), root)

    def test_a_checkpoint_that_is_gone_is_named(self, base: Path, root: Path) -> None:
        begun(config_of(base), root)
        shutil.rmtree(next(base.glob("data/*/*")))
        with pytest.raises(
            ValueError, match=r"what this run began with \(start.json in its root\) cannot be read any more: .*MANIFEST.json"
        ):
            begun(config_of(base), root)


@pytest.mark.parametrize("what", ["run", "file"])
def test_it_may_lie_on_an_object_store(base: Path, root: Path, tmp_path: Path, what: str) -> None:
    far = MemoryFileSystem()
    if what == "run":
        far.put(str(base), "/far/base", recursive=True)
        assert equal(values(config_of("memory://far/base"), root, ranks=2), values_at(20))
    else:
        export(str(base), tmp_path / "m.safetensors")
        far.put(str(tmp_path / "m.safetensors"), "/far/m.safetensors")
        assert equal(values(config_of("memory://far/m.safetensors"), root, ranks=2), values_at(20))


class TestRefusals:
    """Each with its remedy, and nothing is written below the root."""

    @pytest.fixture(autouse=True)
    def _nothing_is_written(self, root: Path) -> Iterator[None]:
        yield
        assert list(root.iterdir()) == []

    def test_another_vocabulary(self, base: Path, root: Path) -> None:
        says = rf'the checkpoint has {V} tokens, and the data {V + 8} \(tokens.weight\): use its tokenizer, data.tokenizer = ".*/base"'
        with pytest.raises(StartMismatch, match=says):
            begun(config_of(base), root, vocabulary=V + 8)

    def test_another_output(self, base: Path, root: Path) -> None:
        with pytest.raises(StartMismatch, match=r'not one of these classes: set train.start_without = \["head.weight"\]'):
            begun(config_of(base, objective="classes"), root)

    def test_an_untied_base_has_an_output_layer_of_another_shape(self, base: Path, root: Path) -> None:
        save(base, config_of(model={"tied": False}), step=40)
        with pytest.raises(StartMismatch, match=r'set train.start_without = \["head.weight"\]'):
            begun(config_of(base, objective="classes"), root)

    def test_other_layers_and_shapes(self, base: Path, root: Path) -> None:
        says = r"step 20\) is of another model: 6 missing in it: blocks.2.attention.out.weight, .*; 1 of another shape: positions.weight "
        with pytest.raises(StartMismatch, match=says):
            begun(config_of(base, model={"layers": 3, "context": 32}), root)

    def test_a_base_that_is_adapted_must_be_merged(self, base: Path, root: Path) -> None:
        save(base, config_of(lora={"rank": 2}), step=40)
        with pytest.raises(StartMismatch, match=r"16 not in this model: .*lora_a.* export it with --merge"):
            begun(config_of(base), root)

    def test_a_pattern_that_matches_nothing(self, base: Path, root: Path) -> None:
        with pytest.raises(ValueError, match=r'train.start_without: "heads.\*" matches no parameter; they are blocks'):
            begun(config_of(base, start_without=["heads.*"]), root)

    @pytest.mark.parametrize("check", [begun, lambda config, root: look(Store.open(root), config.train.start)], ids=["begin", "look"])
    def test_what_is_not_there(self, base: Path, root: Path, tmp_path: Path, check: Callable[[TrainerConfig, Path], object]) -> None:
        empty = tmp_path / "empty"
        empty.mkdir()
        for start, says in {
            tmp_path / "nowhere": r'train.start = ".*nowhere": neither a run \(run.toml\) nor a model',
            empty: r"neither a run \(run.toml\) nor a model of Hugging Face transformers \(config.json\) is there",
            f"{base}@7": r"step 7 is not committed in .*; committed are 20",
            tmp_path / "x.safetensors": r"train.start = .*x.safetensors.* No such file",
        }.items():
            with pytest.raises(ValueError, match=says):
                check(config_of(start), root)

    def test_a_file_that_is_cut_off_or_none(self, base: Path, root: Path, tmp_path: Path) -> None:
        path = tmp_path / "m.safetensors"
        export(str(base), path)
        sound = path.read_bytes()
        for body, says in (
            (sound[:-1], "was cut off"),
            (sound[:50], "was cut off"),
            (b"PK" * 100, "no safetensors"),
            (b"", "no safetensors"),
        ):
            path.write_bytes(body)
            with pytest.raises(ValueError, match=says):
                begun(config_of(path), root)

    def test_a_folder_without_weights(self, root: Path, tmp_path: Path) -> None:
        folder = foreign_folder("gpt2", tmp_path / "gpt2", vocabulary=V)
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"has a config.json, but neither model.safetensors nor model.safetensors.index.json"):
            begun(config_of(folder), root)

    def test_a_config_that_says_something_else(self, root: Path, tmp_path: Path) -> None:
        folder = foreign_folder("gpt2", tmp_path / "gpt2", vocabulary=V)
        says = r"model.heads is 2, and 4 there; model.activation is 'gelu', and 'gelu_tanh' there; model.bias is False, and True there"
        with pytest.raises(StartMismatch, match=says):
            begun(config_of(folder, model={"heads": 2}), root)

    def test_a_folder_of_another_vocabulary(self, root: Path, tmp_path: Path) -> None:
        folder = foreign_folder("llama", tmp_path / "llama", vocabulary=V - 7)
        with pytest.raises(StartMismatch, match=rf"the checkpoint has {V - 7} tokens, and the data {V} \(head.weight, tokens.weight\)"):
            begun(config_of(folder, model=FOREIGN_FIELDS["llama"]), root)


class TestFromAFile:
    @pytest.fixture
    def path(self, base: Path, tmp_path: Path) -> Path:
        export(str(base), tmp_path / "m.safetensors")
        return tmp_path / "m.safetensors"

    @pytest.mark.parametrize("ranks", [1, 3])
    def test_it_is_what_was_exported(self, path: Path, root: Path, ranks: int) -> None:
        assert equal(values(config_of(path), root, ranks=ranks), values_at(20))

    def test_a_file_that_changed_is_refused(self, path: Path, root: Path) -> None:
        begun(config_of(path), root)
        body = bytearray(path.read_bytes())
        path.write_bytes(bytes(body[:-1]) + bytes([body[-1] ^ 1]))
        with pytest.raises(StartChanged, match=r"is no more what this run began with .*m.safetensors: block 0"):
            begun(config_of(path), root)
        path.write_bytes(body + b"more")
        with pytest.raises(ValueError, match=r"has changed: m.safetensors had \d+ bytes"):
            begun(config_of(path), root)

    def test_its_sha256_is_kept(self, path: Path, root: Path) -> None:
        import hashlib

        begun(config_of(path), root)
        (file,) = json.loads((root / START_KEY).read_text())["files"]
        assert file["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_widened(self, path: Path, root: Path, dtype: torch.dtype) -> None:
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
        save_file(tensors, path)
        assert equal(values(config_of(path), root, ranks=2), {name: tensor.float() for name, tensor in tensors.items()})

    def test_other_types_are_refused(self, path: Path, root: Path) -> None:
        save_file({name: tensor.double() for name, tensor in load_file(path).items()}, path)
        with pytest.raises(StartMismatch, match=r"of another dtype: blocks.0.attention.out.weight \(float64 in it, float32 here\)"):
            begun(config_of(path), root)


FOREIGN_FIELDS: dict[str, dict[str, Any]] = {
    "gpt2": {"kind": "gpt", "bias": True, "activation": "gelu_tanh"},
    "llama": {"kind": "llama", "kv_heads": 2, "inside": 48, "tied": False},
}


@pytest.mark.slow
class TestFromAFolderOfTransformers:
    @pytest.mark.parametrize("kind", FOREIGN_FIELDS)
    @pytest.mark.parametrize("how", ["whole", "in parts", "half precision", "without the prefix"])
    @torch.no_grad()
    def test_our_model_computes_what_transformers_computes(self, root: Path, tmp_path: Path, kind: str, how: str) -> None:
        folder = foreign_folder(kind, tmp_path / kind, vocabulary=V, shard_size="40kB" if how == "in parts" else "1GB")
        assert (len(list(folder.glob("*.safetensors"))) > 1) == (how == "in parts")
        if how == "half precision":
            rewrite(folder, lambda name, tensor: (name, tensor.bfloat16()))
        theirs = reference(folder)
        if how == "without the prefix":
            rewrite(folder, lambda name, tensor: (name if name.startswith("lm_head") else name.partition(".")[2], tensor))
        config = config_of(folder, model=FOREIGN_FIELDS[kind])
        found, model = values(config, root, ranks=3), model_of(config).eval()
        for name, parameter in model.named_parameters():
            parameter.copy_(found[name])
        ids = torch.randint(V, (3, 12), generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
    def test_models_of_transformers_take_their_own_names(self, root: Path, tmp_path: Path, kind: str) -> None:
        folder = foreign_folder(kind, tmp_path / kind, vocabulary=V)
        config = config_of(folder, model={"kind": "hf", "folder": str(folder)})
        theirs = {name: parameter.detach() for name, parameter in reference(folder).named_parameters()}
        assert equal(values(config, root, ranks=2), theirs)

    def test_buffers_that_older_versions_saved_are_passed_over(self, root: Path, tmp_path: Path) -> None:
        folder = foreign_folder("gpt2", tmp_path / "gpt2", vocabulary=V)
        tensors = load_file(folder / "model.safetensors")
        tensors |= {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 16, 16) for layer in range(2)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        assert values(config_of(folder, model=FOREIGN_FIELDS["gpt2"]), root)


def rewrite(folder: Path, change: Callable[[str, Tensor], tuple[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    tensors = dict(change(name, tensor) for name, tensor in load_file(path).items())
    save_file(tensors, path, metadata={"format": "pt"})
