"""A root on S3 or on a server that speaks it. Retries, time-outs, conditions and uploads are ours; see s3_client.py for one request."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Final, TypeVar

from .errors import NotFound, StoreError, StoreUnavailable
from .remote import ObjectStore
from .s3_bulk import Bulk, Span
from .s3_client import Answer, S3Client, server_time
from .s3_errors import ErrorDocument, Trouble, is_ambiguous, to_store_error, trouble_of
from .s3_reads import QuickReader
from .store import Modified, StorageOptions
from .uploads import PART_BYTES, Body, send_parts

T = TypeVar("T")

RUN_BYTES: Final = 32 << 20  # one thread reports after so many that it goes on
CLEAN_UP_S: Final = 5.0  # for tidying up after an error: its cause is likely to be there still


class S3Store(ObjectStore):
    """s3://bucket/prefix."""

    part_bytes = PART_BYTES  # objects up to this size are one request
    run_bytes = RUN_BYTES

    def __init__(self, path: str, options: StorageOptions) -> None:
        if not path:
            raise ValueError("run.root = s3:// names no bucket: write s3://bucket/prefix")
        bucket, _, prefix = path.partition("/")
        super().__init__(f"s3://{path}", prefix, options.policy())
        self.parallel_reads = options.max_connections
        self._client = S3Client(bucket, options)
        self._quick = QuickReader(self._client, options)
        self._bulk = Bulk(self._client, options)

    def write_file(self, key: str, blocks: Iterable[bytes | memoryview], *, num_bytes: int, sync: bool = True) -> None:
        if num_bytes <= self.part_bytes:
            self._write_small(key, blocks, num_bytes)
            return
        upload = self._request("create_multipart_upload", key)["UploadId"]
        try:
            parts = send_parts(blocks, num_bytes, self.part_bytes, lambda number, body: self._send_part(key, upload, number, body))
        except BaseException:
            self._abort(key, upload)
            raise
        self._complete(key, upload, parts, num_bytes)

    def read_into(self, key: str, start: int, *destinations: memoryview) -> int:
        with closing(self.open_span(key, start, sum(view.nbytes for view in destinations))) as span:
            return span.read_into(start, *destinations)

    def open_span(self, key: str, start: int, num_bytes: int) -> S3Span:
        return S3Span(self, key, self._bulk.span(self._full(key), start, num_bytes))

    def modified(self, prefix: str = "") -> Modified:
        now, times = self._times(prefix)
        return Modified(now, {key: at for key, at in times.items() if key != prefix})

    def sweep(self, older_than_s: float) -> int:
        return super().sweep(older_than_s) + self._sweep_uploads("", older_than_s)

    def delete_tree(self, prefix: str) -> None:
        super().delete_tree(prefix)
        self._sweep_uploads(prefix)

    def probe_more(self, prefix: str) -> None:
        """An upload that was given up must leave nothing that anybody can read."""
        key = f"{prefix}/aborted"
        upload = self._request("create_multipart_upload", key)["UploadId"]
        self._send_part(key, upload, 1, [memoryview(b"x" * 1024)])
        self._abort(key, upload)
        if key in self.list(prefix):
            raise StoreError("an aborted multipart upload became visible")

    def close(self) -> None:
        self._bulk.close()
        self._client.close()

    def _write_small(self, key: str, blocks: Iterable[bytes | memoryview], num_bytes: int) -> None:
        try:
            super().write_file(key, blocks, num_bytes=num_bytes)
        except StoreUnavailable:
            self._tidy("delete_object", key)  # written, for all we know
            raise

    def _send_part(self, key: str, upload: str, number: int, body: Body) -> dict[str, Any]:
        path = self._full(key)
        etag = self._call(lambda left_s: self._bulk.put_part(path, upload, number, body, left_s), f"upload part {number} of {key}")
        return {"PartNumber": number, "ETag": etag}

    def _complete(self, key: str, upload: str, parts: Sequence[dict[str, Any]], num_bytes: int) -> None:
        """Publishes the object. An answer may get lost on the way: then the upload is gone and the object is there."""
        try:
            self._request("complete_multipart_upload", key, UploadId=upload, MultipartUpload={"Parts": list(parts)})
        except NotFound:
            if self._size_or_none(key) != num_bytes:
                raise
        except BaseException:
            self._abort(key, upload)
            self._tidy("delete_object", key)  # published, for all we know; no other writer uses this name
            raise

    def _size_or_none(self, key: str) -> int | None:
        try:
            return self.size(key)
        except NotFound:
            return None

    def _abort(self, key: str, upload: str) -> None:
        """Parts that stay are on the bill, invisible, until `delete_tree` or `sweep` finds them."""
        self._tidy("abort_multipart_upload", key, UploadId=upload)

    def _tidy(self, method: str, key: str, **arguments: Any) -> bool:
        """One quick try of what an error or a sweep leaves to do; the error that led here matters more than one of this."""
        try:
            self._client.request(method, CLEAN_UP_S, Key=self._full(key), **arguments)
        except Exception as error:
            if trouble_of(error) is None and not isinstance(error, StoreError):
                raise
            return False
        return True

    def _sweep_uploads(self, prefix: str, older_than_s: float = -1.0) -> int:
        """Aborts uploads that killed processes left below a folder ("": the root); how many."""
        old = [(key, upload) for key, upload, age_s in self._uploads(prefix) if age_s > older_than_s]
        return sum(self._tidy("abort_multipart_upload", key, UploadId=upload) for key, upload in old)

    def _uploads(self, prefix: str) -> Sequence[tuple[str, str, float]]:
        """(key, upload id, age in seconds by the server's clock) of every unfinished upload below a folder of this root, and only there."""
        below, found = self._below(prefix), []
        for page in self._pages("list_multipart_uploads", below):
            now = server_time(page)
            for upload in page.get("Uploads") or ():
                if upload["Key"].startswith(below):  # a server that does not filter must not make us abort somebody else's
                    found.append((self._relative(upload["Key"]), upload["UploadId"], now - upload["Initiated"].timestamp()))
        return found

    def _times(self, prefix: str) -> tuple[float, dict[str, float]]:
        """(now, key -> when it was written). Without delimiter: an emptied folder may still show as a common prefix for a while."""
        now = 0.0
        found: dict[str, float] = {}
        for page in self._pages("list_objects_v2", self._below(prefix)):
            now = server_time(page)
            found |= {self._relative(item["Key"]): item["LastModified"].timestamp() for item in page.get("Contents") or ()}
        return now, {key: at for key, at in found.items() if not key.endswith("/")}

    def _pages(self, method: str, below: str) -> Iterator[Answer]:
        """All pages of a listing (a server gives 1,000 entries at a time); each is a call of its own, with its retries."""
        where: dict[str, str] = {}
        while True:
            page = self._list(method, below, where)
            yield page
            if not page.get("IsTruncated"):
                return
            names = {"NextContinuationToken": "ContinuationToken", "NextKeyMarker": "KeyMarker", "NextUploadIdMarker": "UploadIdMarker"}
            where = {name: page[given] for given, name in names.items() if page.get(given)}

    def _list(self, method: str, below: str, where: Mapping[str, str]) -> Answer:
        return self._call(lambda left_s: self._client.request(method, left_s, Prefix=below, **where), f"list {below or 'everything'}")

    def _below(self, prefix: str) -> str:
        folder = "/".join(part for part in (self._path, prefix) if part)
        return f"{folder}/" if folder else ""

    def _request(self, method: str, key: str, **arguments: Any) -> Answer:
        path = self._full(key)
        return self._call(lambda left_s: self._client.request(method, left_s, Key=path, **arguments), f"{method.replace('_', ' ')} {key}")

    def _call(self, work: Callable[[float], T], what: str) -> T:
        try:
            return super()._call(work, what)
        except StoreError:
            raise
        except Exception as error:
            raise to_store_error(error, f"{what} in {self.name}") from error

    def _is_transient(self, error: BaseException) -> bool:
        return is_ambiguous(error)

    def _create(self, path: str, body: bytes, left_s: float) -> bool:
        try:
            self._client.request("put_object", left_s, Key=path, Body=body, IfNoneMatch="*")
        except Exception as error:
            if trouble_of(error) is Trouble.EXISTS:
                return False
            raise
        return True

    def _write(self, path: str, body: bytes, left_s: float) -> None:
        self._client.request("put_object", left_s, Key=path, Body=body)

    def _read(self, path: str, left_s: float) -> bytes:
        until = time.monotonic() + left_s
        body = self._quick.get(path, left_s)
        if body is None:
            body = self._read_slowly(path, until - time.monotonic())
        if path.endswith(".json") and body.lstrip().startswith((b"<?xml", b"<Error")):
            raise ErrorDocument(f"the server answered with success and an error document: {body[:200]!r}")
        return body

    def _read_slowly(self, path: str, left_s: float) -> bytes:
        try:
            body: bytes = self._client.request("get_object", left_s, Key=path)["Body"]
        except Exception as error:
            if trouble_of(error) is Trouble.MISSING:
                raise NotFound(f"no object {path} in {self.name}: {error}") from error
            raise
        return body

    def _read_range(self, path: str, start: int, length: int, left_s: float) -> bytes:
        body = memoryview(bytearray(length))
        with closing(self._bulk.span(path, start, length)) as span:
            return bytes(body[: span.read_into(start, [body], left_s)])

    def _size(self, path: str, left_s: float) -> int:
        return int(self._client.request("head_object", left_s, Key=path)["ContentLength"])

    def _find(self, prefix: str) -> Sequence[str]:
        return list(self._times(prefix)[1])

    def _delete(self, path: str, left_s: float) -> None:
        self._client.request("delete_object", left_s, Key=path)


class S3Span:
    """Bytes that are read in order, as part of as few requests as the line allows; each reading with its own deadline and retries."""

    def __init__(self, store: S3Store, key: str, span: Span) -> None:
        self._store = store
        self._key = key
        self._span = span

    def read_into(self, start: int, *destinations: memoryview) -> int:
        """As `Store.read_into`."""
        return self._store._call(lambda left_s: self._span.read_into(start, destinations, left_s), f"read {self._key}")

    def close(self) -> None:
        self._span.close()
