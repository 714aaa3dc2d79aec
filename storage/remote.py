"""A root on an object store: what all of them share, and those behind fsspec. Any file system whose `pipe_file` knows mode="create" may
do; the start-up probe finds out."""

from __future__ import annotations

import threading
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec

from .errors import NotFound, StorageError, StoreError, from_os_error
from .layout import PROBE, segment_key
from .put_new import put_new_remote
from .retry import RetryBudget, RetryPolicy
from .store import Modified, StorageOptions, Store, check_key, whole_lines

T = TypeVar("T")


def open_remote(protocol: str, path: str, options: StorageOptions) -> ObjectStore:
    """Raises ValueError for a protocol that fsspec does not know, whose library is missing, or that needs more than a path."""
    if protocol in ("s3", "s3a"):
        from .s3 import S3Store

        return S3Store(path, options)
    if protocol == "memory":
        return MemoryStore(path)
    try:
        filesystem = fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False)
    except (ValueError, TypeError, AttributeError, ImportError, OSError) as error:  # those that need more than a path
        raise ValueError(f"run.root = {protocol}://{path} cannot be opened: {error}; use a local path, file:// or s3://") from error
    return FsspecStore(f"{protocol}://{path}", filesystem, path, options.policy())


class ObjectStore(Store):
    """Objects below one path. Subclasses give the requests; repeating them is done here.

    A request gets the seconds that it may take and raises what its library raises. `_is_transient` says which errors are tried again:
    those after which the request may or may not have been carried out.
    """

    segment_period_s = 10.0

    def __init__(self, name: str, path: str, policy: RetryPolicy) -> None:
        self.name = name
        self._path = path
        self._policy = policy
        self._budget = RetryBudget()
        self._segments: dict[str, int] = {}  # number of the next segment of each growing file
        self._segments_lock = threading.Lock()

    @abstractmethod
    def _create(self, path: str, body: bytes, left_s: float) -> bool:
        """A conditional write; false when the store says that the object exists."""

    @abstractmethod
    def _write(self, path: str, body: bytes, left_s: float) -> None: ...

    @abstractmethod
    def _read(self, path: str, left_s: float) -> bytes:
        """Raises NotFound."""

    @abstractmethod
    def _read_range(self, path: str, start: int, length: int, left_s: float) -> bytes:
        """Nothing when `start` is the end or behind it."""

    @abstractmethod
    def _size(self, path: str, left_s: float) -> int: ...

    @abstractmethod
    def _delete(self, path: str, left_s: float) -> None: ...

    @abstractmethod
    def _find(self, prefix: str) -> Sequence[str]:
        """The keys below a folder, in any order; itself a whole call with its retries."""

    @abstractmethod
    def _is_transient(self, error: BaseException) -> bool: ...

    def local_path(self, key: str) -> None:
        return None

    def put_new(self, key: str, body: bytes) -> bool:
        path = self._full(key)

        def once(left_s: float) -> bool:
            create, read = lambda: self._create(path, body, left_s), lambda: self._read(path, left_s)
            return put_new_remote(create, read, body, is_ambiguous=self._is_transient)

        return self._call(once, f"create {key}")

    def put(self, key: str, body: bytes) -> None:
        path = self._full(key)
        self._call(lambda left_s: self._write(path, body, left_s), f"write {key}")

    def get(self, key: str) -> bytes:
        path = self._full(key)
        return self._call(lambda left_s: self._read(path, left_s), f"read {key}")

    def get_range(self, key: str, start: int, length: int) -> bytes:
        path = self._full(key)
        return self._call(lambda left_s: self._read_range(path, start, length, left_s), f"read {key}") if length else b""

    def size(self, key: str) -> int:
        path = self._full(key)
        return self._call(lambda left_s: self._size(path, left_s), f"look up {key}")

    def list(self, prefix: str = "") -> Sequence[str]:
        return sorted(key for key in self._find(check_key(prefix) if prefix else "") if key != prefix)

    def write_file(self, key: str, blocks: Iterable[bytes | memoryview], *, num_bytes: int, sync: bool = True) -> None:
        body = b"".join(bytes(block) for block in blocks)
        if len(body) != num_bytes:
            raise StoreError(f"cannot write {self.name}/{key}: {len(body)} bytes came, {num_bytes} were announced")
        self.put(key, body)

    def delete(self, key: str) -> None:
        path = self._full(key)
        try:
            self._call(lambda left_s: self._delete(path, left_s), f"delete {key}")
        except NotFound:
            return  # what should be gone is gone

    def delete_tree(self, prefix: str) -> None:
        keys = self.list(check_key(prefix))
        with ThreadPoolExecutor(self.parallel_reads, thread_name_prefix="delete") as pool:
            list(pool.map(self.delete, keys))

    def append(self, key: str, data: bytes, *, sync: bool = False) -> None:
        """Each call becomes one segment: callers gather lines for `segment_period_s` first."""
        lines = whole_lines(data)
        with self._segments_lock:
            number = self._segments.get(key) or len(self.list(key)) + 1
            while not self.put_new(segment_key(key, number), lines):
                number += 1  # another writer's
            self._segments[key] = number + 1

    def read_lines(self, key: str) -> Sequence[bytes]:
        bodies = self.get_many(self.list(key))
        for body in bodies:
            if isinstance(body, StoreError):
                raise body
        return [line for body in bodies if isinstance(body, bytes) for line in body.split(b"\n")[:-1]]

    def lines_backwards(self, key: str) -> Iterator[bytes]:
        for segment in reversed(self.list(key)):
            yield from reversed(self.get(segment).split(b"\n")[:-1])

    def _full(self, key: str) -> str:
        return f"{self._path}/{check_key(key)}" if self._path else check_key(key)

    def _relative(self, path: str) -> str:
        return path.strip("/").removeprefix(self._path.strip("/")).lstrip("/")

    def _call(self, work: Callable[[float], T], what: str) -> T:
        """All requests go through here: repeated while transient, errors put into our tree."""
        what = f"{what} in {self.name}"
        try:
            return self._policy.call(work, is_transient=self._is_transient, what=what, budget=self._budget)
        except OSError as error:
            raise from_os_error(error, what) from error


class FsspecStore(ObjectStore):
    """A file system of fsspec. No file object is ever used for writing: those publish half-written objects.

    Its library decides how long a request may take.
    """

    def __init__(self, name: str, filesystem: Any, path: str, policy: RetryPolicy) -> None:
        super().__init__(name, path, policy)
        self._fs = filesystem

    def modified(self, prefix: str = "") -> Modified:
        found = ((key, self._modified_at(key)) for key in self.list(prefix))
        return Modified(self._now(), {key: at for key, at in found if at is not None})

    def _now(self) -> float:
        """By the store's clock: the time of an object that is written for this."""
        key = f"{PROBE}/{uuid.uuid4().hex}"
        self.put(key, b"what time is it?")
        try:
            at = self._modified_at(key)
        finally:
            self.delete(key)
        if at is None:
            raise StoreError(f"{self.name} lost {key} at once")
        return at

    def _modified_at(self, key: str) -> float | None:
        """None when somebody removed it meanwhile."""
        try:
            return self._call(lambda _: float(self._fs.modified(self._full(key)).timestamp()), f"look up {key}")
        except NotFound:
            return None

    def _create(self, path: str, body: bytes, left_s: float) -> bool:
        try:
            self._fs.pipe_file(path, body, mode="create")
        except FileExistsError:
            return False
        return True

    def _write(self, path: str, body: bytes, left_s: float) -> None:
        self._fs.pipe_file(path, body)

    def _read(self, path: str, left_s: float) -> bytes:
        try:
            return bytes(self._fs.cat_file(path))
        except FileNotFoundError as error:
            raise NotFound(f"no object {path} in {self.name}") from error

    def _read_range(self, path: str, start: int, length: int, left_s: float) -> bytes:
        return bytes(self._fs.cat_file(path, start=start, end=start + length))

    def _size(self, path: str, left_s: float) -> int:
        info = self._fs.info(path)
        if info["type"] != "file":
            raise NotFound(f"no object {path} in {self.name}")
        return int(info["size"])

    def _find(self, prefix: str) -> Sequence[str]:
        path = self._full(prefix) if prefix else self._path
        return [self._relative(found) for found in self._call(lambda _: self._fs.find(path), f"list {prefix or 'the root'}")]

    def _delete(self, path: str, left_s: float) -> None:
        self._fs.rm_file(path)

    def _call(self, work: Callable[[float], T], what: str) -> T:
        """Each of these libraries has its own errors, and many file systems can do only half of what they inherit."""
        try:
            return super()._call(work, what)
        except (StorageError, AssertionError):
            raise
        except Exception as error:
            raise StoreError(f"cannot {what} in {self.name}: {type(error).__name__}: {error}") from error

    def _is_transient(self, error: BaseException) -> bool:
        known = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
        return isinstance(error, OSError) and not isinstance(error, known)


class MemoryStore(FsspecStore):
    """memory://name: shared by all stores of one process, for tests and examples. One lock makes its operations atomic."""

    segment_period_s = 0.0
    parallel_reads = 1
    _lock = threading.RLock()

    def __init__(self, path: str) -> None:
        super().__init__(f"memory://{path}", fsspec.filesystem("memory"), f"/{path}", RetryPolicy(max_tries=1))

    def _call(self, work: Callable[[float], T], what: str) -> T:
        with self._lock:
            return super()._call(work, what)
