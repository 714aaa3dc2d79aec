"""The bytes of checkpoints to and from S3: parts of uploads, and ranges of objects, over connections that copy nothing (s3_wire.py).

botocore signs each address through s3fs' session, with the same credentials and at the same pace as all other requests. Such an address
("presigned") covers neither the body nor the range, which saves both sides a SHA-256 over every byte. So only that may go this way which
our own hashes vouch for, and which every reader compares with them: the files of checkpoints and of data. Records, indexes and manifests
are signed whole.
"""

from __future__ import annotations

import re
import ssl
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

from botocore.exceptions import ClientError
from botocore.httpsession import where
from botocore.utils import get_environ_proxies

from .s3_client import S3Client
from .s3_errors import ErrorDocument, status_of
from .s3_wire import Connections, Reply
from .store import StorageOptions, scatter

SIGN_AGAIN_S: Final = 300.0  # credentials of roles are renewed longer before they expire
MAX_SIGNED: Final = 64  # addresses that are remembered

_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/")


class Bulk:
    """Thread-safe."""

    def __init__(self, client: S3Client, options: StorageOptions) -> None:
        self._client = client
        self._options = options
        self._lock = threading.Lock()
        self._made: Connections | None = None
        self._signed: dict[str, tuple[str, int, float]] = {}  # path -> (address to read from, the session's number, when)

    def put_part(self, path: str, upload: str, number: int, body: Sequence[memoryview], left_s: float) -> str:
        """Sends one part of an upload; its ETag. Raises what s3_errors.py knows."""
        return self._client.renewing(lambda until: self._put_part(path, upload, number, body, until), left_s)

    def span(self, path: str, start: int, num_bytes: int) -> Span:
        """To read these bytes in order; nothing is asked before the first of them."""
        return Span(self, path, start, num_bytes)

    def open_range(self, path: str, start: int, num_bytes: int, left_s: float) -> OpenRange:
        """Asks for a range. Raises what s3_errors.py knows."""
        return self._client.renewing(lambda until: self._open_range(path, start, num_bytes, until), left_s)

    def close(self) -> None:
        if self._made:
            self._made.close()

    def _put_part(self, path: str, upload: str, number: int, body: Sequence[memoryview], until: float) -> str:
        names: dict[str, Any] = {"Key": path, "UploadId": upload, "PartNumber": number}
        url = self._client.sign("upload_part", until, **names)
        with self._client.paced(until):
            if get_environ_proxies(url):
                return str(self._client.send("upload_part", until, **names, Body=b"".join(body))["ETag"])
            with self._connections(url, until).asking("PUT", url, until, body=body) as reply:
                said, etag = reply.read(), reply.header("ETag")
        if not etag:
            raise ErrorDocument(f"the server answered a part with success but without an ETag: {said[:200]!r}")
        return etag

    def _open_range(self, path: str, start: int, num_bytes: int, until: float) -> OpenRange:
        url, wanted = self._address(path, until), f"bytes={start}-{start + num_bytes - 1}"
        with ExitStack() as held:
            held.enter_context(self._client.paced(until))
            if get_environ_proxies(url):
                answer = self._client.send("get_object", until, Key=path, Range=wanted)
                reply: Reply | _Whole = _Whole(str(answer.get("ContentRange", "")), memoryview(answer["Body"]))
            else:
                reply = held.enter_context(self._connections(url, until).asking("GET", url, until, headers={"Range": wanted}))
            return OpenRange(reply, start, num_bytes, held.pop_all())

    def _address(self, path: str, until: float) -> str:
        signed, now, renewals = self._signed.get(path), time.monotonic(), self._client.renewals
        if signed and signed[1] == renewals and now - signed[2] < SIGN_AGAIN_S:
            return signed[0]
        url = self._client.sign("get_object", until, Key=path)
        with self._lock:
            if len(self._signed) >= MAX_SIGNED:
                self._signed.clear()
            self._signed[path] = url, renewals, now
        return url

    def _connections(self, url: str, until: float) -> Connections:
        with self._lock:
            if self._made is None:
                self._made = Connections(self._options.connect_timeout_s, self._options.read_timeout_s, self._trust(url))
            return self._made

    def _trust(self, url: str) -> ssl.SSLContext | None:
        """For https: the authorities that botocore would believe."""
        return ssl.create_default_context(cafile=self._client.ca_file or where()) if url.startswith("https:") else None


@dataclass(slots=True)
class _Whole:
    """An answer that was read to its end already."""

    range: str
    body: memoryview

    def read_into(self, views: Sequence[memoryview], until: float) -> int:
        count = min(self.body.nbytes, sum(view.nbytes for view in views))
        scatter(self.body, views)
        self.body = self.body[count:]
        return count


class OpenRange:
    """An answer that is being read. It holds one of the store's places for requests until it is closed."""

    def __init__(self, reply: Reply | _Whole, start: int, num_bytes: int, held: ExitStack) -> None:
        """Raises ErrorDocument when it is not what was asked for."""
        self._reply = reply
        self._held = held
        found = _RANGE.match(reply.range)
        if not found or int(found[1]) != start or int(found[2]) >= start + num_bytes:
            error = ErrorDocument(f"asked for bytes {start} to {start + num_bytes}, got {reply.range or 'no range'}")
            self.close(error)
            raise error
        self.at, self.end = start, int(found[2]) + 1

    def read_into(self, views: Sequence[memoryview], until: float) -> int:
        """Raises OSError."""
        wanted = min(sum(view.nbytes for view in views), self.end - self.at)
        count = self._reply.read_into(_first(views, wanted), until)
        self.at += count
        if count < wanted:
            raise ConnectionError(f"the answer ended at byte {self.at}, {self.end} were announced")
        return count

    def close(self, error: BaseException | None = None) -> None:
        """With the error that ended it, of which the store's pace learns."""
        self._held.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)


class Span:
    """Consecutive bytes of an object, read in order: one request where the line allows, after an error another one for the rest.

    For one thread at a time.
    """

    def __init__(self, bulk: Bulk, path: str, start: int, num_bytes: int) -> None:
        self._bulk = bulk
        self._path = path
        self._end = start + num_bytes
        self._open: OpenRange | None = None

    def read_into(self, start: int, views: Sequence[memoryview], left_s: float) -> int:
        """One try to fill memory from byte `start` on; how many bytes, fewer only where the object ends. Raises what s3_errors.py knows."""
        until, wanted = time.monotonic() + left_s, sum(view.nbytes for view in views)
        if self._open is None or self._open.at != start:
            self.close()
            try:
                self._open = self._bulk.open_range(self._path, start, max(wanted, self._end - start), left_s)
            except ClientError as error:
                if status_of(error) == 416:  # begins at or after the end
                    return 0
                raise
        try:
            count = self._open.read_into(views, until)
        except BaseException as error:
            self.close(error)
            raise
        if self._open.at == self._open.end:
            self.close()
        return count

    def close(self, error: BaseException | None = None) -> None:
        opened, self._open = self._open, None
        if opened:
            opened.close(error)


def _first(views: Sequence[memoryview], num_bytes: int) -> list[memoryview]:
    """The same memory, but no more than so many bytes of it."""
    chosen = list[memoryview]()
    for view in views:
        chosen.append(view[:num_bytes])
        num_bytes -= chosen[-1].nbytes
    return chosen
