"""A storage root: objects under keys, on a POSIX file system or an object store.

    store = Store.open("runs/x")                      # or file:///, s3://bucket/prefix, memory://name
    store.put_new("log/0000000000.json", body)        # atomic create-if-absent, see put_new.py

Keys are relative, with "/" between parts. Every error is one of errors.py. A call on S3 has a deadline; one on a hung mount has none.
Thread-safe.
"""

from __future__ import annotations

import dataclasses
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from .errors import NotFound, StoreError
from .layout import PROBE
from .retry import RetryPolicy

ENV_OPTIONS: Final = "KEEPSTEP_STORAGE_OPTIONS"


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageOptions:
    """How to reach a root. What is empty here is left to the library's own sources (AWS_* variables, profiles, instance roles)."""

    endpoint_url: str = ""
    """Address of an S3-compatible server; empty: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, a profile's, or AWS itself."""
    region: str = ""
    """Region of the bucket; empty: AWS_REGION, AWS_DEFAULT_REGION, or a profile's."""
    key: str = ""
    """Access key id; empty: AWS_ACCESS_KEY_ID."""
    secret: str = field(default="", repr=False)
    """Secret access key; empty: AWS_SECRET_ACCESS_KEY."""
    ca_file: str = ""
    """PEM file of the authority that signed the server's certificate; empty: AWS_CA_BUNDLE."""
    connect_timeout_s: float = 5.0
    """For a connection to the server."""
    read_timeout_s: float = 20.0
    """Between two pieces of an answer; a conditional write that meets a lock may wait a second, so stay well above 5."""
    deadline_s: float = 60.0
    """Of a whole call, all its tries included; half of it for each, so that a part of 32 MiB needs 1.1 MB/s. A large file is many calls."""
    max_connections: int = 16
    """Requests of one process at once; fewer while the store says that it is too much."""

    def to_json(self) -> str:
        """For ENV_OPTIONS of a child process. Holds the secret: for an environment, not for a command line."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> StorageOptions:
        return StorageOptions(**json.loads(text))

    @staticmethod
    def from_env() -> StorageOptions:
        """What the parent process put into ENV_OPTIONS, otherwise the defaults."""
        return StorageOptions.from_json(os.environ.get(ENV_OPTIONS) or "{}")

    def policy(self) -> RetryPolicy:
        return RetryPolicy(deadline_s=self.deadline_s)


@dataclass(frozen=True, slots=True)
class Modified:
    """When objects were last written, and what time it is: in seconds, by the store's own clock, never compared with a local one."""

    now: float
    at: Mapping[str, float]

    def older_than(self, age_s: float) -> Sequence[str]:
        """The keys of objects that nobody wrote for so long."""
        return [key for key, at in self.at.items() if self.now - at > age_s]


class OpenFile(Protocol):
    """An object to read from at several places."""

    def read_into(self, start: int, *destinations: memoryview) -> int:
        """As `Store.read_into`. Thread-safe."""

    def close(self) -> None: ...


class Store(ABC):
    """One storage root. Subclasses: PosixStore, ObjectStore (any fsspec file system), MemoryStore, S3Store."""

    name: str  # what messages call this root
    parallel_reads: int = 16
    run_bytes: int = 0  # of neighbouring blocks that one request should bring; 0: each block is read by itself
    segment_period_s: float = 0.0  # growing files: the least time between two writes that this kind of store deserves

    @staticmethod
    def open(url: str | Path, options: StorageOptions | None = None) -> Store:
        """The root at a local path or fsspec URL. Touches nothing yet: `probe` says whether it can hold a run.

        Raises:
            ValueError: the URL's protocol is unknown or its library is not installed.
        """
        text, options = os.fspath(url), options or StorageOptions.from_env()
        protocol, separator, rest = text.partition("://")
        if not separator or protocol in ("file", "local"):
            from .posix import PosixStore

            return PosixStore(Path(rest if separator else text))
        from .remote import open_remote

        return open_remote(protocol, rest.strip("/"), options)

    @abstractmethod
    def put_new(self, key: str, body: bytes) -> bool:
        """Creates an object atomically and durably unless it exists; true if it holds exactly `body` now (see put_new.py)."""

    @abstractmethod
    def put(self, key: str, body: bytes) -> None:
        """Writes a small object, whether or not it exists; readers see the old or the new bytes."""

    @abstractmethod
    def get(self, key: str) -> bytes:
        """The whole object. Raises NotFound."""

    @abstractmethod
    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer where the object ends. Raises NotFound."""

    @abstractmethod
    def size(self, key: str) -> int:
        """Bytes of the object. Raises NotFound."""

    @abstractmethod
    def list(self, prefix: str = "") -> Sequence[str]:
        """All keys below the folder `prefix`, recursively, sorted; none is an empty list. `prefix` itself is not among them."""

    @abstractmethod
    def modified(self, prefix: str = "") -> Modified:
        """When each object below the folder `prefix` was written; what `list` gives, with times by the store's clock."""

    def sweep(self, older_than_s: float) -> int:
        """Removes what killed processes left half-written below this root, if it is older than that by the store's clock.

        Only what nobody can read or will ever finish: temporary files, dangling multipart uploads, what a start-up probe left.

        Returns:
            how many of them were removed.
        """
        left = self.modified(PROBE).older_than(older_than_s)
        for key in left:
            self.delete(key)
        return len(left)

    def drop_cache(self, prefix: str) -> None:  # noqa: B027 - object stores have none here
        """The next read of what lies below the folder `prefix` comes from where it is kept, not from this machine's memory.

        As far as the file system does what it is told; whoever wants proof of bytes calls this first.
        """

    @abstractmethod
    def write_file(self, key: str, blocks: Iterable[bytes | memoryview], *, num_bytes: int, sync: bool = True) -> None:
        """Writes a large object from consecutive blocks, each consumed before the next is asked for.

        Not atomic on POSIX: only for names that nobody reads before a later object vouches for them. When it fails, or `blocks`
        raises, nothing of it stays.

        Args:
            num_bytes: sum of the blocks' bytes.
            sync: durable on return (object stores always are).
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes an object; fine if there is none."""

    @abstractmethod
    def delete_tree(self, prefix: str) -> None:
        """Removes everything below a folder, unfinished uploads too; fine if there is nothing."""

    @abstractmethod
    def append(self, key: str, data: bytes, *, sync: bool = False) -> None:
        """Adds whole lines to a growing file. One file may have several writers; a line is never split between them."""

    @abstractmethod
    def read_lines(self, key: str) -> Sequence[bytes]:
        """The complete lines of a growing file, without line ends; none if there is no such file."""

    def lines_backwards(self, key: str) -> Iterator[bytes]:
        """The same lines, newest first; of a long file only what is asked for is read."""
        return reversed(self.read_lines(key))

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """Where the object (or, for "", the root) lies on a mounted file system, None on an object store."""

    def read_into(self, key: str, start: int, *destinations: memoryview) -> int:
        """Fills memory, one destination after the other, from byte `start` of the object on.

        Returns:
            the number of bytes read, less than asked for only where the object ends. Raises NotFound.
        """
        body = self.get_range(key, start, sum(view.nbytes for view in destinations))
        scatter(body, destinations)
        return len(body)

    def open_file(self, key: str) -> OpenFile:
        """To read from, many times; whoever opens it closes it. Raises NotFound, here or when it is read."""
        return _ByKey(self, key)

    def open_span(self, key: str, start: int, num_bytes: int) -> OpenFile:
        """To read these bytes in order, in one thread. Otherwise as `open_file`."""
        return self.open_file(key)

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except NotFound:
            return False
        return True

    def get_many(self, keys: Sequence[str]) -> tuple[bytes | StoreError, ...]:
        """Many small objects at once, in order; an error stands in the place of its object."""
        threads = min(self.parallel_reads, len(keys))
        if threads <= 1:
            return tuple(self._get_or_error(key) for key in keys)
        with ThreadPoolExecutor(threads, thread_name_prefix="get") as pool:
            return tuple(pool.map(self._get_or_error, keys))

    def _get_or_error(self, key: str) -> bytes | StoreError:
        try:
            return self.get(key)
        except StoreError as error:
            return error

    def read_records(self, key: str) -> Sequence[dict[str, Any]]:
        """The JSON objects in a growing file. A line torn by a crash is left out: growing files hold nothing that a run depends on."""
        return [record for record in map(_parse_line, self.read_lines(key)) if record is not None]

    def probe(self) -> None:
        """Proves that this root can hold a run. Raises StoreRefused with the remedy. Leaves nothing behind."""
        from .probe import probe

        probe(self)

    def probe_more(self, prefix: str) -> None:  # noqa: B027 - nothing more to prove by default
        """What only this kind of store must prove; raises StoreError or StoreRefused."""

    def close(self) -> None:  # noqa: B027 - nothing to give back by default
        """Gives back connections. The store must not be used afterwards."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


@dataclass(frozen=True, slots=True)
class _ByKey:
    """An object of a store without descriptors: each reading names it anew."""

    store: Store
    key: str

    def read_into(self, start: int, *destinations: memoryview) -> int:
        return self.store.read_into(self.key, start, *destinations)

    def close(self) -> None:
        """There is nothing to give back."""


def check_key(key: str) -> str:
    """Raises ValueError for a key that could leave the root or that some store spells differently."""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"key {key!r} has an empty, '.' or '..' part")
    return key


def scatter(body: bytes | memoryview, destinations: Sequence[memoryview]) -> None:
    """Fills memory, one destination after the other, as far as the bytes go."""
    rest = memoryview(body)
    for view in destinations:
        part, rest = rest[: view.nbytes], rest[view.nbytes :]
        view[: part.nbytes] = part


def whole_lines(data: bytes) -> bytes:
    """`data` with a line end; raises ValueError for nothing."""
    if not data:
        raise ValueError("append needs at least one line")
    return data if data.endswith(b"\n") else data + b"\n"


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
