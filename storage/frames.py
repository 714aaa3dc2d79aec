"""JSON messages and file descriptors between a rank and its node's persister, over a Unix stream socket.

A frame is four bytes of length and that much JSON. Descriptors travel with the first byte of their frame, so they are here when it is.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

Message = dict[str, Any]

_LENGTH: Final = struct.Struct("<I")
_READ_BYTES: Final = 1 << 18
_MAX_DESCRIPTORS: Final = 4


class Disconnected(Exception):
    """The other side is gone."""


class FrameSocket:
    """One end of the conversation. One thread receives; several may send."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._received = bytearray()
        self._descriptors: deque[int] = deque()
        self._unsent = bytearray()
        self._send_lock = threading.Lock()

    def send(self, message: Message, descriptors: Sequence[int] = (), *, deadline_s: float = 60.0) -> None:
        """Raises Disconnected; TimeoutError when the other side does not read."""
        until = time.monotonic() + deadline_s
        with self._send_lock:
            self._flush(until)
            frame = _frame(message)
            if descriptors:
                frame = frame[self._send_descriptors(frame, descriptors, until) :]
            self._unsent += frame
            self._flush(until)

    def post(self, message: Message) -> None:
        """Sends as much as goes without waiting; the rest goes with later calls. Raises Disconnected."""
        with self._send_lock:
            self._unsent += _frame(message)
            self._flush(until=0.0, wait=False)

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message; None when none came in time (None: wait for ever). Raises Disconnected."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while (message := self._take_frame()) is None:
            if not self._wait(select.POLLIN, until):
                return None
            self._read()
        return message

    def take_descriptor(self) -> int:
        """The descriptor that came with the message just received; the caller closes it."""
        return self._descriptors.popleft()

    def shutdown(self) -> None:
        """Ends the conversation from any thread; a waiting `receive` raises Disconnected."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it ended already

    def close(self) -> None:
        self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def _take_frame(self) -> Message | None:
        if len(self._received) < _LENGTH.size:
            return None
        end = _LENGTH.size + _LENGTH.unpack_from(self._received)[0]
        if len(self._received) < end:
            return None
        message: Message = json.loads(self._received[_LENGTH.size : end])
        del self._received[:end]
        return message

    def _read(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, _READ_BYTES, _MAX_DESCRIPTORS)
        except BlockingIOError:
            return
        except OSError as error:
            raise Disconnected(str(error)) from error
        self._descriptors.extend(descriptors)
        if not data:
            raise Disconnected("the other side closed the connection")
        self._received += data

    def _send_descriptors(self, frame: bytes, descriptors: Sequence[int], until: float) -> int:
        while True:
            try:
                return socket.send_fds(self._socket, [frame], descriptors)
            except BlockingIOError:
                self._wait_writable(until)
            except OSError as error:
                raise Disconnected(str(error)) from error

    def _flush(self, until: float, *, wait: bool = True) -> None:
        while self._unsent:
            try:
                del self._unsent[: self._socket.send(self._unsent)]
            except BlockingIOError:
                if not wait:
                    return
                self._wait_writable(until)
            except OSError as error:
                raise Disconnected(str(error)) from error

    def _wait_writable(self, until: float) -> None:
        if not self._wait(select.POLLOUT, until):
            raise TimeoutError("the other side does not read")

    def _wait(self, event: int, until: float | None) -> bool:
        poll = select.poll()
        poll.register(self._socket, event)
        left_ms = None if until is None else max(0.0, until - time.monotonic()) * 1000
        return bool(poll.poll(left_ms))


def _frame(message: Message) -> bytes:
    body = json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode()
    return _LENGTH.pack(len(body)) + body
