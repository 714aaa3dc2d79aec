"""A root on S3 or on a server that speaks it, through s3fs. Retries, time-outs, conditions and uploads are ours."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeVar

import botocore.exceptions
import s3fs

from .errors import NotFound, StoreError, StoreForbidden
from .remote import ObjectStore
from .store import Modified, StorageOptions, check_key

T = TypeVar("T")

PART_BYTES: Final = 16 << 20
MAX_PARTS: Final = 10_000
PARALLEL_PARTS: Final = 4

_TRANSIENT_STATUS: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 507, 509})
_MISCONFIGURED: Final = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.NoRegionError,
    botocore.exceptions.ParamValidationError,
    botocore.exceptions.InvalidRegionError,
)


class S3Store(ObjectStore):
    """s3://bucket/prefix. One `call_s3` is one HTTP request: neither s3fs nor botocore repeats anything."""

    def __init__(self, path: str, options: StorageOptions) -> None:
        if not path:
            raise ValueError("run.root = s3:// names no bucket: write s3://bucket/prefix")
        super().__init__(f"s3://{path}", _filesystem(options), path, options.policy())
        self._bucket, _, self._prefix = path.partition("/")

    def write_file(self, key: str, blocks: Iterable[bytes | memoryview], *, num_bytes: int, sync: bool = True) -> None:
        if num_bytes <= PART_BYTES:
            super().write_file(key, blocks, num_bytes=num_bytes)
            return
        upload = self._request("create_multipart_upload", key)["UploadId"]
        try:
            parts = self._upload_parts(key, upload, _gather(blocks, part_bytes(num_bytes)), num_bytes)
            self._request("complete_multipart_upload", key, UploadId=upload, MultipartUpload={"Parts": parts})
        except BaseException:
            self._abort(key, upload)
            raise

    def modified(self, prefix: str = "") -> Modified:
        seen = self._call(lambda: self._times(self._full(prefix) if prefix else self._path), f"list {prefix or 'the root'}")
        return Modified(seen.now, {key: at for key, at in seen.at.items() if key != prefix})

    def sweep(self, older_than_s: float) -> int:
        return super().sweep(older_than_s) + self._sweep_uploads("", older_than_s)

    def delete_tree(self, prefix: str) -> None:
        super().delete_tree(prefix)
        self._sweep_uploads(prefix)

    def probe_more(self, prefix: str) -> None:
        """An upload that was given up must leave nothing that anybody can read."""
        key = f"{prefix}/aborted"
        upload = self._request("create_multipart_upload", key)["UploadId"]
        self._request("upload_part", key, UploadId=upload, PartNumber=1, Body=b"x" * 1024)
        self._abort(key, upload)
        if key in self.list(prefix):
            raise StoreError("an aborted multipart upload became visible")

    def close(self) -> None:
        self._fs.invalidate_cache()

    def _upload_parts(self, key: str, upload: str, bodies: Iterator[bytes], num_bytes: int) -> Sequence[dict[str, Any]]:
        """Parts in parallel, never more than PARALLEL_PARTS of them in memory."""

        def send(number: int, body: bytes) -> dict[str, Any]:
            answer = self._request("upload_part", key, UploadId=upload, PartNumber=number, Body=body)
            return {"PartNumber": number, "ETag": answer["ETag"]}

        parts: list[dict[str, Any]] = []
        pending: list[Future[dict[str, Any]]] = []
        sent = 0
        with ThreadPoolExecutor(PARALLEL_PARTS, thread_name_prefix="upload") as pool:
            for number, body in enumerate(bodies, start=1):
                sent += len(body)
                pending.append(pool.submit(send, number, body))
                if len(pending) == PARALLEL_PARTS:
                    parts.append(pending.pop(0).result())
            parts += [future.result() for future in pending]
        if sent != num_bytes:
            raise StoreError(f"cannot write {self.name}/{key}: {sent} bytes came, {num_bytes} were announced")
        return parts

    def _abort(self, key: str, upload: str) -> None:
        try:
            self._request("abort_multipart_upload", key, UploadId=upload)
        except StoreError:
            return  # parts stay on the bill, invisible, until `delete_tree` or the bucket's own rule sweeps them

    def _sweep_uploads(self, prefix: str, older_than_s: float = -1.0) -> int:
        """Aborts uploads that killed processes left below a folder ("": the root); how many."""
        uploads = self._call(lambda: self._uploads(prefix), f"list uploads in {prefix or 'the root'}")
        old = [(key, upload) for key, upload, age_s in uploads if age_s > older_than_s]
        for key, upload in old:
            self._abort(key, upload)
        return len(old)

    def _uploads(self, prefix: str) -> Sequence[tuple[str, str, float]]:
        """(key, upload id, age in seconds by the server's clock) of every unfinished upload below a folder of this root, and only there."""
        below = "/".join(part for part in (self._prefix, prefix) if part)
        below = f"{below}/" if below else ""
        found: list[tuple[str, str, float]] = []
        marker: dict[str, str] = {}
        while True:
            page = self._fs.call_s3("list_multipart_uploads", Bucket=self._bucket, Prefix=below, **marker)
            now = server_time(page)
            for upload in page.get("Uploads") or ():
                if upload["Key"].startswith(below):  # a server that does not filter must not make us abort somebody else's
                    key = self._relative(f"{self._bucket}/{upload['Key']}")
                    found.append((key, upload["UploadId"], now - upload["Initiated"].timestamp()))
            if not page.get("IsTruncated"):
                return found
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page.get("NextUploadIdMarker") or ""}

    def _in_bucket(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    def _request(self, method: str, key: str, **arguments: Any) -> Any:
        path = self._in_bucket(check_key(key))
        return self._call(lambda: self._fs.call_s3(method, Bucket=self._bucket, Key=path, **arguments), f"{method.replace('_', ' ')} {key}")

    def _call(self, work: Callable[[], T], what: str) -> T:
        try:
            return super()._call(work, what)
        except _MISCONFIGURED as error:
            raise StoreForbidden(f"cannot {what} in {self.name}: {error}") from error
        except botocore.exceptions.BotoCoreError as error:
            raise StoreError(f"cannot {what} in {self.name}: {error}") from error

    def _create(self, path: str, body: bytes) -> bool:
        try:
            self._fs.pipe_file(path, body, mode="create")
        except OSError as error:
            if isinstance(error, FileExistsError) or http_status(error) == 412:
                return False
            raise
        return True

    def _read(self, path: str) -> bytes:
        """One request: s3fs would ask for the size first, in case parallel ranges were worth it."""
        try:
            return bytes(self._fs.cat_file(path, max_concurrency=1))
        except FileNotFoundError as error:
            raise NotFound(f"no object {path} in {self.name}") from error

    def _size(self, path: str) -> int:
        key = path.removeprefix(f"{self._bucket}/")
        try:
            return int(self._fs.call_s3("head_object", Bucket=self._bucket, Key=key)["ContentLength"])
        except FileNotFoundError as error:
            raise NotFound(f"no object {key} in {self.name}") from error

    def _find(self, path: str) -> Sequence[str]:
        return list(self._times(path).at)

    def _times(self, path: str) -> Modified:
        """By prefix without delimiter: an emptied folder may still show as a common prefix for a while."""
        prefix = path.removeprefix(self._bucket).strip("/")
        found: dict[str, float] = {}
        token: dict[str, str] = {}
        while True:
            page = self._fs.call_s3("list_objects_v2", Bucket=self._bucket, Prefix=f"{prefix}/" if prefix else "", **token)
            for item in page.get("Contents") or ():
                found[self._relative(f"{self._bucket}/{item['Key']}")] = item["LastModified"].timestamp()
            if not page.get("IsTruncated"):
                return Modified(server_time(page), {key: at for key, at in found.items() if not key.endswith("/")})
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def get_range(self, key: str, start: int, length: int) -> bytes:
        try:
            return super().get_range(key, start, length)
        except StoreError as error:
            if http_status(error.__cause__) == 416:  # begins at or after the end
                return b""
            raise

    def _is_transient(self, error: BaseException) -> bool:
        return isinstance(error, Exception) and not isinstance(error, StoreError) and not self._is_refusal(error)

    def _is_refusal(self, error: BaseException) -> bool:
        if isinstance(error, (StoreError, *_MISCONFIGURED, FileNotFoundError, PermissionError, AssertionError, TypeError, ValueError)):
            return True
        status = http_status(error)
        return status is not None and status not in _TRANSIENT_STATUS


def server_time(answer: Mapping[str, Any]) -> float:
    """Seconds by the server's clock when it answered, from the Date header that every HTTP server sends."""
    return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()


def http_status(error: BaseException | None) -> int | None:
    """The status of the answer behind an error of s3fs, None when no answer came."""
    response = getattr(error, "response", None) or getattr(getattr(error, "__cause__", None), "response", None)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    return status if isinstance(status, int) else None


def part_bytes(num_bytes: int) -> int:
    """Size of a multipart upload's parts: PART_BYTES, more where the store's limit of parts demands it."""
    return max(PART_BYTES, -(-num_bytes // MAX_PARTS))


def _gather(blocks: Iterable[bytes | memoryview], size: int) -> Iterator[bytes]:
    """The same bytes in bodies of `size`, the last one shorter. Copies: botocore takes no memoryview."""
    waiting: list[bytes | memoryview] = []
    held = 0
    for block in itertools.chain.from_iterable(_cut(block, size) for block in blocks):
        if held + len(block) > size:
            yield b"".join(waiting)
            waiting, held = [], 0
        waiting.append(block)
        held += len(block)
    if waiting:
        yield b"".join(waiting)


def _cut(block: bytes | memoryview, size: int) -> Iterator[memoryview]:
    view = memoryview(block).cast("B") if block else memoryview(b"")
    return (view[start : start + size] for start in range(0, len(view), size))


def _filesystem(options: StorageOptions) -> Any:
    filesystem = s3fs.S3FileSystem(
        key=options.key or None,
        secret=options.secret or None,
        endpoint_url=options.endpoint_url or None,
        client_kwargs=_given(region_name=options.region, verify=options.ca_file),
        config_kwargs={
            "connect_timeout": options.connect_timeout_s,
            "read_timeout": options.read_timeout_s,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            "request_checksum_calculation": "when_required",  # several servers refuse the CRC32 that newer SDKs add
            "response_checksum_validation": "when_required",
            "max_pool_connections": options.max_connections,
        },
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    filesystem.retries = 1  # s3fs' own loop: a repeated conditional PUT would meet its own object
    return filesystem


def _given(**values: str) -> dict[str, str]:
    return {name: value for name, value in values.items() if value}
