"""What tests of `prepare` share: a text of several kinds, what a root holds, and a store that ends everything while it is written to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from keepstep.storage.posix import PosixStore
from keepstep.trainer import corpus, encoding, spool
from keepstep.trainer.config import TrainerConfig


def config(source: Path | str, objective: str = "next-token", **more: object) -> TrainerConfig:
    data = {"source": str(source), "tokenizer": "bytes", "vocabulary": 600, "held_out": 0.2, "shard_mb": 1} | more
    return TrainerConfig.model_validate({"data": data, "train": {"objective": objective}})


def content(root: Path) -> dict[str, str]:
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def write_text(folder: Path) -> Path:
    """Ten text files, and 200 lines of JSONL."""
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.txt").write_text(f"Chapter {i}: in a hole in the ground there lived a hobbit. Ünïcödé too.\n" * (i + 3))
    (folder / "more.jsonl").write_text("".join(json.dumps({"text": f"line {i}: " + "word " * (i % 9)}) + "\n" for i in range(200)))
    return folder


def make_small(set_: Callable[[object, str, int], None] = setattr) -> None:
    """Token files of a kilobyte, lots of seven documents: many units."""
    set_(encoding, "MEGABYTE", 1024)
    set_(spool, "HASHED_BYTES", 256)
    set_(corpus, "_LOT_DOCUMENTS", 7)


class Killed(BaseException):
    """As if the process were gone: nobody catches it."""


class Dying(PosixStore):
    """Ends everything at its n-th write, which is half done then, or done."""

    def __init__(self, root: Path, at: int, *, half: bool, end: Callable[[], None]) -> None:
        super().__init__(root)
        self.left, self._half, self._end = at, half, end
        self.reads = 0

    def _dies(self) -> bool:
        self.left -= 1
        return self.left == 0

    def write_file(self, key: str, blocks: Iterable[bytes | memoryview], *, num_bytes: int, sync: bool = True) -> None:
        body, dies = b"".join(bytes(block) for block in blocks), self._dies()
        if dies and self._half:
            path = self.local_path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body[: num_bytes // 2])
            self._end()
        super().write_file(key, [body] if body else [], num_bytes=num_bytes, sync=sync)
        if dies:
            self._end()

    def put(self, key: str, body: bytes) -> None:
        self._around(lambda: super(Dying, self).put(key, body))

    def put_new(self, key: str, body: bytes) -> bool:
        done: list[bool] = []
        self._around(lambda: done.append(super(Dying, self).put_new(key, body)))
        return done[0]

    def delete(self, key: str) -> None:
        self._around(lambda: super(Dying, self).delete(key))

    def _around(self, write: Callable[[], None]) -> None:
        dies = self._dies()
        if dies and self._half:
            self._end()
        write()
        if dies:
            self._end()


def die() -> None:
    raise Killed
