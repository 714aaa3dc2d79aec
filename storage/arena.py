"""The rank's side of staging: copy into shared memory, hand it over, train on. The persister (persister.py) does the rest.

    staging = Staging.connect(socket_path, attempt=3, rank=0, world_size=4)
    staging.reserve(num_bytes)                          # once, before the first step: both buffers allocated and touched
    buffer = staging.buffer(num_bytes, template=layout) # None while the last checkpoint is still being written: postpone
    ...fill buffer.view; headers only when buffer.fresh...
    staging.submit(directory=..., step=..., files=..., tensors=..., state=...)
    staging.busy                                        # until its bytes and its rank index are durable

The buffers belong to the persister: what a rank submitted is made durable and stays readable (`resident`) even if the rank is killed.
What it was still filling is read by nobody, and its buffer is given to nobody again (sequence.py guards the rest).
Whatever goes wrong over there shows in `last_error`, and never as an exception: a sick store must not stop the training.
"""

from __future__ import annotations

import mmap
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from .errors import StoreError, TornStage
from .frames import Disconnected, FrameSocket, Message
from .manifest import TensorEntry, tensor_fields
from .sequence import HEADER_BYTES, SequenceLock
from .vectored import read_at

REPLY_DEADLINE_S: Final = 120.0  # an allocation touches every page: seconds for many gigabytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedFile:
    """A file of the checkpoint: `num_bytes` from `offset` of the buffer."""

    name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """Shared memory to fill. `fresh`: it does not hold a submission of the same template, so headers must be written again."""

    view: memoryview
    fresh: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mapped:
    view: memoryview
    lock: SequenceLock


@dataclass(frozen=True, slots=True, kw_only=True)
class _Filling:
    buffer: int
    template: str
    lock: SequenceLock
    odd: int


class ResidentFile:
    """A file of a checkpoint in this node's memory, read like a file: mapping it would cost as much as reading it."""

    def __init__(self, descriptor: int, offset: int, num_bytes: int) -> None:
        self._descriptor, self._offset, self.num_bytes = descriptor, offset, num_bytes

    def read_into(self, start: int, *destinations: memoryview) -> int:
        """Fills memory, one destination after the other, from byte `start` on; the number of bytes read. Thread-safe."""
        return read_at(self._descriptor, self._offset + start, destinations)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def __del__(self) -> None:
        self.close()


class Staging:
    """A rank's connection to the persister of its node. For one thread.

    Attributes:
        last_error: why the newest submission did not become durable, or why the persister cannot be reached; "" when all is well.
    """

    def __init__(self, frames: FrameSocket, *, is_busy: bool) -> None:
        self._frames: FrameSocket | None = frames
        self._is_busy = is_busy
        self._mapped: dict[int, _Mapped] = {}
        self._filling: _Filling | None = None
        self._sent_tensors: tuple[TensorEntry, ...] | None = None
        self.last_error = ""

    @staticmethod
    def connect(socket_path: str | Path, *, attempt: int, rank: int, world_size: int, deadline_s: float = 10.0) -> Staging:
        """Raises StoreError when the persister is not there or does not take this rank (a newer attempt is connected)."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(deadline_s)
            sock.connect(os.fspath(socket_path))
            frames = FrameSocket(sock)
            frames.send({"kind": "hello", "attempt": attempt, "rank": rank, "world_size": world_size}, deadline_s=deadline_s)
            answer = frames.receive(deadline_s)
        except (OSError, Disconnected) as error:
            sock.close()
            raise StoreError(f"cannot reach the persister at {socket_path}: {error}") from error
        if answer is None or answer["kind"] != "welcome":
            sock.close()
            raise StoreError(f"the persister at {socket_path} refused rank {rank}: {answer['why'] if answer else 'no answer'}")
        return Staging(frames, is_busy=answer["busy"])

    @property
    def busy(self) -> bool:
        """Whether the last submission is still being written. No round trip."""
        self._pump()
        return self._is_busy

    def reserve(self, num_bytes: int) -> None:
        """Allocates, touches and maps both buffers now, so that no checkpoint pays for it. Errors show in `last_error`."""
        answer = self._request({"kind": "reserve", "bytes": num_bytes, "known": sorted(self._mapped)})
        while answer is not None and answer["kind"] == "mapped":
            self._map(answer)
            answer = self._next_answer()

    def buffer(self, num_bytes: int, template: str = "") -> Buffer | None:
        """A buffer to fill and submit; None while busy, without memory, or without a persister.

        Args:
            template: names the layout of everything but the tensors' bytes; when the buffer's last submission had the same
                template and size, its headers still stand and `fresh` is false. "" never matches.
        """
        if self.busy:
            return None
        answer = self._request({"kind": "buffer", "bytes": num_bytes, "template": template, "known": sorted(self._mapped)})
        if answer is None or answer["kind"] != "mapped":
            return None
        mapped = self._map(answer)
        self._filling = _Filling(buffer=answer["buffer"], template=template, lock=mapped.lock, odd=mapped.lock.begin())
        return Buffer(view=mapped.view[:num_bytes], fresh=answer["fresh"])

    def submit(
        self,
        *,
        directory: str,
        step: int,
        files: Sequence[StagedFile],
        tensors: Sequence[TensorEntry],
        state: Mapping[str, Any],
        patience_s: float = 0.0,
    ) -> None:
        """Hands the buffer over: its bytes must not be touched until `buffer` gives it out again.

        Args:
            tensors: sent once as long as the same tuple comes again: for thousands of tensors that is the larger part of the message.
            patience_s: how long the persister tries again where storage is in the way, for a checkpoint that has no successor. Without
                it one failure gives the buffer back: a later step is worth more than this one.
        """
        assert self._filling is not None, "submit without a buffer"
        filling, self._filling = self._filling, None
        try:
            sequence = filling.lock.end(filling.odd)
        except TornStage as error:
            self.last_error = str(error)
            return
        tensors = tuple(tensors)
        message: Message = {
            "kind": "submit",
            "buffer": filling.buffer,
            "sequence": sequence,
            "template": filling.template,
            "directory": directory,
            "step": step,
            "files": [asdict(file) for file in files],
            "tensors": None if tensors is self._sent_tensors else [tensor_fields(tensor) for tensor in tensors],
            "state": dict(state),
            "patience_s": patience_s,
        }
        self._is_busy = self._send(message)
        self._sent_tensors = tensors

    def record_step(self, record: Mapping[str, Any]) -> None:
        """Rank 0 only. One JSON line for the attempt's steps file; durable before any checkpoint submitted after it. Never waits."""
        if self._frames is None:
            return
        try:
            self._frames.post({"kind": "step", "record": dict(record)})
        except Disconnected as error:
            self._lost(error)

    def wait_idle(self, deadline_s: float) -> bool:
        """Waits until the last submission is durable or has failed; true if nothing is in flight and nothing failed."""
        until = time.monotonic() + deadline_s
        while self._is_busy and (left := until - time.monotonic()) > 0:
            self._pump(left)
        return not self._is_busy and not self.last_error

    def resident(self, directory: str, file_name: str) -> ResidentFile | None:
        """A file of a checkpoint that is still in this node's memory, whichever local rank staged it; else None.

        Its bytes are not verified. They stay until that rank asks for its next buffer but one: use it before training begins.
        """
        answer = self._request({"kind": "resident", "directory": directory, "file": file_name})
        if answer is None or answer["kind"] != "resident":
            return None
        assert self._frames is not None
        return ResidentFile(self._frames.take_descriptor(), answer["offset"], answer["bytes"])

    def close(self) -> None:
        """Leaves; what was submitted is still made durable. Views stay valid as long as somebody holds them."""
        if self._frames is not None:
            self._frames.close()
        self._frames = None
        self._mapped.clear()

    def _map(self, answer: Message) -> _Mapped:
        number: int = answer["buffer"]
        if answer["descriptor"]:
            assert self._frames is not None
            self._mapped[number] = _map_descriptor(self._frames.take_descriptor(), answer["bytes"])
        if (replaced := answer["replaced"]) is not None:
            self._mapped.pop(replaced, None)
        return self._mapped[number]

    def _request(self, message: Message) -> Message | None:
        return self._next_answer() if self._send(message) else None

    def _send(self, message: Message) -> bool:
        if self._frames is None:
            return False
        try:
            self._frames.send(message)
        except (Disconnected, TimeoutError) as error:
            self._lost(error)
            return False
        return True

    def _next_answer(self) -> Message | None:
        """The next message that answers a request; news that come in between are taken note of."""
        until = time.monotonic() + REPLY_DEADLINE_S
        while self._frames is not None:
            try:
                message = self._frames.receive(until - time.monotonic())
            except Disconnected as error:
                self._lost(error)
                return None
            if message is None:
                self._lost(TimeoutError(f"no answer within {REPLY_DEADLINE_S:g} s"))
            elif message["kind"] == "error":
                self.last_error = message["why"]
                return message
            elif not self._note(message):
                return message
        return None

    def _pump(self, timeout_s: float = 0.0) -> None:
        """Takes note of what has arrived; waits for the first news up to `timeout_s`."""
        try:
            while self._frames is not None and (message := self._frames.receive(timeout_s)) is not None:
                self._note(message)
                timeout_s = 0.0
        except Disconnected as error:
            self._lost(error)

    def _note(self, message: Message) -> bool:
        if message["kind"] != "done":
            return False
        self._is_busy = False
        self.last_error = message["why"]
        return True

    def _lost(self, error: Exception) -> None:
        """The agent notices a dead persister by itself; here the rank only stops staging."""
        self.last_error = f"the persister of this node is gone: {error}"
        self._is_busy = False
        self.close()


def _map_descriptor(descriptor: int, num_bytes: int) -> _Mapped:
    """Pages are allocated already; MAP_POPULATE enters them into this process' page table, so that the first copy does not fault."""
    try:
        view = memoryview(mmap.mmap(descriptor, num_bytes + HEADER_BYTES, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))
    finally:
        os.close(descriptor)
    return _Mapped(view=view[:num_bytes], lock=SequenceLock(view[num_bytes:]))
