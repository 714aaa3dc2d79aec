"""What a run begins with, where train.start names something: found, described, and decided once. Torch-free.

    ROOT, ROOT@STEP            a committed checkpoint of another run
    FILE.safetensors           with the names of our models, as `keepstep checkpoints export` writes them, or those of transformers
    FOLDER                     of Hugging Face transformers: config.json, and model.safetensors or its parts

Either becomes a manifest: names, shapes and places of tensors, and hashes of the blocks that hold them. So all of them are read, and
every byte verified, by what reads checkpoints. Rank 0 writes into start.json which checkpoint or which bytes it was, before the first
step: whoever begins again from nothing begins with the same, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import math
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias

from keepstep.storage.canonical import seal, unseal
from keepstep.storage.errors import CorruptRecord, DamagedCheckpoint, NotFound, StoreError
from keepstep.storage.layout import RUN_CONFIG_KEY
from keepstep.storage.manifest import BLOCK_BYTES, FileEntry, Manifest, RankIndex, TensorEntry, hash_block
from keepstep.storage.records import Commit
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store
from keepstep.storage.verify import CheckpointReader, read_manifest

START_KEY: Final = "start.json"
PART: Final = "model."  # of the names of tensors, as in a checkpoint

_FORMAT: Final = 1
_CONFIG: Final = "config.json"
_WEIGHTS: Final = "model.safetensors"
_INDEX: Final = f"{_WEIGHTS}.index.json"
_MAX_HEADER_BYTES: Final = 100 << 20  # safetensors' own limit
_DTYPES: Final = {"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "I64": ("int64", 8)}
EMBEDDINGS: Final = ("tokens.weight", "transformer.wte.weight", "wte.weight", "model.embed_tokens.weight", "embed_tokens.weight")
_STEP: Final = re.compile(r"^(.+)@(\d+)$")

Alive = Callable[[], None]
Wanted: TypeAlias = int | Literal["best"] | None  # a committed step, that of the best evaluation, the newest one


@dataclass(frozen=True)
class Origin:
    """Where initial values come from.

    Attributes:
        start: train.start as it was written.
        store, directory: where the files are; directory "" is the store's own folder.
        manifest: of the files; all its tensors begin with PART. From files, their block hashes are missing until `hashed`.
        manifest_sha256: of a checkpoint; "" for files.
        settings: the config.json beside files, where there is one.
        digests: SHA-256 by file, of files.
    """

    start: str
    store: Store
    directory: str
    manifest: Manifest
    manifest_sha256: str
    settings: Mapping[str, Any] | None
    digests: Mapping[str, str]

    @cached_property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """By name without PART; of a tensor in several chunks the first one, which knows the global shape."""
        entries = (entry for rank in self.manifest.ranks for entry in rank.tensors)
        found: dict[str, TensorEntry] = {}
        for entry in entries:
            found.setdefault(entry.name.removeprefix(PART), entry)
        return found

    @property
    def is_run(self) -> bool:
        return bool(self.manifest_sha256)

    @property
    def name(self) -> str:
        """For messages."""
        return f"train.start = {json.dumps(self.start, ensure_ascii=False)}" + (f" (step {self.manifest.step})" if self.is_run else "")

    def reader(self, alive: Alive = lambda: None) -> CheckpointReader:
        return CheckpointReader(self.store, self.directory, self.manifest, alive=alive)

    def hashed(self, alive: Alive = lambda: None) -> Origin:
        """With the hashes of all bytes, which are read for that; a checkpoint has them."""
        if self.is_run:
            return self
        made = [_hashed(self.store, file, alive) for file in self.manifest.files.values()]
        return replace(self, manifest=_with_files(self.manifest, [file for file, _ in made]), digests={f.name: sha for f, sha in made})

    def body(self) -> bytes:
        """start.json."""
        if self.is_run:
            of: dict[str, Any] = {"step": self.manifest.step, "directory": self.directory, "manifest_sha256": self.manifest_sha256}
        else:
            of = {"files": [{**asdict(file), "sha256": self.digests[file.name]} for file in self.manifest.files.values()]}
        return seal({"format": _FORMAT, "start": self.start, "where": self.store.name, **of})


def locate(start: str) -> Origin:
    """What train.start means now. Reads descriptions only.

    Raises:
        ValueError: nothing is there, or nothing that a model can begin with.
    """
    key = f"train.start = {json.dumps(start, ensure_ascii=False)}"
    try:
        if start.endswith(".safetensors"):
            folder, name = posixpath.split(start)
            return _from_files(start, Store.open(folder or "."), [name])
        return _from_folder_or_run(start)
    except NotFound as error:
        raise ValueError(f"{key}: {error}") from error
    except (StoreError, DamagedCheckpoint) as error:
        raise ValueError(f"{key} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def recall(store: Store, start: str) -> Origin | None:
    """What the run of this root began with, or was about to; None where nothing was decided yet.

    Raises:
        ValueError: it was something else than `start`, or is no more what it was.
    """
    try:
        fields = unseal(store.get(START_KEY), START_KEY)
    except NotFound:
        return None
    except CorruptRecord as error:
        raise ValueError(f"{store.name}: {error}; delete it if nothing is committed yet, else choose another run.root") from None
    if fields.get("format") != _FORMAT:
        raise ValueError(f"{store.name}/{START_KEY} is not of format {_FORMAT}: go on with the keepstep that wrote it")
    if fields["start"] != start:
        raise ValueError(
            f"train.start = {json.dumps(start)}, but this run began with {json.dumps(fields['start'])} ({START_KEY} in its root): "
            "choose another run.root"
        )
    return _recalled(fields)


def look(store: Store, start: str) -> None:
    """Before anything is prepared below a root. Raises ValueError where `start` names nothing that a model can begin with; "" may."""
    if start and recall(store, start) is None:
        locate(start)


def other_vocabulary(origin: Origin, there: int, here: int, names: Sequence[str]) -> str:
    """The sentence for it, with the remedy."""
    tokenizer = f'data.tokenizer = "{origin.start}"' if origin.is_run else "the tokenizer.json that belongs to it,"
    return (
        f"the checkpoint has {there} tokens, and the data {here} ({', '.join(names)}): use its tokenizer, {tokenizer} "
        "in another run.root; or name these tensors in train.start_without"
    )


def commit_of_step(store: Store, step: Wanted) -> Commit:
    """The usable commit of a step, for None the newest. Raises ValueError where there is none, naming those that are there."""
    lineage = RunLog.open(store).lineage
    usable = [commit for commit in lineage.commits if lineage.is_usable(commit)]
    if not usable:
        raise ValueError(f"{store.name} holds no committed checkpoint yet")
    if step is None:
        return usable[-1]
    if step == "best":
        if best := lineage.best():
            return best
        raise ValueError(
            f"{store.name} has no checkpoint of a best evaluation: a run with evaluate.patience has one, unless it is damaged; name a step"
        )
    found = next((commit for commit in usable if commit.step == step), None)
    if found is None:
        raise ValueError(f"step {step} is not committed in {store.name}; committed are {', '.join(str(commit.step) for commit in usable)}")
    return found


def _from_folder_or_run(start: str) -> Origin:
    at_step = _STEP.match(start)
    for root, step in ((at_step[1], int(at_step[2])), (start, None)) if at_step else ((start, None),):
        store = Store.open(root)
        if store.exists(RUN_CONFIG_KEY):
            return _from_run(start, store, step)
    if not store.exists(_CONFIG):
        raise ValueError(
            f"neither a run ({RUN_CONFIG_KEY}) nor a model of Hugging Face transformers ({_CONFIG}) is there, nor is it a .safetensors file"
        )
    if store.exists(_INDEX):
        names = sorted(set(_json(store, _INDEX)["weight_map"].values()))
    elif store.exists(_WEIGHTS):
        names = [_WEIGHTS]
    else:
        raise ValueError(f"{store.name} has a {_CONFIG}, but neither {_WEIGHTS} nor {_INDEX}: save the model with safe serialization")
    return _from_files(start, store, names)


def _from_run(start: str, store: Store, step: int | None) -> Origin:
    commit = commit_of_step(store, step)
    return _checkpoint(start, store, commit.directory, commit.manifest_sha256)


def _checkpoint(start: str, store: Store, directory: str, manifest_sha256: str) -> Origin:
    """Of a checkpoint its model alone."""
    manifest = read_manifest(store, directory, manifest_sha256)
    ranks = (replace(rank, tensors=tuple(entry for entry in rank.tensors if entry.name.startswith(PART))) for rank in manifest.ranks)
    return Origin(start, store, directory, replace(manifest, ranks=tuple(ranks)), manifest_sha256, None, {})


def _recalled(fields: Mapping[str, Any]) -> Origin:
    start, gone = fields["start"], f"train.start = {json.dumps(fields['start'])}: what this run began with ({START_KEY} in its root)"
    try:
        store = Store.open(fields["where"])
        if "directory" in fields:
            return _checkpoint(start, store, fields["directory"], fields["manifest_sha256"])
        known = [FileEntry(**{**file, "hashes": tuple(file["hashes"])}) for file in map(_without_digest, fields["files"])]
        origin = _from_files(start, store, [file.name for file in known])
    except (StoreError, DamagedCheckpoint) as error:
        raise ValueError(f"{gone} cannot be read any more: {error}") from error
    sizes = {file.name: file.num_bytes for file in known}
    if changed := [name for name, file in origin.manifest.files.items() if sizes[name] != file.num_bytes]:
        raise ValueError(f"{gone} has changed: {changed[0]} had {sizes[changed[0]]} bytes")
    return replace(origin, manifest=_with_files(origin.manifest, known), digests={file["name"]: file["sha256"] for file in fields["files"]})


def _without_digest(file: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in file.items() if key != "sha256"}


def _from_files(start: str, store: Store, names: Sequence[str]) -> Origin:
    described = [_described(store, name) for name in names]
    tensors = tuple(entry for _, entries in described for entry in entries)
    if len({entry.name for entry in tensors}) != len(tensors):
        raise ValueError(f"{store.name}: a tensor stands in several of its files")
    index = RankIndex(attempt=0, step=0, rank=0, world_size=1, directory="", files=tuple(file for file, _ in described), tensors=tensors)
    manifest = Manifest(attempt=0, step=0, directory="", world_size=1, ranks=(index,))
    settings = _json(store, _CONFIG) if store.exists(_CONFIG) else None
    return Origin(start, store, "", manifest, "", settings, {})


def _json(store: Store, key: str) -> dict[str, Any]:
    try:
        fields = json.loads(store.get(key))
    except ValueError as error:
        raise ValueError(f"{store.name}/{key} is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{store.name}/{key} is no JSON object")
    return fields


def _described(store: Store, name: str) -> tuple[FileEntry, list[TensorEntry]]:
    """A safetensors file by its header: eight bytes of length, and that much JSON. Raises ValueError where it is none."""
    size, where = store.size(name), f"{store.name}/{name}"
    length = int.from_bytes(store.get_range(name, 0, 8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise ValueError(f"{where} is no safetensors file, or was cut off")
    try:
        header = json.loads(store.get_range(name, 8, length))
        header.pop("__metadata__", None)
        entries = [_entry(name, tensor, fields, 8 + length) for tensor, fields in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is no safetensors file: {error}") from None
    if over := [entry for entry in entries if entry.offset + entry.num_bytes > size]:
        raise ValueError(f"{where} was cut off: it has {size} bytes, and {over[0].name.removeprefix(PART)} lies behind them")
    return FileEntry(name=name, num_bytes=size, hashes=()), entries


def _entry(file: str, name: str, fields: Mapping[str, Any], data_start: int) -> TensorEntry:
    first, last = fields["data_offsets"]
    shape = tuple(int(size) for size in fields["shape"])
    dtype, itemsize = _DTYPES.get(fields["dtype"], (str(fields["dtype"]), 0))
    if first < 0 or last < first or (itemsize and last - first != math.prod(shape) * itemsize):
        raise ValueError(f"{name} of {fields['dtype']} {list(shape)} stands from byte {first} to {last}")
    return TensorEntry(
        name=PART + name,
        file=file,
        offset=data_start + first,
        num_bytes=last - first,
        dtype=dtype,
        shape=shape,
        starts=(0,) * len(shape),
        global_shape=shape,
    )


def _with_files(manifest: Manifest, files: Sequence[FileEntry]) -> Manifest:
    (rank,) = manifest.ranks
    return replace(manifest, ranks=(replace(rank, files=tuple(files)),))


def _hashed(store: Store, file: FileEntry, alive: Alive) -> tuple[FileEntry, str]:
    """(with the hash of each block, SHA-256 of all of them)."""
    sha, hashes = hashlib.sha256(), list[str]()
    for block in _blocks(store, file):
        sha.update(block)
        hashes.append(hash_block(block))
        alive()
    return replace(file, hashes=tuple(hashes), block_bytes=BLOCK_BYTES), sha.hexdigest()


def _blocks(store: Store, file: FileEntry) -> Iterator[bytes]:
    for start in range(0, file.num_bytes, BLOCK_BYTES):
        yield store.get_range(file.name, start, min(BLOCK_BYTES, file.num_bytes - start))
