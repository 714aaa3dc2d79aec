"""Which files a source of text has, and their bytes: local or behind any fsspec URL, unpacked on the way. Nothing is ever read whole.

A path or URL names one file or a folder; of a folder all files below it count, in the order of their names, hidden ones (".name") excepted.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any, Final

from keepstep.storage.canonical import canonical_json, sha256_hex
from keepstep.storage.store import StorageOptions

from .config import INSTALLED_DOCS

REMEDY: Final = 'name a file, a folder or URL of text, JSONL or Parquet files, or "installed-docs"'
PACKED: Final = (".gz", ".zst")
CHUNK_BYTES: Final = 1 << 20
_REPAIR: Final = "put it right or take it out, and prepare again"
_ZSTD_BYTES: Final = 8 << 10  # of packed bytes at once: a frame may grow by a factor of thousands
_VERSIONS: Final = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")  # what file systems know of a change

Seen = Callable[[int], None]  # so many more bytes of the files were read


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    name: str  # below its folder
    path: str  # for the file system
    num_bytes: int  # as it is kept, packed or not
    version: str  # becomes another one when the file changes, as far as the file system tells


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One entry of data.sources."""

    key: str  # how messages call it: key and value
    files: tuple[SourceFile, ...]
    filesystem: Any = field(default=None, repr=False)  # None: the installed documentation

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    @property
    def fingerprint(self) -> str:
        """Equal as long as the files are the same."""
        return sha256_hex(canonical_json([[file.name, file.num_bytes, file.version] for file in self.files]))


def find_source(source: str, key: str) -> Source:
    """Raises ValueError that begins with `key` (its key and value) if there is nothing that could be read."""
    if source == INSTALLED_DOCS:
        versions = ".".join([sys.version, *(version(name) for name in ("torch", "numpy"))])
        return Source(key=key, files=(SourceFile(name=INSTALLED_DOCS, path="", num_bytes=0, version=versions),))
    if not source.strip():
        raise ValueError(f"{key} is empty; {REMEDY}")
    with _world(key):
        return _listed(source, key)


def _listed(source: str, key: str) -> Source:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(source, **_options(source))
        if filesystem.isdir(path):
            found = dict(_walked(filesystem, path)) if "file" in filesystem.protocol else filesystem.find(path, detail=True)
        else:
            found = {path: filesystem.info(path)}
    except FileNotFoundError:
        raise ValueError(f"{key} does not exist; {REMEDY}") from None
    except (ImportError, ValueError) as error:  # a protocol that fsspec does not know or whose library is missing
        raise ValueError(f"{key} cannot be read: {error}; {REMEDY}") from error
    if not found:
        raise ValueError(f"{key} is an empty folder; {REMEDY}")
    prefix = len(path.rstrip("/")) + 1
    names = {name[prefix:] or PurePosixPath(name).name: name for name in sorted(found)}
    files = tuple(_file(name, where, found[where]) for name, where in names.items() if not _is_hidden(name))
    if not files:
        raise ValueError(f"{key} holds hidden files only; {REMEDY}")
    return Source(key=key, files=files, filesystem=filesystem)


def _walked(filesystem: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Regular files below a local folder, links followed, each folder once; a link is what it leads to."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(path, followlinks=True):
        seen.add(os.path.realpath(folder))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(folder, name)) not in seen]
        for file in (os.path.join(folder, name) for name in files):
            if os.path.isfile(file):
                yield file, filesystem.info(os.path.realpath(file))
            elif not os.path.exists(file):  # a link to nothing: whoever reads it says so
                yield file, filesystem.info(file)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _file(name: str, path: str, info: dict[str, Any]) -> SourceFile:
    told = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
    return SourceFile(name=name, path=path, num_bytes=int(info.get("size") or 0), version=told)


def _options(source: str) -> dict[str, Any]:
    """A source in S3 is looked for where the root's [storage] section says that S3 is."""
    if not source.startswith(("s3://", "s3a://")):
        return {}
    options = StorageOptions.from_env()
    client = {"region_name": options.region, "verify": options.ca_file}
    given = {"key": options.key, "secret": options.secret, "endpoint_url": options.endpoint_url}
    return {
        "client_kwargs": {name: value for name, value in client.items() if value},
        "use_listings_cache": False,
        **{name: value for name, value in given.items() if value},
    }


@contextlib.contextmanager
def opened(source: Source, file: SourceFile) -> Iterator[Any]:
    """The file as it is kept, to be read and sought in. Raises ValueError that names it."""
    with _world(f"{source.key}: {file.name}"), source.filesystem.open(file.path, "rb", block_size=8 * CHUNK_BYTES) as raw:
        yield raw


def chunks(source: Source, file: SourceFile, seen: Seen) -> Iterator[bytes]:
    """Its bytes, unpacked, in pieces of a megabyte or so. Raises ValueError where they cannot be read or are not packed well."""
    with opened(source, file) as raw:
        counted = _Counted(raw, seen)
        match PurePosixPath(file.name).suffix:
            case ".gz":
                yield from _ungzipped(counted)
            case ".zst":
                yield from _unzstandard(counted)
            case _:
                yield from iter(lambda: counted.read(CHUNK_BYTES), b"")


def unpacked_name(name: str) -> str:
    """Without the ending of what packed it."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix in PACKED else name


@dataclass
class _Counted:
    raw: Any
    seen: Seen

    def read(self, size: int = -1) -> bytes:
        body: bytes = self.raw.read(size)
        self.seen(len(body))
        return body


def _ungzipped(raw: Any) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw, mode="rb") as file:
        yield from iter(lambda: file.read(CHUNK_BYTES), b"")


def _unzstandard(raw: Any) -> Iterator[bytes]:
    """Frame after frame. The library's own reader takes a file that is cut off for one that is over."""
    try:
        import zstandard
    except ImportError as error:
        raise ImportError('zstandard files need the library zstandard: pip install "keepstep[data]"') from error
    unpacker, is_inside = zstandard.ZstdDecompressor(), False
    frame = unpacker.decompressobj()
    while packed := raw.read(_ZSTD_BYTES):
        while packed:
            if body := frame.decompress(packed):
                yield body
            packed, is_inside = (frame.unused_data, False) if frame.eof else (b"", True)
            frame = unpacker.decompressobj() if frame.eof else frame
    if is_inside:
        raise EOFError("it ends in the middle of a zstandard frame")


@contextlib.contextmanager
def _world(what: str) -> Iterator[None]:
    """What file systems and unpackers raise, as a ValueError that says what cannot be read."""
    try:
        yield
    except _errors() as error:
        raise ValueError(f"{what} cannot be read: {str(error) or type(error).__name__}; {_REPAIR}") from error


def _errors() -> tuple[type[Exception], ...]:
    """Those of libraries only where these were loaded."""
    found: list[type[Exception]] = [OSError, EOFError, zlib.error]
    for module, name in (("zstandard", "ZstdError"), ("botocore.exceptions", "BotoCoreError"), ("aiohttp", "ClientError")):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def read_small(url: str, key: str) -> bytes:
    """A small file, whole. Raises ValueError that begins with `key`."""
    with _world(key):
        source = _listed(url, key)
        return b"".join(chunks(source, source.files[0], lambda num_bytes: None))
