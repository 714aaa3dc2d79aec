"""A committed checkpoint as a file or a folder for other tools: every byte verified, whole or not at all.

    safetensors  one file; its header says which run, step and manifest it came from
    torch        one file of torch.save, opened with torch.load(..., weights_only=True)
    dcp          the directory as it was committed, for torch.distributed.checkpoint.load
    hf           a folder of Hugging Face transformers, see foreign.py

With one part ("model") the names in a file are the part's own, so that `model.load_state_dict` takes them; with several each name, in the
torch file each dictionary, begins with its part.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from keepstep.storage.errors import StoreError, StoreFull, from_os_error
from keepstep.storage.layout import METADATA_NAME
from keepstep.storage.manifest import FileEntry, Manifest, TensorEntry
from keepstep.storage.put_new import make_directories, sync_directory, temporary_name, write_all
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store
from keepstep.storage.verify import CheckpointReader, Piece, read_manifest

from .foreign import check_kind, write_folder
from .matching import matched
from .metadata import check_metadata
from .models import merge
from .origin import commit_of_step
from .restore import Part, read_parts, whole_chunk
from .trained import Trained, Wanted, load_trained

FORMATS: Final = ("safetensors", "torch", "dcp", "hf")

_STEP_BYTES: Final = 64 << 20  # read between two reports of progress

Report = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    step: int
    directory: str  # that it came from
    num_tensors: int
    num_bytes: int  # of the tensors; of the files for "dcp"
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A committed checkpoint, opened."""

    run: str
    manifest: Manifest
    manifest_sha256: str
    reader: CheckpointReader

    def facts(self) -> dict[str, str]:
        """For the header of a file. "format" is what loaders of safetensors files look for."""
        manifest = self.manifest
        named = {"run": self.run, "step": str(manifest.step), "attempt": str(manifest.attempt), "directory": manifest.directory}
        return {"format": "pt", **named, "manifest_sha256": self.manifest_sha256}


def export(
    root: str,
    out: Path,
    *,
    form: str = "safetensors",
    step: Wanted = None,
    parts: Sequence[str] = (),
    partial: Sequence[str] = (),
    merged: bool = False,
    report: Report = lambda done, total: None,
) -> Exported:
    """Writes a committed checkpoint (None: the newest usable one) to `out`, which must not exist; nothing is there until all of it is.

    A file needs the memory of its tensors, a directory 64 MiB.

    Args:
        form: one of FORMATS.
        parts: first parts of the names ("model", "optimizer"); none: the model, and for "dcp" everything, which cannot be taken apart.
        partial: patterns of the names of tensors that are left out.
        merged: what was learnt by LoRA is put into the weights that it adapts; "hf" always does that.

    Raises:
        ValueError: what was asked for does not exist, does not fit together, or `out` does.
        DamagedCheckpoint: a byte is not what was committed; nothing is left at `out`.
        StoreError: the root cannot be read, or `out` not be written.
    """
    _check(out, form)
    store = Store.open(root)
    commit = commit_of_step(store, step)
    manifest = read_manifest(store, commit.directory, commit.manifest_sha256)
    reader = CheckpointReader(store, commit.directory, manifest)
    run = RunLog.open(store).lineage.run
    source = _Source(run=run, manifest=manifest, manifest_sha256=commit.manifest_sha256, reader=reader)
    parts = _chosen_parts(manifest, form, parts, partial)
    if form == "hf" or merged:
        whole = _whole_model(root, commit.step, form, parts, partial)
        with _translated(out):
            return _export_model(source, whole, out, form)
    with _translated(out):
        if form == "dcp":
            return _export_directory(source, out, report)
        return _export_file(source, out, form, parts, partial, report)


def _check(out: Path, form: str) -> None:
    if form not in FORMATS:
        raise ValueError(f"--format {form} is not one of {', '.join(FORMATS)}")
    if re.match(r"\w+:/", str(out)):  # Path has made one slash of two
        raise ValueError(f"--out {out} must be a local path")
    if out.exists() or out.is_symlink():
        raise ValueError(f"--out {out} exists, and is not replaced: name another one or remove it")


def _chosen_parts(manifest: Manifest, form: str, parts: Sequence[str], partial: Sequence[str]) -> tuple[str, ...]:
    """Raises ValueError for a part that is not there."""
    there = tuple(dict.fromkeys(_part(entry.name) for rank in manifest.ranks for entry in rank.tensors))
    chosen = tuple(dict.fromkeys(parts)) or (there if form == "dcp" else ("model",))
    if unknown := [part for part in chosen if part not in there]:
        raise ValueError(f"--parts {unknown[0]} is not in step {manifest.step}, which holds {', '.join(there)}")
    if form == "hf" and (partial or chosen != ("model",)):
        raise ValueError("a folder of transformers holds the whole model and nothing else: leave out --parts and --partial")
    if form == "dcp" and (partial or set(chosen) != set(there)):
        raise ValueError("a DCP directory is exported whole: choose --format safetensors or torch for parts of it")
    return chosen


def _part(name: str) -> str:
    return name.partition(".")[0]


def _whole_model(root: str, step: int, form: str, parts: Sequence[str], partial: Sequence[str]) -> Trained:
    """Put together as it was trained. Raises ValueError where it cannot be exported so."""
    if form == "dcp" or partial or tuple(parts) != ("model",):
        raise ValueError("--merge is for --format safetensors, torch and hf, of the whole model: leave out --parts and --partial")
    trained = load_trained(root, step)
    if form == "hf":
        check_kind(trained)
    elif not trained.model.adapters:
        raise ValueError("--merge: this run has no LoRA, so there is nothing to merge")
    return trained


def _export_model(source: _Source, trained: Trained, out: Path, form: str) -> Exported:
    _check_room(out, sum(parameter.nbytes for parameter in trained.model.parameters()))
    if form == "hf":
        with _new_directory(out) as temporary:
            tensors = write_folder(trained, temporary, source.facts())
            for path in temporary.iterdir():
                _settle(path)
    else:
        merge(trained.model)
        tensors = {f"model.{name}": parameter.detach() for name, parameter in trained.model.named_parameters()}
        with _new_file(out) as temporary:
            _write(temporary, out, form, tensors, ("model",), source.facts())
    return _exported(source, num_tensors=len(tensors), num_bytes=sum(tensor.nbytes for tensor in tensors.values()))


def _export_file(source: _Source, out: Path, form: str, parts: Sequence[str], partial: Sequence[str], report: Report) -> Exported:
    entries = [entry for rank in source.manifest.ranks for entry in rank.tensors if _part(entry.name) in parts]
    left_out = matched({entry.name for entry in entries}, partial)
    wanted = [entry for entry in entries if entry.name not in left_out]
    if not wanted:
        raise ValueError(f"nothing to export: step {source.manifest.step} has no tensor of {', '.join(parts)} that is not left out")
    _check_room(out, sum(entry.num_bytes for entry in wanted))
    tensors = read_tensors(source.reader, wanted, report)
    with _new_file(out) as temporary:
        _write(temporary, out, form, tensors, parts, source.facts())
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return _exported(source, num_tensors=len(tensors), num_bytes=num_bytes, left_out=tuple(sorted(left_out)))


def _exported(source: _Source, *, num_tensors: int, num_bytes: int, left_out: tuple[str, ...] = ()) -> Exported:
    step, directory = source.manifest.step, source.manifest.directory
    return Exported(step=step, directory=directory, num_tensors=num_tensors, num_bytes=num_bytes, left_out=left_out)


def _write(path: Path, out: Path, form: str, tensors: Mapping[str, Tensor], parts: Sequence[str], facts: Mapping[str, str]) -> None:
    try:
        if form == "safetensors":
            save_file(_named(tensors, parts), path, metadata=dict(facts))
        else:
            with path.open("wb") as file:  # given a path, torch.save derives names in the archive from it
                torch.save(_nested(tensors, parts), file)
    except (SafetensorError, RuntimeError) as error:  # what the two writers raise when the file system fails them
        raise StoreError(f"cannot write {out}: {error}") from error


def read_tensors(reader: CheckpointReader, entries: Sequence[TensorEntry], report: Report = lambda done, total: None) -> dict[str, Tensor]:
    """The unsharded tensors of these chunks, on the CPU, by name. Raises DamagedCheckpoint, StoreError."""
    tensors = {entry.name: torch.empty(entry.global_shape, dtype=getattr(torch, entry.dtype)) for entry in entries}
    parts = [whole_chunk(entry, _box(tensors[entry.name], entry)) for entry in entries]
    done, total = 0, sum(part.num_bytes for part in parts)
    for group in _groups(parts):
        read_parts(reader, group)
        done += sum(part.num_bytes for part in group)
        report(done, total)
    return dict(sorted(tensors.items()))


def _box(tensor: Tensor, entry: TensorEntry) -> Tensor:
    return tensor[tuple(slice(start, start + size) for start, size in zip(entry.starts, entry.shape, strict=True))]


def _groups(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """In the order of the files, so that neighbours share their blocks."""
    group, num_bytes = list[Part](), 0
    for part in sorted(parts, key=lambda part: (part.entry.file, part.offset)):
        group.append(part)
        num_bytes += part.num_bytes
        if num_bytes >= _STEP_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _named(tensors: Mapping[str, Tensor], parts: Sequence[str]) -> dict[str, Tensor]:
    return {name.partition(".")[2] if len(parts) == 1 else name: tensor for name, tensor in tensors.items()}


def _nested(tensors: Mapping[str, Tensor], parts: Sequence[str]) -> dict[str, Any]:
    if len(parts) == 1:
        return _named(tensors, parts)
    return {part: _named({name: t for name, t in tensors.items() if _part(name) == part}, [part]) for part in parts}


def _export_directory(source: _Source, out: Path, report: Report) -> Exported:
    """The committed files, byte for byte. Before they become visible: what `dcp.load` would unpickle was looked into."""
    manifest, reader = source.manifest, source.reader
    if METADATA_NAME not in manifest.files:
        raise ValueError(f"step {manifest.step} has no {METADATA_NAME}: it was not saved as a DCP directory")
    check_metadata(reader.read_file(METADATA_NAME), manifest)
    _check_room(out, manifest.num_bytes)
    with _new_directory(out) as temporary:
        done = 0
        for file in manifest.files.values():
            for num_bytes in _copy(reader, file, temporary / file.name):
                done += num_bytes
                report(done, manifest.num_bytes)
    names = {entry.name for rank in manifest.ranks for entry in rank.tensors}
    return _exported(source, num_tensors=len(names), num_bytes=manifest.num_bytes)


def _check_room(out: Path, num_bytes: int) -> None:
    """Before anything is read: what torch.save says when the disk is full helps nobody."""
    make_directories(out.parent)
    if (free := shutil.disk_usage(out.parent).free) < num_bytes:
        raise StoreFull(f"cannot write {out}: {num_bytes} bytes are needed there, {free} are free")


def _copy(reader: CheckpointReader, file: FileEntry, path: Path) -> Iterator[int]:
    """Yields the bytes of each portion that was verified and written; durable at the end."""
    memory = memoryview(bytearray(min(_STEP_BYTES, file.num_bytes)))
    with path.open("xb", buffering=0) as copy:
        for start in range(0, file.num_bytes, _STEP_BYTES):
            portion = memory[: file.num_bytes - start]
            reader.read_pieces([Piece(file.name, start, portion)])
            write_all(copy.fileno(), portion)
            yield portion.nbytes
        os.fsync(copy.fileno())


@contextlib.contextmanager
def _new_file(out: Path) -> Iterator[Path]:
    """A temporary path for a file that appears at `out`, durable, when all went well; if somebody else made one meanwhile, theirs stays."""
    temporary = out.parent / temporary_name()
    try:
        yield temporary
        _settle(temporary)
        os.link(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(out.parent)


def _settle(path: Path) -> None:
    """Durable, and readable by all: safetensors makes files that only their owner may read."""
    with path.open("rb+") as written:
        os.fchmod(written.fileno(), 0o644)
        os.fsync(written.fileno())


@contextlib.contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """The same for a directory: a rename does not replace one that holds anything."""
    temporary = out.parent / temporary_name()
    temporary.mkdir()
    try:
        yield temporary
        sync_directory(temporary)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # nothing is there after the rename
    sync_directory(out.parent)


@contextlib.contextmanager
def _translated(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise from_os_error(error, f"write {out}") from error
