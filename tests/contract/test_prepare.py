"""`prepare` on every kind of store: the same bytes in each, killed or not; and text that lies in S3."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from pathlib import Path

import pytest
from s3server import S3Server

from keepstep.storage.store import ENV_OPTIONS, Store
from keepstep.trainer import encoding, spool
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.index import FOLDER
from keepstep.trainer.preparing import prepare


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For token files of a kilobyte."""
    monkeypatch.setattr(encoding, "MEGABYTE", 1024)
    monkeypatch.setattr(spool, "HASHED_BYTES", 256)
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} " + "of words " * (i % 9)}) + "\n" for i in range(120)))
    return path


def config(source: str) -> TrainerConfig:
    data = {"source": source, "tokenizer": "words", "vocabulary": 600, "held_out": 0.2, "shard_mb": 1}
    return TrainerConfig.model_validate({"data": data})


def content(store: Store) -> dict[str, bytes]:
    return {key: store.get(key) for key in store.list(FOLDER)}


class Killed(BaseException):
    """As if the process were gone."""


def test_every_store_holds_the_same_bytes_and_a_killed_one_goes_on(
    store: Store, text: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Store.open(tmp_path_factory.mktemp("expected"))
    prepare(config(str(text)), expected)
    left, write_file = [9], type(store).write_file

    def dying(self: Store, key: str, blocks: Iterable[bytes | memoryview], *, num_bytes: int, sync: bool = True) -> None:
        left[0] -= 1
        if not left[0]:
            raise Killed
        write_file(self, key, blocks, num_bytes=num_bytes, sync=sync)

    monkeypatch.setattr(type(store), "write_file", dying)
    with pytest.raises(Killed):
        prepare(config(str(text)), store)
    assert any(key.startswith(f"{FOLDER}/unit-") for key in store.list(FOLDER))
    prepare(config(str(text)), store)
    assert content(store) == content(expected)


@pytest.mark.s3
@pytest.mark.slow
def test_text_in_s3_is_read_where_the_root_is(s3_server: S3Server, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_OPTIONS, s3_server.options.to_json())
    folder = f"{s3_server.url}/{uuid.uuid4().hex}"
    remote = Store.open(folder, s3_server.options)
    remote.put("text/a.jsonl", text.read_bytes())
    remote.put("text/b/c.txt", b"one more\n")
    local = tmp_path / "text"
    (local / "b").mkdir(parents=True)
    (local / "a.jsonl").write_bytes(text.read_bytes())
    (local / "b/c.txt").write_bytes(b"one more\n")
    one = prepare(config(f"{folder}/text"), Store.open(tmp_path / "one"))
    other = prepare(config(str(local)), Store.open(tmp_path / "other"))
    assert (one.train, one.held_out, one.report) == (other.train, other.held_out, other.report)
    with pytest.raises(ValueError, match=r"data.source = 's3://.*/nothing' does not exist"):
        prepare(config(f"{folder}/nothing"), Store.open(tmp_path / "none"))
