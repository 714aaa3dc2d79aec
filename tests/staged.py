"""Checkpoints for tests of staging: small, and different at every step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from keepstep.storage.arena import Buffer, StagedFile, Staging
from keepstep.storage.layout import checkpoint_directory
from keepstep.storage.manifest import TensorEntry

DEADLINE_S = 30.0
NUM_BYTES = 10_000


def directory_of(step: int, attempt: int = 1) -> str:
    return checkpoint_directory(attempt, step, "nonce")


def content_of(step: int, num_bytes: int = NUM_BYTES) -> bytes:
    return (bytes(range(251)) * (num_bytes // 251 + 2))[step % 251 :][:num_bytes]


def tensors_of(num_bytes: int) -> tuple[TensorEntry, ...]:
    return (
        TensorEntry(
            name="w",
            file="__0_0.distcp",
            offset=0,
            num_bytes=num_bytes,
            dtype="torch.uint8",
            shape=(num_bytes,),
            starts=(0,),
            global_shape=(num_bytes,),
        ),
    )


def stage(
    staging: Staging, step: int, *, attempt: int = 1, num_bytes: int = NUM_BYTES, template: str = "layout", patience_s: float = 0.0
) -> bool:
    """Fills a buffer and submits it; the buffer's freshness. Two files: a shard and something small behind it."""
    buffer = staging.buffer(num_bytes + 100, template)
    assert buffer is not None, staging.last_error
    stage_into(staging, buffer, step, attempt=attempt, num_bytes=num_bytes, patience_s=patience_s)
    return buffer.fresh


def stage_into(
    staging: Staging, buffer: Buffer, step: int, *, attempt: int = 1, num_bytes: int = NUM_BYTES, patience_s: float = 0.0
) -> None:
    buffer.view[:num_bytes] = content_of(step, num_bytes)
    buffer.view[num_bytes:] = b"m" * 100
    files = [
        StagedFile(name="__0_0.distcp", offset=0, num_bytes=num_bytes),
        StagedFile(name=".metadata", offset=num_bytes, num_bytes=100),
    ]
    staging.submit(
        directory=directory_of(step, attempt),
        step=step,
        files=files,
        tensors=tensors_of(num_bytes),
        state={"rng": step},
        patience_s=patience_s,
    )


def held(staging: Staging, directory: str, name: str) -> bytes | None:
    """A file in the node's memory."""
    file = staging.resident(directory, name)
    if file is None:
        return None
    body = bytearray(file.num_bytes)
    assert file.read_into(0, memoryview(body)) == len(body)
    file.close()
    return bytes(body)


def eventually(is_so: Callable[[], bool]) -> bool:
    until = time.monotonic() + DEADLINE_S
    while not is_so() and time.monotonic() < until:
        threading.Event().wait(0.01)
    return is_so()
