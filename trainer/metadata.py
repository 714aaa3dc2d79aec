"""DCP's `.metadata`, opened with care: a pickle that is hash-checked first and may construct nothing but what DCP itself puts in.

keepstep never needs it: restoring goes by the manifest (restore.py). It is opened in one place, before a directory is handed to other
tools, because their `dcp.load` finds the tensors through it and unpickles it without asking.
"""

from __future__ import annotations

import enum
import io
import pickle
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from keepstep.storage.errors import DamagedCheckpoint
from keepstep.storage.layout import METADATA_NAME
from keepstep.storage.manifest import Manifest, TensorEntry

from .checkpoint import dtype_name

_DCP: Final = "torch.distributed.checkpoint.metadata"
_ALLOWED: Final = frozenset(
    {
        (_DCP, "Metadata"),
        (_DCP, "MetadataIndex"),
        (_DCP, "ChunkStorageMetadata"),
        (_DCP, "StorageMeta"),
        (_DCP, "TensorProperties"),
        (_DCP, "TensorStorageMetadata"),
        (_DCP, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
    }
)


class _Restricted(pickle.Unpickler):
    """Looks up what DCP's metadata consists of, and torch's dtypes; whatever else a pickle asks for is refused before it is imported."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) == ("builtins", "getattr"):  # the first releases of Python 3.11 write the member of an enumeration so
            return _member
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it would load {module}.{name}, which is no part of DCP's metadata")


def _member(of: Any, name: str) -> enum.Enum:
    if not (isinstance(of, type) and issubclass(of, enum.Enum)):
        raise pickle.UnpicklingError(f"it would load {name} of {of}, which is no part of DCP's metadata")
    return of[name]


def read_metadata(body: bytes) -> Metadata:
    """The metadata in a `.metadata` whose hash was checked. Raises ValueError saying what is wrong; nothing in it is executed."""
    try:
        found = _Restricted(io.BytesIO(body)).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, IndexError, KeyError, ImportError) as error:
        raise ValueError(f"cannot be opened: {error}") from error
    if not isinstance(found, Metadata):
        raise ValueError(f"holds {type(found).__name__}, not DCP's Metadata")
    return found


def check_metadata(body: bytes, manifest: Manifest) -> None:
    """Stock `dcp.load` will find through this `.metadata` every tensor that the manifest describes, where it says, and no others.

    Raises:
        DamagedCheckpoint: it would not, or the pickle is not what DCP writes.
    """
    try:
        metadata = read_metadata(body)
        _check_tensors(metadata, manifest)
        _check_places(metadata.storage_data or {}, manifest)
    except ValueError as error:
        raise DamagedCheckpoint(manifest.directory, METADATA_NAME, str(error)) from error


def _check_tensors(metadata: Metadata, manifest: Manifest) -> None:
    described = {name: _facts(name, what) for name, what in metadata.state_dict_metadata.items()}
    wanted: dict[str, tuple[str, tuple[int, ...], set[Any]]] = {}
    for entry in _entries(manifest):
        _, _, chunks = wanted.setdefault(entry.name, (entry.dtype, tuple(entry.global_shape), set()))
        chunks.add((tuple(entry.starts), tuple(entry.shape)))
    if odd := sorted(name for name in described.keys() | wanted.keys() if described.get(name) != wanted.get(name)):
        raise ValueError(f"does not describe {odd[0]} as the manifest does ({len(odd)} tensors differ)")


def _facts(name: str, what: Any) -> tuple[str, tuple[int, ...], set[Any]]:
    if not isinstance(what, TensorStorageMetadata):
        raise ValueError(f"describes {name} as {type(what).__name__}, not as a tensor")
    return dtype_name(what.properties.dtype), tuple(what.size), {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in what.chunks}


def _check_places(stored: Mapping[MetadataIndex, Any], manifest: Manifest) -> None:
    files = manifest.files
    for entry in _entries(manifest):
        place = stored.get(MetadataIndex(entry.name, torch.Size(entry.starts)))
        if not isinstance(place, _StorageInfo) or place.relative_path != entry.file:
            raise ValueError(f"does not look for {entry.name} in {entry.file}")
        end = place.offset + place.length
        if not 0 <= place.offset <= entry.offset <= entry.offset + entry.num_bytes <= end <= files[entry.file].num_bytes:
            raise ValueError(f"looks for {entry.name} at bytes {place.offset} to {end} of {entry.file}, it begins at {entry.offset}")


def _entries(manifest: Manifest) -> list[TensorEntry]:
    return [entry for rank in manifest.ranks for entry in rank.tensors]
