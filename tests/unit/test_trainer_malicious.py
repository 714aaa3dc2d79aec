"""A checkpoint made by an enemy, committed with the right hashes: whoever reads it executes nothing of it."""

from __future__ import annotations

import io
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from trainer_ranks import TINY, FolderStaging, commit, spec_of, write_log

from keepstep.storage.errors import DamagedCheckpoint
from keepstep.storage.layout import METADATA_NAME
from keepstep.storage.manifest import FileEntry, RankIndex, TensorEntry, hash_blocks
from keepstep.storage.store import Store
from keepstep.storage.verify import verify_checkpoint
from keepstep.trainer.attach import Attached
from keepstep.trainer.checkpoint import Checkpointer
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.contract import Resume
from keepstep.trainer.evaluate import evaluate_root
from keepstep.trainer.export import export
from keepstep.trainer.generate import generate
from keepstep.trainer.metadata import read_metadata
from keepstep.trainer.models import build_model
from keepstep.trainer.optim import ShardOptimizer
from keepstep.trainer.parallel import initialise, join
from keepstep.trainer.preparing import prepare
from keepstep.trainer.restore import resume
from keepstep.trainer.state import NestedTensors, flatten, tensors_of
from keepstep.trainer.tokens import open_tokens

STEP = 20


class Bomb:
    """Unpickled, it makes a directory."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.marker,)


pytestmark = pytest.mark.slow  # the fixture


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one commit, whose .metadata is a bomb and whose every tensor lies beside one."""
    root = tmp_path_factory.mktemp("run")
    (root / "text").mkdir()
    for i in range(4):
        (root / f"text/{i}.txt").write_text("All happy families are alike; each unhappy family is unhappy in its own way. " * 9)
    sections: dict[str, Any] = TINY | {"data": {"source": str(root / "text"), "tokenizer": "bytes"}, "run": {"root": str(root)}}
    write_toml(root / "run.toml", sections)
    config = TrainerConfig.model_validate(sections)
    prepare(config, Store.open(root))
    save(root, new_state(root, config))
    (folder,) = root.glob("data/*/*")
    arm(folder, root / "boom")
    write_log(root, 1, [commit(root, str(folder.relative_to(root)))])
    return root


def write_toml(path: Path, sections: dict[str, dict[str, Any]]) -> None:
    lines = (f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()) for name, keys in sections.items())
    path.write_text("\n".join(lines))


def new_state(root: Path, config: TrainerConfig) -> NestedTensors:
    model = build_model(config.model, open_tokens(Store.open(root)).index.vocabulary)
    initialise(model, seed=1)
    return tensors_of(model, ShardOptimizer(model, config.optimizer))


def save(root: Path, state: NestedTensors) -> None:
    join(Attached(None))
    try:
        staging = FolderStaging(root, attempt=1, rank=0, world_size=1)
        assert Checkpointer(staging, rank=0, attempt=1, nonce="nonce1").save(STEP, state, {"step": STEP})
    finally:
        dist.destroy_process_group()


def arm(folder: Path, marker: Path) -> None:
    """Rewrites a checkpoint: the same tensors, but every pickle in it is a bomb; index and hashes are right."""
    index = RankIndex.parse((folder / "rank-00000.json").read_bytes())
    shard, tensors = armed_shard((folder / "__0_0.distcp").read_bytes(), index.tensors, marker)
    bodies = {"__0_0.distcp": shard, METADATA_NAME: pickle.dumps(Bomb(marker))}
    for name, body in bodies.items():
        (folder / name).write_bytes(body)
    files = tuple(FileEntry(name=name, num_bytes=len(body), hashes=hash_blocks(memoryview(body))) for name, body in bodies.items())
    (folder / "rank-00000.json").write_bytes(replace(index, files=files, tensors=tensors).body())


def armed_shard(shard: bytes, tensors: tuple[TensorEntry, ...], marker: Path) -> tuple[bytes, tuple[TensorEntry, ...]]:
    armed, moved = b"", []
    for entry in tensors:
        raw = shard[entry.offset : entry.offset + entry.num_bytes]
        archive = io.BytesIO()
        tensor = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(entry.shape)
        torch.save((tensor, Bomb(marker)), archive)
        moved.append(replace(entry, offset=len(armed) + archive.getvalue().index(raw)))
        armed += archive.getvalue()
    return armed, tuple(moved)


@pytest.fixture(autouse=True)
def nothing_exploded(root: Path) -> Any:
    yield
    assert not (root / "boom").exists()


def test_the_bombs_are_live(root: Path) -> None:
    """Otherwise this file would prove nothing."""
    (folder,) = root.glob("data/*/*")
    first = RankIndex.parse((folder / "rank-00000.json").read_bytes()).tensors[:1]
    archive, _ = armed_shard((folder / "__0_0.distcp").read_bytes(), first, root / "boom")
    for explode in (
        lambda: pickle.loads((folder / METADATA_NAME).read_bytes()),
        lambda: torch.load(io.BytesIO(archive), weights_only=False),
    ):
        explode()
        (root / "boom").rmdir()


def resume_of(root: Path) -> Resume:
    (folder,) = root.glob("data/*/*")
    return commit(root, str(folder.relative_to(root)))


def test_verifying(root: Path) -> None:
    made = resume_of(root)
    verify_checkpoint(Store.open(root), made.directory, made.manifest_sha256)


def test_resuming(root: Path) -> None:
    config = TrainerConfig.model_validate(TINY)
    expected, mine = flatten(new_state(root, config)), new_state(root, config)
    for tensor in flatten(mine).values():
        tensor.fill_(7.0)
    me = Attached(spec_of(root, 0, 2, resume_of(root)))
    me.__dict__["staging"] = None
    assert resume(me, mine).step == STEP
    assert all(torch.equal(tensor, expected[name]) for name, tensor in flatten(mine).items())


def test_evaluating_and_generating(root: Path) -> None:
    assert evaluate_root(str(root))["step"] == STEP
    first, *_ = generate(str(root), ["All"], max_tokens=3)
    assert first == ["All"]


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_exporting_tensors(root: Path, tmp_path: Path, form: str) -> None:
    export(str(root), tmp_path / "out", form=form, parts=["model", "optimizer"])
    if form == "torch":
        torch.load(tmp_path / "out", weights_only=True)


def test_a_directory_for_other_tools_is_not_made_of_it(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpoint, match=r"\.metadata: cannot be opened: it would load posix.mkdir"):
        export(str(root), tmp_path / "out", form="dcp")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "body",
    [
        b"cos\nsystem\n(S'mkdir boom'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"ctorch.serialization\nload\n(S'x'\ntR.",
        b"\x80\x04\x8c\x29torch.distributed.checkpoint.metadata\x8c\x0bos.getcwd()\x93.",
        b"\x80\x04\x8c\x2btorch.distributed.checkpoint.filesystem\x8c\x09os.system\x93.",
        b"ctorch.distributed.checkpoint.metadata\nMetadata.__init__.__globals__\n.",
        b"csys\nmodules\n.",
        b"\x95",
        b"(" * 100,
    ],
)
def test_no_other_door_is_open(body: bytes) -> None:
    with pytest.raises(ValueError, match="cannot be opened"):
        read_metadata(body)
