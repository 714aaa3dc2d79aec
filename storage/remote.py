"""A root on an object store, through fsspec. Any file system whose `pipe_file` knows mode="create" will do; the probe finds out."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec

from .errors import NotFound, StoreError, StoreFull, from_os_error
from .layout import PROBE, segment_key
from .put_new import put_new_remote
from .retry import RetryPolicy
from .store import Modified, StorageOptions, Store, check_key, whole_lines

T = TypeVar("T")


def open_remote(protocol: str, path: str, options: StorageOptions) -> ObjectStore:
    """Raises ValueError for a protocol that fsspec does not know or whose library is missing."""
    if protocol in ("s3", "s3a"):
        from .s3 import S3Store

        return S3Store(path, options)
    if protocol == "memory":
        return MemoryStore(path)
    try:
        filesystem = fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise ValueError(f"run.root = {protocol}://{path} cannot be opened: {error}; use a local path, file:// or s3://") from error
    return ObjectStore(f"{protocol}://{path}", filesystem, path, options.policy())


class ObjectStore(Store):
    """Objects of an fsspec file system below one path. No file object is ever used for writing: those publish half-written objects."""

    segment_period_s = 10.0

    def __init__(self, name: str, filesystem: Any, path: str, policy: RetryPolicy) -> None:
        self.name = name
        self._fs = filesystem
        self._path = path
        self._policy = policy
        self._segments: dict[str, int] = {}  # number of the next segment of each growing file
        self._segments_lock = threading.Lock()

    def local_path(self, key: str) -> None:
        return None

    def put_new(self, key: str, body: bytes) -> bool:
        path = self._full(key)

        def once() -> bool:
            return put_new_remote(
                lambda: self._create(path, body), lambda: self._read(path), body, is_ambiguous=lambda error: not self._is_refusal(error)
            )

        return self._call(once, f"create {key}")

    def put(self, key: str, body: bytes) -> None:
        self._call(lambda: self._fs.pipe_file(self._full(key), body), f"write {key}")

    def get(self, key: str) -> bytes:
        return self._call(lambda: self._read(self._full(key)), f"read {key}")

    def get_range(self, key: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        return self._call(lambda: bytes(self._fs.cat_file(self._full(key), start=start, end=start + length)), f"read {key}")

    def size(self, key: str) -> int:
        return self._call(lambda: self._size(self._full(key)), f"look up {key}")

    def list(self, prefix: str = "") -> Sequence[str]:
        keys = self._call(lambda: self._find(self._full(prefix) if prefix else self._path), f"list {prefix or 'the root'}")
        return sorted(key for key in keys if key != prefix)

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
            return self._call(lambda: float(self._fs.modified(self._full(key)).timestamp()), f"look up {key}")
        except NotFound:
            return None

    def write_file(self, key: str, blocks: Iterable[bytes | memoryview], *, num_bytes: int, sync: bool = True) -> None:
        body = b"".join(blocks)
        if len(body) != num_bytes:
            raise StoreError(f"cannot write {self.name}/{key}: {len(body)} bytes came, {num_bytes} were announced")
        self.put(key, body)

    def delete(self, key: str) -> None:
        self._call(lambda: self._delete(self._full(key)), f"delete {key}")

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

    def _full(self, key: str) -> str:
        return f"{self._path}/{check_key(key)}"

    def _call(self, work: Callable[[], T], what: str) -> T:
        """All calls of the library go through here: repeated while transient, errors put into our tree."""
        what = f"{what} in {self.name}"
        try:
            return self._policy.call(work, is_transient=self._is_transient, what=what)
        except StoreError:
            raise
        except OSError as error:
            raise from_os_error(error, what) from error

    def _is_transient(self, error: BaseException) -> bool:
        return isinstance(error, OSError) and not self._is_refusal(error)

    def _is_refusal(self, error: BaseException) -> bool:
        """A clear answer that the next try would get again."""
        known = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError, StoreFull)
        return isinstance(error, known) or not isinstance(error, OSError)

    def _create(self, path: str, body: bytes) -> bool:
        try:
            self._fs.pipe_file(path, body, mode="create")
        except FileExistsError:
            return False
        return True

    def _read(self, path: str) -> bytes:
        try:
            return bytes(self._fs.cat_file(path))
        except FileNotFoundError as error:
            raise NotFound(f"no object {path} in {self.name}") from error

    def _size(self, path: str) -> int:
        info = self._fs.info(path)
        if info["type"] != "file":
            raise NotFound(f"no object {path} in {self.name}")
        return int(info["size"])

    def _find(self, path: str) -> Sequence[str]:
        return [self._relative(found) for found in self._fs.find(path)]

    def _relative(self, path: str) -> str:
        return path.strip("/").removeprefix(self._path.strip("/")).lstrip("/")

    def _delete(self, path: str) -> None:
        try:
            self._fs.rm_file(path)
        except FileNotFoundError:
            return  # what should be gone is gone


class MemoryStore(ObjectStore):
    """memory://name: shared by all stores of one process, for tests and examples. One lock makes its operations atomic."""

    segment_period_s = 0.0
    parallel_reads = 1
    _lock = threading.RLock()

    def __init__(self, path: str) -> None:
        super().__init__(f"memory://{path}", fsspec.filesystem("memory"), f"/{path}", RetryPolicy(max_tries=1))

    def _call(self, work: Callable[[], T], what: str) -> T:
        with self._lock:
            return super()._call(work, what)
