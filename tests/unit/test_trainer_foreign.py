"""Runs that begin with what others learnt, are stopped and go on; and what leaves them, in the forms of other tools."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import foreign_folder, reference
from safetensors import safe_open
from safetensors.torch import load_file
from sharded_state import same_bits
from torch import Tensor
from trainer_ranks import TINY, commit, train_ranks, write_log
from typer.testing import CliRunner

from keepstep.orchestrator.cli import app
from keepstep.orchestrator.errors import InputError
from keepstep.storage.steps import read_steps
from keepstep.storage.store import Store
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.export import export
from keepstep.trainer.generate import generate
from keepstep.trainer.models import is_lora
from keepstep.trainer.replay import Stretch, replay
from keepstep.trainer.sampling import Sampling
from keepstep.trainer.trained import load_trained

pytestmark = pytest.mark.slow

STEPS = 4
GPT2 = {"layers": 2, "width": 32, "heads": 4, "context": 16, "dropout": 0.1, "bias": True, "activation": "gelu_tanh"}
LORA = {"rank": 2, "dropout": 0.1, "layers": ["*.qkv", "*.up"]}


def text(folder: Path) -> Path:
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text("Call me Ishmael. Some years ago - never mind how long precisely - having little money. " * 9)
    return folder


def sections(root: Path, source: Path, **changed: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run.toml."""
    made: dict[str, Any] = TINY | {
        "run": {"root": str(root), "steps": STEPS},
        "data": {"source": str(source), "tokenizer": "bytes"},
        "checkpoint": {"interval": 2},
        "trace": {"interval": 1},
    }
    return made | {name: {**made.get(name, {}), **keys} for name, keys in changed.items()}


def trained(root: Path, config: dict[str, Any], *, world_size: int = 2, stop_at: int = 0) -> Path:
    """Finished, with commits at steps 2 and 4; or stopped, and resumed from step 2."""
    root.mkdir()
    (root / "run.toml").write_text(toml(config))
    train_ranks(root, config, world_size=world_size, stop_at=stop_at)
    folders = [next(root.glob(f"data/a000001/s{step:09d}-*")) for step in (2, *(() if stop_at else (STEPS,)))]
    made = [commit(root, str(folder.relative_to(root))) for folder in folders]
    if stop_at:
        train_ranks(root, config, world_size=world_size, attempt=2, resume=made[0])
        folder = next(root.glob(f"data/a000002/s{STEPS:09d}-*"))
        made.append(commit(root, str(folder.relative_to(root))))
    write_log(root, world_size, made)
    return root


def toml(config: Mapping[str, Mapping[str, Any]]) -> str:
    import tomli_w

    return tomli_w.dumps(config)


def digests(root: Path, attempt: int = 1) -> dict[str, str]:
    """Of the final state."""
    (folder,) = root.glob(f"data/a{attempt:06d}/s{STEPS:09d}-*")
    result = json.loads((folder / "rank-00000.json").read_text())["state"]["result"]
    return {name: value for name, value in result.items() if name.endswith("sha256")}


def of_step(root: Path, step: int) -> Mapping[str, Tensor]:
    return {name: parameter.detach() for name, parameter in load_trained(str(root), step).model.named_parameters()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text(tmp_path_factory.mktemp("source") / "text")


@pytest.fixture(scope="module")
def base(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base") / "root"
    return trained(root, sections(root, source, model=GPT2))


@pytest.fixture(scope="module")
def tuned(base: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapted with LoRA."""
    root = tmp_path_factory.mktemp("tuned") / "root"
    return trained(root, tuning(root, source, base))


def tuning(root: Path, source: Path, base: Path, **cluster: Any) -> dict[str, Any]:
    return sections(root, source, model=GPT2, train={"start": f"{base}@2", "lora": LORA}, cluster=cluster)


class TestFineTuning:
    def test_the_base_stays_what_it_is_and_the_adaptation_learns(self, base: Path, tuned: Path) -> None:
        before, after = of_step(base, 2), of_step(tuned, STEPS)
        assert {name for name in after if not is_lora(name)} == before.keys()
        assert all(same_bits(after[name], before[name]) for name in before)
        assert all(bool(after[name].any()) for name in after if is_lora(name))

    def test_its_checkpoints_hold_moments_of_what_is_trained_alone(self, tuned: Path) -> None:
        names = {entry["name"] for entry in json.loads(next(tuned.glob("data/*/*/rank-00000.json")).read_text())["tensors"]}
        moments = {name.split(".", 1)[1].rpartition(".")[0] for name in names if name.startswith("optimizer.")}
        assert moments
        assert all(map(is_lora, moments))

    def test_stopped_and_resumed_it_ends_with_the_same_bits(self, base: Path, tuned: Path, source: Path, tmp_path: Path) -> None:
        root = tmp_path / "stopped"
        trained(root, tuning(root, source, base), stop_at=3)
        assert digests(root, attempt=2) == digests(tuned)
        assert len(digests(tuned)) >= 3

    def test_exact_reduction_has_the_same_bits_in_any_world(self, base: Path, source: Path, tmp_path: Path) -> None:
        found = set()
        for size in (1, 2, 3):
            root = tmp_path / f"of-{size}"
            trained(root, tuning(root, source, base, exact_reduction=True, logical_ranks=2), world_size=size)
            found.add((digests(root)["model_sha256"], digests(root)["optimizer_sha256"]))
        assert len(found) == 1

    @pytest.mark.parametrize("on_one_process", [False, True])
    def test_its_first_steps_are_computed_again_to_the_bit(self, tuned: Path, base: Path, source: Path, on_one_process: bool) -> None:
        config = TrainerConfig.model_validate(tuning(tuned, source, base))
        found = replay([Stretch(config=config, attempt=1, world_size=2, after=0, last=3, threads=1)], None, on_one_process=on_one_process)
        recorded = {record["step"]: record["loss_hex"] for record in read_steps(Store.open(tuned))[1]}
        assert {step: record["loss_hex"] for step, record in found.records.items()} == {step: recorded[step] for step in (1, 2, 3)}

    def test_half_precision_micro_batches_and_resharding_leave_the_base_alone(self, base: Path, source: Path, tmp_path: Path) -> None:
        config, root = tuning(tmp_path / "root", source, base), tmp_path / "root"
        config["train"] |= {"precision": "bf16", "micro_batch_samples": 1, "reshard": True}
        trained(root, config, stop_at=3)
        before, after = of_step(base, 2), of_step(root, STEPS)
        assert all(same_bits(after[name], before[name]) for name in before)
        assert any(bool(after[name].any()) for name in after if name.endswith("lora_b"))

    @torch.no_grad()
    def test_text_comes_from_the_adapted_model(self, tuned: Path) -> None:
        model, ids = load_trained(str(tuned)).model, list(b"Call")
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        written = "".join(new for (new,) in generate(str(tuned), ["Call"], max_tokens=6, sampling=Sampling(temperature=0)))
        assert written == bytes(ids).decode()


class TestExport:
    @torch.no_grad()
    def test_a_merged_file_has_the_names_of_the_model_and_computes_the_same(self, tuned: Path, base: Path, tmp_path: Path) -> None:
        made = export(str(tuned), tmp_path / "m.safetensors", merged=True)
        tensors = load_file(tmp_path / "m.safetensors")
        assert tensors.keys() == of_step(base, 2).keys()
        assert made.num_tensors == len(tensors)
        adapted, plain = load_trained(str(tuned)).model, load_trained(str(base)).model
        plain.load_state_dict(tensors)
        ids = torch.randint(257, (2, 12), generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(plain(ids), adapted(ids), atol=1e-5, rtol=1e-5)

    def test_without_merging_the_file_has_the_adaptation_beside_the_base(self, tuned: Path, tmp_path: Path) -> None:
        export(str(tuned), tmp_path / "m.safetensors")
        assert load_file(tmp_path / "m.safetensors").keys() == of_step(tuned, STEPS).keys()

    @pytest.mark.parametrize(
        ("model", "vocabulary"),
        [
            (GPT2, 0),
            ({**GPT2, "bias": False, "activation": "gelu", "tied": False}, 512),
            ({"kind": "llama", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": 16, "bias": True, "rope_base": 500.0}, 0),
            ({"kind": "llama", "layers": 1, "width": 32, "heads": 2, "context": 16, "tied": False}, 512),
        ],
        ids=["gpt2", "gpt", "llama with biases", "llama"],
    )
    @torch.no_grad()
    def test_transformers_computes_what_our_model_computes(
        self, source: Path, tmp_path: Path, model: dict[str, Any], vocabulary: int
    ) -> None:
        root, out = tmp_path / "root", tmp_path / "out"
        data = {"tokenizer": "bpe", "vocabulary": vocabulary} if vocabulary else {}
        trained(root, sections(root, source, model=model, data=data), world_size=1)
        export(str(root), out, form="hf")
        ours = load_trained(str(root))
        ids = torch.randint(250, (3, 12), generator=torch.Generator().manual_seed(2))
        theirs = reference(out)
        torch.testing.assert_close(theirs(ids).logits, ours.model(ids), atol=1e-5, rtol=1e-5)
        with safe_open(out / "model.safetensors", "pt") as opened:
            assert opened.metadata()["step"] == str(STEPS)
        assert (out / "tokenizer.json").exists() == bool(vocabulary)
        if vocabulary:
            from transformers import AutoTokenizer

            tokenizer, sentence = AutoTokenizer.from_pretrained(out, local_files_only=True), "Call me Ishmael.  Never mind!"
            assert tokenizer(sentence)["input_ids"] == list(ours.tokens.tokenizer.encode_all([sentence])[0])
            assert tokenizer.decode(tokenizer(sentence)["input_ids"]) == sentence
            assert tokenizer.eos_token_id == ours.tokens.tokenizer.end_of_text == theirs.config.eos_token_id

    @torch.no_grad()
    def test_what_was_adapted_is_merged(self, tuned: Path, tmp_path: Path) -> None:
        result = CliRunner().invoke(app, ["checkpoints", "export", str(tuned), "--format", "hf", "--out", str(tmp_path / "out")])
        assert result.exit_code == 0, result.output
        assert f"step {STEPS} of " in result.stdout
        ids = torch.randint(257, (2, 12), generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(reference(tmp_path / "out")(ids).logits, load_trained(str(tuned)).model(ids), atol=1e-5, rtol=1e-5)

    def test_an_exported_folder_is_a_start(self, base: Path, source: Path, tmp_path: Path) -> None:
        export(str(base), tmp_path / "out", form="hf", step=2)
        root = tmp_path / "root"
        config = sections(root, source, model=GPT2, train={"start": str(tmp_path / "out"), "freeze": ["tokens.*", "blocks.*"]})
        trained(root, config, world_size=2)
        before, after = of_step(base, 2), of_step(root, STEPS)
        assert {name for name in before if not same_bits(before[name], after[name])} == {"positions.weight", "norm.weight", "norm.bias"}

    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            ({"form": "hf", "parts": ["optimizer"]}, "a folder of transformers holds the whole model and nothing else"),
            ({"form": "hf", "partial": ["model.*"]}, "a folder of transformers holds the whole model and nothing else"),
            ({"merged": True}, "--merge: this run has no LoRA"),
            ({"merged": True, "form": "dcp"}, "--merge is for --format safetensors, torch and hf"),
        ],
    )
    def test_what_cannot_be_is_refused(self, base: Path, tmp_path: Path, wrong: dict[str, Any], says: str) -> None:
        with pytest.raises(ValueError, match=says):
            export(str(base), tmp_path / "x", **wrong)
        assert not list(tmp_path.iterdir())

    def test_a_kind_that_transformers_does_not_have_is_refused(self, source: Path, tmp_path: Path) -> None:
        root = tmp_path / "root"
        trained(root, sections(root, source, model={"kind": "lstm", "layers": 1, "width": 16, "context": 16}), world_size=1)
        with pytest.raises(ValueError, match=r'transformers has no model that computes what model.kind = "lstm" computes'):
            export(str(root), tmp_path / "x", form="hf")


class TestModelsOfTransformers:
    @torch.no_grad()
    @pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
    def test_trained_on_two_ranks_and_exported_transformers_computes_the_same(self, source: Path, tmp_path: Path, kind: str) -> None:
        folder, root = foreign_folder(kind, tmp_path / kind, vocabulary=300), tmp_path / "root"
        config = sections(root, source, model={"kind": "hf", "folder": str(folder)}, train={"start": str(folder)})
        trained(root, config, stop_at=3)
        before = {name: parameter.detach() for name, parameter in reference(folder).named_parameters()}
        (folder / "config.json").unlink()  # the run has its own
        after = of_step(root, STEPS)
        assert after.keys() == before.keys()
        assert not any(same_bits(after[name], before[name]) for name in before if not name.endswith("k_proj.bias"))
        export(str(root), tmp_path / "out", form="hf")
        ids = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(2))
        assert torch.equal(reference(tmp_path / "out")(ids).logits, load_trained(str(root)).model(ids))
        written = "".join(new for (new,) in generate(str(root), ["Call"], max_tokens=6, sampling=Sampling(temperature=0)))
        assert written.startswith("Call")

    def test_exact_reduction_has_the_same_bits_in_any_world(self, source: Path, tmp_path: Path) -> None:
        folder, found = foreign_folder("qwen2", tmp_path / "qwen2", vocabulary=300), set()
        for size in (1, 2):
            root = tmp_path / f"of-{size}"
            model, cluster = {"kind": "hf", "folder": str(folder)}, {"exact_reduction": True, "logical_ranks": 2}
            lora = {"rank": 2, "layers": ["*.q_proj", "*.down_proj"]}
            config = sections(root, source, model=model, cluster=cluster, train={"start": str(folder), "precision": "bf16", "lora": lora})
            trained(root, config, world_size=size)
            found.add((digests(root)["model_sha256"], digests(root)["optimizer_sha256"]))
        assert len(found) == 1

    def test_a_folder_that_is_gone_is_named_before_anything_is_prepared(self, source: Path, tmp_path: Path) -> None:
        root = tmp_path / "root"
        root.mkdir()
        config = sections(root, source, model={"kind": "hf", "folder": str(tmp_path / "nowhere")})
        with pytest.raises(AssertionError, match=r"holds no config\.json that can be read"):
            train_ranks(root, config, world_size=1)
        assert not (root / "tokens").exists()


def test_a_start_that_is_not_there_is_named_before_anything_is_prepared(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(AssertionError, match=r"nowhere.*: neither a run"):
        train_ranks(root, sections(root, source, train={"start": str(tmp_path / "nowhere")}), world_size=1)
    assert not (root / "tokens").exists()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"train": {"start": "nowhere.safetensors"}}, "nowhere.safetensors: No such file"),
        ({"model": {"kind": "hf", "folder": "nowhere"}}, 'model.folder = "nowhere" holds no config.json'),
    ],
)
def test_so_it_is_by_the_command_line(source: Path, tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    (tmp_path / "run.toml").write_text(toml(sections(tmp_path / "root", source, **changed)))
    result = CliRunner().invoke(app, ["prepare", str(tmp_path / "run.toml")])
    assert isinstance(result.exception, InputError)
    assert says in str(result.exception)
    assert not (tmp_path / "root/tokens").exists()


def test_another_vocabulary_is_named_when_the_text_is_prepared(source: Path, base: Path, tmp_path: Path) -> None:
    data = {"tokenizer": "bpe", "vocabulary": 600}
    (tmp_path / "run.toml").write_text(toml(sections(tmp_path / "root", source, model=GPT2, data=data, train={"start": str(base)})))
    result = CliRunner().invoke(app, ["prepare", str(tmp_path / "run.toml")])
    assert isinstance(result.exception, InputError)
    assert "the checkpoint has 257 tokens, and the data " in str(result.exception)
    assert f'use its tokenizer, data.tokenizer = "{base}"' in str(result.exception)
    assert not (tmp_path / "root/start.json").exists()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model": GPT2 | {"heads": 2}}, "it has model.heads = 4, here 2"),
        ({"model": GPT2 | {"activation": "gelu"}}, 'it has model.activation = "gelu_tanh", here "gelu"'),
        ({"model": {"kind": "llama", "heads": 4}}, 'it has model.kind = "gpt", here "llama"'),
        ({"model": GPT2, "train": {"lora": LORA | {"alpha": 64.0}}}, "it has train.lora.alpha = 16, here 64"),
    ],
)
def test_a_run_that_computes_something_else_with_equal_shapes_is_refused(
    source: Path, tuned: Path, tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    changed = changed | {"train": {"start": str(tuned)} | changed.get("train", {})}
    (tmp_path / "run.toml").write_text(toml(sections(tmp_path / "root", source, **changed)))
    result = CliRunner().invoke(app, ["prepare", str(tmp_path / "run.toml")])
    assert isinstance(result.exception, InputError), result.output
    assert says in str(result.exception)
    assert "Set [model] and [train.lora] so" in str(result.exception)


def test_another_tokenizer_of_the_same_size_is_refused_and_its_own_is_not(tmp_path: Path) -> None:
    source = text(tmp_path / "text")
    other = tmp_path / "other.txt"
    other.write_text("Whenever it is a damp, drizzly November in my soul, I account it high time to get to sea.\n\n" * 400)
    data = {"tokenizer": "bpe", "vocabulary": 300, "held_out": 0.2}
    base = trained(tmp_path / "base", sections(tmp_path / "base", source, data=data), world_size=1)
    for tokenizer, refused in (("bpe", True), (str(base), False)):
        mine = sections(tmp_path / "root", other, data=data | {"tokenizer": tokenizer}, train={"start": str(base)})
        (tmp_path / "run.toml").write_text(toml(mine))
        result = CliRunner().invoke(app, ["prepare", str(tmp_path / "run.toml")])
        if refused:
            again = CliRunner().invoke(app, ["prepare", str(tmp_path / "run.toml")])
            assert str(again.exception) == str(result.exception), "not only the first time"
            assert f'learnt other tokens, though equally many: use its tokenizer, data.tokenizer = "{base}"' in str(result.exception)
            shutil.rmtree(tmp_path / "root")
        else:
            assert result.exit_code == 0, result.exception


def test_a_run_that_learnt_no_classes_names_none(base: Path) -> None:
    result = CliRunner().invoke(app, ["classify", str(base), "--text", "Call"])
    assert isinstance(result.exception, InputError)
    assert "this run did not learn classes; use `keepstep generate`" in str(result.exception)
