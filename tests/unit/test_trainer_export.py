"""Checkpoints for other tools: what comes out is what was committed, bit for bit, or nothing."""

from __future__ import annotations

import io
import pickle
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from sharded_state import STEP, folder_of, same_bits, save_in_turn, whole_state
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, MetadataIndex
from trainer_ranks import manifest_of
from typer.testing import CliRunner

from keepstep.orchestrator.cli import app
from keepstep.orchestrator.errors import InputError
from keepstep.storage.errors import DamagedCheckpoint, StoreFull
from keepstep.storage.manifest import Manifest
from keepstep.trainer import export as exporting
from keepstep.trainer.contract import Resume
from keepstep.trainer.export import export
from keepstep.trainer.metadata import _Restricted, check_metadata, read_metadata
from keepstep.trainer.state import flatten


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module", autouse=True)
def saved(root: Path) -> Resume:
    """A commit of two ranks, with tensors that are cut unevenly."""
    (root / "run.toml").write_text("")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return save_in_turn(root, 2, monkeypatch)


def equal(found: dict[str, torch.Tensor], expected: dict[str, Any]) -> bool:
    flat = flatten(expected)
    return found.keys() == flat.keys() and all(same_bits(found[name], flat[name]) for name in flat)


def test_a_safetensors_file_holds_the_model_and_says_where_it_comes_from(root: Path, saved: Resume, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    made = export(str(root), tmp_path / "new" / "m.safetensors", report=lambda *done: seen.append(done))
    assert equal(load_file(tmp_path / "new" / "m.safetensors"), whole_state()["model"])
    with safe_open(tmp_path / "new" / "m.safetensors", "pt") as opened:
        facts = opened.metadata()
    named = {"run": "test", "step": str(STEP), "attempt": "1", "directory": saved.directory}
    assert facts == {"format": "pt", **named, "manifest_sha256": saved.manifest_sha256}
    assert (made.step, made.directory, made.num_tensors) == (STEP, saved.directory, 5)
    assert (tmp_path / "new" / "m.safetensors").stat().st_mode & 0o777 == 0o644
    assert seen[-1] == (made.num_bytes, made.num_bytes)


def test_several_parts_keep_their_names(root: Path, tmp_path: Path) -> None:
    export(str(root), tmp_path / "all.safetensors", parts=["model", "optimizer"], step=STEP)
    assert equal(load_file(tmp_path / "all.safetensors"), whole_state())


def test_a_file_of_torch_save_needs_no_pickled_code(root: Path, tmp_path: Path) -> None:
    export(str(root), tmp_path / "model.pt", form="torch")
    assert equal(torch.load(tmp_path / "model.pt", weights_only=True), whole_state()["model"])
    export(str(root), tmp_path / "both.pt", form="torch", parts=["optimizer", "model"])
    both = torch.load(tmp_path / "both.pt", weights_only=True)
    assert list(both) == ["optimizer", "model"]
    assert equal(flatten(both), whole_state())


def test_a_dcp_directory_is_loaded_by_stock_torch(root: Path, saved: Resume, tmp_path: Path) -> None:
    made = export(str(root), tmp_path / "dcp", form="dcp")
    files = {path.name: path.read_bytes() for path in (tmp_path / "dcp").iterdir()}
    assert files == {name: (root / saved.directory / name).read_bytes() for name in (".metadata", "__0_0.distcp", "__1_0.distcp")}
    assert made.num_bytes == sum(map(len, files.values()))
    state = {name: torch.zeros_like(tensor) for name, tensor in flatten(whole_state()).items()}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert equal(state, whole_state())


def test_what_is_named_is_left_out(root: Path, tmp_path: Path) -> None:
    made = export(str(root), tmp_path / "m", partial=["model.*.weight"])
    assert made.left_out == ("model.odd.weight", "model.table.weight")
    assert set(load_file(tmp_path / "m")) == {"deep.kernel", "thin.bias", "one.row"}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"form": "onnx"}, "--format onnx is not one of safetensors, torch, dcp"),
        ({"parts": ["ema"]}, "--parts ema is not in step 20, which holds model, optimizer"),
        ({"form": "dcp", "parts": ["model"]}, "a DCP directory is exported whole"),
        ({"form": "dcp", "partial": ["model.*"]}, "a DCP directory is exported whole"),
        ({"partial": ["head.*"]}, r"--partial head.\* matches no tensor; the names are model.deep.kernel, "),
        ({"partial": ["*"]}, "nothing to export"),
        ({"step": 3}, r"step 3 is not committed in .*; committed are 20"),
        ({"out": Path("s3://bucket/x")}, "must be a local path"),
    ],
)
def test_what_cannot_be_is_refused(root: Path, tmp_path: Path, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        export(str(root), wrong.pop("out", tmp_path / "x"), **wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["safetensors", "torch", "dcp"])
class TestAllOrNothing:
    def test_nothing_is_replaced(self, root: Path, tmp_path: Path, form: str) -> None:
        out = tmp_path / "x"
        out.write_text("mine")
        with pytest.raises(ValueError, match="exists, and is not replaced"):
            export(str(root), out, form=form)
        out.unlink()

        def somebody_else(done: int, total: int) -> None:
            if form != "dcp":
                out.write_text("theirs")
            elif not out.exists():
                out.mkdir()
                (out / "theirs").touch()

        with pytest.raises(Exception, match=f"cannot write {out}: "):
            export(str(root), out, form=form, report=somebody_else)
        assert [path.name for path in tmp_path.iterdir()] == ["x"]
        assert (out / "theirs").exists() if form == "dcp" else out.read_text() == "theirs"

    def test_damage_leaves_nothing_behind(self, root: Path, tmp_path: Path, form: str) -> None:
        shard = folder_of(root) / "__1_0.distcp"
        sound = shard.read_bytes()
        shard.write_bytes(sound[:1000] + bytes([sound[1000] ^ 1]) + sound[1001:])
        try:
            with pytest.raises(DamagedCheckpoint, match=r"__1_0.distcp: block 0"):
                export(str(root), tmp_path / "x", form=form)
        finally:
            shard.write_bytes(sound)
        assert not list(tmp_path.iterdir())

    def test_a_full_disk_is_noticed_before_anything_is_written(
        self, root: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(exporting.shutil, "disk_usage", lambda path: usage(100, 90, 10))
        with pytest.raises(StoreFull, match="bytes are needed there, 10 are free"):
            export(str(root), tmp_path / "x", form=form)
        assert not list(tmp_path.iterdir())

    def test_whoever_interrupts_leaves_nothing_behind(self, root: Path, tmp_path: Path, form: str) -> None:
        def interrupt(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            export(str(root), tmp_path / "x", form=form, report=interrupt)
        assert not list(tmp_path.iterdir())


class TestMetadata:
    """A directory leaves only if stock `dcp.load` will find in it what the manifest says."""

    def metadata(self, root: Path, saved: Resume) -> tuple[Metadata, Manifest]:
        return read_metadata((root / saved.directory / ".metadata").read_bytes()), manifest_of(root, saved)

    def test_what_we_write_is_what_the_manifest_says(self, root: Path, saved: Resume) -> None:
        metadata, manifest = self.metadata(root, saved)
        assert len(metadata.state_dict_metadata) == 20
        check_metadata(pickle.dumps(metadata), manifest)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (
                lambda m: m.state_dict_metadata.pop("model.odd.weight"),
                r"does not describe model.odd.weight as the manifest does \(1 tensors",
            ),
            (lambda m: m.state_dict_metadata["model.odd.weight"].chunks.pop(), "does not describe model.odd.weight"),
            (lambda m: move(m, relative_path="__1_0.distcp"), "does not look for model.odd.weight in __0_0.distcp"),
            (lambda m: move(m, offset=1 << 30), r"looks for model.odd.weight at bytes 1073741824 to"),
            (lambda m: m.storage_data.clear(), "does not look for"),
        ],
    )
    def test_any_difference_is_damage(self, root: Path, saved: Resume, change: Callable[[Metadata], object], says: str) -> None:
        metadata, manifest = self.metadata(root, saved)
        change(metadata)
        with pytest.raises(DamagedCheckpoint, match=says):
            check_metadata(pickle.dumps(metadata), manifest)

    def test_the_first_releases_of_python_3_11_write_members_of_enumerations_by_getattr(self) -> None:
        """And nothing else comes by that way."""
        opened = _Restricted(io.BytesIO(pickle.dumps(GetAttribute(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT")))).load()
        assert opened is _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT
        for of, name in ((Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "__init__")):
            with pytest.raises(ValueError, match="cannot be opened"):
                read_metadata(pickle.dumps(GetAttribute(of, name)))

    @pytest.mark.parametrize("body", [b"", b"no pickle", pickle.dumps({"a": 1}), pickle.dumps(print), pickle.dumps(torch.Size([1]))])
    def test_anything_else_is_refused(self, root: Path, saved: Resume, body: bytes) -> None:
        with pytest.raises(DamagedCheckpoint, match=r"\.metadata: (cannot be opened|holds)"):
            check_metadata(body, manifest_of(root, saved))


@dataclass(frozen=True)
class GetAttribute:
    of: type
    name: str

    def __reduce__(self) -> tuple[Any, tuple[type, str]]:
        return getattr, (self.of, self.name)


def move(metadata: Metadata, **where: Any) -> None:
    index = MetadataIndex("model.odd.weight", torch.Size([0, 0]))
    metadata.storage_data[index] = replace(metadata.storage_data[index], **where)


class TestCommand:
    def test_the_command_says_what_it_made(self, root: Path, saved: Resume, tmp_path: Path) -> None:
        out = tmp_path / "m.safetensors"
        options = ["--parts", "model, optimizer", "--partial", "optimizer.*"]
        result = CliRunner().invoke(app, ["checkpoints", "export", str(root), "--out", str(out), *options])
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith(f"step 20 of {saved.directory}: 5 tensors, ")
        assert f"verified, in {out}; left out: optimizer.deep.kernel.exp_avg, " in result.stdout

    def test_a_mistake_is_the_users(self, root: Path, tmp_path: Path) -> None:
        result = CliRunner().invoke(app, ["checkpoints", "export", str(root), "--out", str(tmp_path), "--format", "dcp"])
        assert isinstance(result.exception, InputError)
        assert "exists, and is not replaced" in str(result.exception)
