"""HTTP for large bodies: one request on a kept connection, in the caller's thread, straight from and into the caller's memory.

s3fs and obstore copy each byte two or three times; here the kernel copies it once. Addresses are signed elsewhere ("presigned", see
s3_bulk.py), so nothing in this file knows a key. Whatever S3 answers but success is raised as the ClientError that botocore would raise:
what errors mean stays in s3_errors.py.
"""

from __future__ import annotations

import http.client
import re
import select
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

from botocore.exceptions import ClientError

ERROR_BYTES: Final = 1 << 16  # of an error document that are looked at


class _Plain(socket.socket):
    """A socket whose every wait ends at `until`, and for an answer after `patience_s` without a byte."""

    until = float("inf")
    patience_s = float("inf")

    def recv_into(self, *arguments: Any) -> int:
        _arm(self, self.patience_s)
        return super().recv_into(*arguments)

    def sendall(self, *arguments: Any) -> None:
        _arm(self)
        super().sendall(*arguments)


class _Tls(ssl.SSLSocket):
    """The same over TLS, whose `sendall` is a loop of `send`."""

    until = float("inf")
    patience_s = float("inf")

    def recv_into(self, *arguments: Any) -> int:
        _arm(self, self.patience_s)
        return super().recv_into(*arguments)

    def send(self, *arguments: Any) -> int:
        _arm(self)
        return super().send(*arguments)


def _arm(sock: _Plain | _Tls, patience_s: float = float("inf")) -> None:
    left_s = sock.until - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("no whole answer in time")
    least_s = min(patience_s, left_s)
    sock.settimeout(least_s if least_s < float("inf") else None)


class _PlainConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        self.sock = _Plain(fileno=self.sock.detach())


class Reply:
    """An answer with success, its body not yet read."""

    def __init__(self, sock: Any, response: http.client.HTTPResponse) -> None:
        self._sock = sock
        self._response = response

    @property
    def range(self) -> str:
        """Which bytes of an object these are."""
        return self.header("Content-Range")

    def header(self, name: str) -> str:
        return self._response.headers.get(name, "")

    def read(self) -> bytes:
        """The rest of a short body."""
        return self._response.read(ERROR_BYTES)

    def read_into(self, views: Sequence[memoryview], until: float) -> int:
        """Fills memory with what comes next; how many bytes, fewer only where the body ends. Raises OSError, also when the time is over."""
        self._sock.until = until
        count = 0
        for view in views:
            rest = view
            while rest:
                if not (got := self._response.readinto(rest)):
                    return count
                count, rest = count + got, rest[got:]
        return count


class Connections:
    """Kept connections to one server. Thread-safe: each request has one for itself.

    Args:
        patience_s: between two pieces of an answer.
        trust: for https.
    """

    def __init__(self, connect_timeout_s: float, patience_s: float, trust: ssl.SSLContext | None) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._patience_s = patience_s
        self._trust = trust
        if trust:
            trust.sslsocket_class = _Tls
        self._lock = threading.Lock()
        self._idle: list[tuple[str, http.client.HTTPConnection]] = []
        weakref.finalize(self, _close_all, self._idle)

    @contextmanager
    def asking(
        self, verb: str, url: str, until: float, *, headers: Mapping[str, str] | None = None, body: Sequence[memoryview] = ()
    ) -> Iterator[Reply]:
        """Sends a request and gives the answer. A body that is read to its end leaves its connection for the next request.

        Raises:
            ClientError: S3 answered, but not with success.
            OSError, HTTPException: no answer, or not in time.
        """
        parts = urlsplit(url)
        connection = self._connection(parts, until)
        is_kept = False
        try:
            sock = connection.sock  # the connection forgets it when the answer says that it is the last one
            response = _ask(connection, verb, f"{parts.path}?{parts.query}", headers or {}, body)
            if not 200 <= response.status < 300:
                raise _refusal(response, verb)
            yield Reply(sock, response)
            is_kept = response.isclosed() and not response.will_close
        finally:
            if is_kept:
                with self._lock:
                    self._idle.append((parts.netloc, connection))
            else:
                connection.close()

    def close(self) -> None:
        with self._lock:
            _close_all(self._idle)

    def _connection(self, parts: SplitResult, until: float) -> http.client.HTTPConnection:
        """A kept one that the server has not closed, or a new one."""
        connection = self._kept(parts.netloc) or self._opened(parts, until)
        sock: Any = connection.sock
        sock.until, sock.patience_s = until, self._patience_s
        return connection

    def _kept(self, netloc: str) -> http.client.HTTPConnection | None:
        while True:
            with self._lock:
                index = next((i for i, (where, _) in enumerate(self._idle) if where == netloc), None)
                if index is None:
                    return None
                _, connection = self._idle.pop(index)
            if not _has_news(connection.sock):
                return connection
            connection.close()

    def _opened(self, parts: SplitResult, until: float) -> http.client.HTTPConnection:
        if (left_s := until - time.monotonic()) <= 0:
            raise TimeoutError("no time is left to connect")
        timeout_s = min(self._connect_timeout_s, left_s)
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            connection = http.client.HTTPSConnection(parts.netloc, timeout=timeout_s, context=self._trust)
        else:
            connection = _PlainConnection(parts.netloc, timeout=timeout_s)
        connection.connect()
        return connection


def _close_all(idle: list[tuple[str, http.client.HTTPConnection]]) -> None:
    while idle:
        idle.pop()[1].close()


def _has_news(sock: socket.socket) -> bool:
    """Nothing was asked: what there is to read can only be that the server has closed the connection."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _ask(
    connection: http.client.HTTPConnection, verb: str, target: str, headers: Mapping[str, str], body: Sequence[memoryview]
) -> http.client.HTTPResponse:
    connection.putrequest(verb, target, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    if body:
        connection.putheader("Content-Length", str(sum(view.nbytes for view in body)))
    broken: OSError | None = None
    try:
        connection.endheaders()
        for view in body:
            connection.sock.sendall(view)
    except (BrokenPipeError, ConnectionResetError) as error:  # whoever refuses a body may answer and hang up before its end
        broken = error
    try:
        return connection.getresponse()
    except (OSError, http.client.HTTPException):
        if broken:
            raise broken from None
        raise


def _refusal(response: http.client.HTTPResponse, verb: str) -> ClientError:
    text = response.read(ERROR_BYTES).decode(errors="replace")
    found = {name: match[1] if (match := re.search(f"<{name}>(.*?)</{name}>", text, re.DOTALL)) else "" for name in ("Code", "Message")}
    error = {"Code": found["Code"] or str(response.status), "Message": found["Message"] or response.reason or text[:200]}
    return ClientError({"Error": error, "ResponseMetadata": {"HTTPStatusCode": response.status}}, verb)


__all__ = ["Connections", "Reply"]
