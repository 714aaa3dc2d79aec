"""Stores that must not hold a run, and what they are told."""

from __future__ import annotations

import os
import threading
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from s3server import KEY, S3Server, make_certificate, running_rclone, running_s3_server

from keepstep.storage.errors import NotFound, StoreForbidden, StoreRefused, StoreUnavailable
from keepstep.storage.remote import FsspecStore, MemoryStore
from keepstep.storage.retry import RetryPolicy
from keepstep.storage.store import StorageOptions, Store
from keepstep.storage.uploads import PART_BYTES


class StoreThatIgnoresConditions(MemoryStore):
    """As rclone's S3 server, Garage and SeaweedFS before 3.97 do: everybody wins."""

    def put_new(self, key: str, body: bytes) -> bool:
        self.put(key, body)
        return True


class StoreThatRaces(MemoryStore):
    """Looks first and writes then: two writers in a row are fine, two at once are not."""

    def __init__(self, path: str, writers: int) -> None:
        super().__init__(path)
        self._all_looked = threading.Barrier(writers)

    def put_new(self, key: str, body: bytes) -> bool:
        is_there = self.exists(key)
        if key.endswith("race"):
            self._all_looked.wait(timeout=30)
        if is_there:
            return self.get(key) == body
        self.put(key, body)
        return True


class StoreThatRemembers(MemoryStore):
    """Eventually consistent: a read may still give what was there before."""

    def get(self, key: str) -> bytes:
        return b"old" if key.endswith("small") else super().get(key)


class TestProbe:
    def test_a_store_that_ignores_the_condition_is_refused_with_the_remedy(self) -> None:
        store = StoreThatIgnoresConditions(uuid.uuid4().hex)
        with pytest.raises(StoreRefused, match=r"memory://\w+ ignores the condition .* use a store with conditional writes"):
            store.probe()
        assert list(store.list()) == []

    def test_a_store_that_looks_and_then_writes_is_refused(self) -> None:
        with pytest.raises(StoreRefused, match="of 8 writers of one new object 8 were told that they won"):
            StoreThatRaces(uuid.uuid4().hex, writers=8).probe()

    def test_a_store_without_read_after_write_is_refused(self) -> None:
        with pytest.raises(StoreRefused, match=r"does not return what was just written \(read back\)"):
            StoreThatRemembers(uuid.uuid4().hex).probe()


class TestFolders:
    def test_a_root_that_is_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "root").write_text("x")
        with pytest.raises(StoreRefused, match="root is a file, not a folder; correct run"):
            Store.open(tmp_path / "root").probe()

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_root_that_cannot_be_written_is_refused_with_the_remedy(self, tmp_path: Path) -> None:
        (tmp_path / "root").mkdir(mode=0o500)
        with pytest.raises(StoreRefused, match="give this user permission"):
            Store.open(tmp_path / "root").probe()

    def test_a_torn_line_spoils_only_itself(self, tmp_path: Path) -> None:
        store = Store.open(tmp_path)
        (tmp_path / "events.jsonl").write_bytes(b'{"a":1}\n{"to')
        assert list(store.read_records("events.jsonl")) == [{"a": 1}]
        store.append("events.jsonl", b'{"b":2}')
        assert list(store.read_records("events.jsonl")) == [{"a": 1}, {"b": 2}]

    def test_what_a_killed_writer_left_is_never_listed(self, tmp_path: Path) -> None:
        (tmp_path / "log").mkdir()
        (tmp_path / "log" / f".new-{uuid.uuid4().hex}").write_bytes(b"half")
        assert list(Store.open(tmp_path).list()) == []

    def test_what_a_killed_writer_left_is_swept_when_it_is_old_enough(self, tmp_path: Path) -> None:
        store = Store.open(tmp_path)
        store.put("log/0", b"x")
        left = tmp_path / "log" / f".new-{uuid.uuid4().hex}"
        left.write_bytes(b"half")
        assert store.sweep(3600) == 0
        assert left.exists()
        assert store.sweep(-3600) == 1
        assert [path.name for path in (tmp_path / "log").iterdir()] == ["0"]

    def test_a_file_url_is_the_same_folder(self, tmp_path: Path) -> None:
        Store.open(f"file://{tmp_path}").put("x", b"1")
        assert Store.open(str(tmp_path)).get("x") == b"1"


class TestOtherFileSystems:
    """What fsspec can open is no root for that: those that cannot hold a run say so before anything is written, or in the probe."""

    @pytest.mark.parametrize("url", ["zip://x.zip", "dir://x", "reference://x", "http://x/y", "data://x"])
    def test_a_file_system_that_cannot_create_is_refused_with_a_sentence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises((ValueError, StoreRefused), match=r"run\.root"):
            Store.open(url, StorageOptions(deadline_s=0.2)).probe()
        assert list(tmp_path.iterdir()) == []

    def test_a_file_system_that_ignores_mode_create_is_refused(self) -> None:
        class Overwriting(MemoryFileSystem):
            def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
                super().pipe_file(path, value, mode="overwrite", **kwargs)

        store = FsspecStore("odd://x", Overwriting(), f"/{uuid.uuid4().hex}", RetryPolicy())
        with pytest.raises(StoreRefused, match="odd://x ignores the condition of a conditional write"):
            store.probe()

    def test_a_store_that_inverts_the_condition_is_refused(self) -> None:
        class Inverting(MemoryStore):
            def put_new(self, key: str, body: bytes) -> bool:
                is_there = self.exists(key)
                if is_there:
                    self.put(key, body)
                return is_there

        with pytest.raises(StoreRefused, match="the first writer of a new object was told that it exists"):
            Inverting(uuid.uuid4().hex).probe()

    @pytest.mark.parametrize("prefix", ["", "file://", "local://"])
    def test_a_path_and_the_urls_of_local_files_are_the_same_folder(self, tmp_path: Path, prefix: str) -> None:
        store = Store.open(f"{prefix}{tmp_path}/root")
        store.probe()
        assert store.local_path("log/0") == tmp_path / "root" / "log" / "0"


@pytest.mark.s3
@pytest.mark.slow
def test_a_real_server_that_ignores_the_condition_is_refused() -> None:
    """rclone's: of 16 writers of one object 16 win, and everything else works."""
    with running_rclone() as server:
        store = Store.open(f"{server.url}/x", server.options)
        with pytest.raises(StoreRefused, match=r"s3://demo/x ignores the condition .*If-None-Match.* use a store with conditional writes"):
            store.probe()


@pytest.mark.s3
@pytest.mark.slow
class TestTls:
    def test_a_private_authority_is_trusted_when_it_is_named_and_only_then(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with running_s3_server(make_certificate(tmp_path)) as server:
            store = Store.open(f"{server.url}/x", server.options)
            store.put("x", b"1")
            assert store.get("x") == b"1"
            assert store._quick._rests_until < 0, "obstore was given up"  # type: ignore[attr-defined]
            body = bytes(range(256)) * (PART_BYTES // 256 + 1)
            store.write_file("large", [body], num_bytes=len(body))
            assert store.get_range("large", 255, len(body)) == body[255:]
            with pytest.raises(StoreRefused, match="certificate verify failed"):
                Store.open(f"{server.url}/x", replace(server.options, ca_file="")).probe()
            for name, value in server.environment.items():
                monkeypatch.setenv(name, value)
            assert Store.open(f"{server.url}/x").get("x") == b"1"


@pytest.mark.s3
@pytest.mark.slow
class TestS3:
    def options(self, server: S3Server, **changes: object) -> StorageOptions:
        given = {"endpoint_url": server.endpoint_url, "region": "us-east-1", "key": KEY, "secret": server.options.secret, "deadline_s": 2.0}
        return StorageOptions(**(given | changes))  # type: ignore[arg-type]

    def test_a_missing_bucket_is_refused_with_the_remedy(self, s3_server: S3Server) -> None:
        store = Store.open("s3://no-such-bucket/x", self.options(s3_server, deadline_s=20.0))
        with pytest.raises(StoreRefused, match=r"bucket does not exist.*create the bucket"):
            store.probe()
        with pytest.raises(NotFound):
            store.get("x")

    def test_wrong_credentials_are_refused_with_the_remedy(self, s3_server: S3Server) -> None:
        store = Store.open(f"{s3_server.url}/x", self.options(s3_server, secret="wrong", deadline_s=20.0))
        with pytest.raises(StoreRefused, match="correct the credentials"):
            store.probe()
        with pytest.raises(StoreForbidden):
            store.put("x", b"")

    def test_a_server_that_does_not_answer_is_tried_until_the_deadline(self, s3_server: S3Server) -> None:
        store = Store.open("s3://demo/x", self.options(s3_server, endpoint_url="http://127.0.0.1:9", deadline_s=0.3))
        with pytest.raises(StoreUnavailable, match="tries, the last one said"):
            store.get("x")
        with pytest.raises(StoreRefused, match="check address, network and time-outs"):
            store.probe()

    @pytest.mark.parametrize("source", ["variables", "variables of S3 alone", "a profile"])
    def test_the_environment_alone_is_enough(
        self, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str
    ) -> None:
        for name, value in environment(s3_server, tmp_path, source).items():
            monkeypatch.setenv(name, value)
        store = Store.open(f"{s3_server.url}/{uuid.uuid4().hex}")
        store.put("x", b"1")
        assert store.get("x") == b"1"

    def test_uploads_that_a_killed_process_left_are_swept_with_their_folder(self, s3_server: S3Server) -> None:
        prefix = uuid.uuid4().hex
        store = Store.open(f"{s3_server.url}/{prefix}", s3_server.options)
        filesystem = store._client.filesystem  # type: ignore[attr-defined]
        filesystem.call_s3("create_multipart_upload", Bucket="demo", Key=f"{prefix}/data/a/x")
        store.delete_tree("data/a")
        left = filesystem.call_s3("list_multipart_uploads", Bucket="demo", Prefix=prefix)
        assert left.get("Uploads", []) == []

    def test_old_uploads_are_swept_below_our_root_only(self, s3_server: S3Server) -> None:
        prefix = uuid.uuid4().hex
        store = Store.open(f"{s3_server.url}/{prefix}", s3_server.options)
        filesystem = store._client.filesystem  # type: ignore[attr-defined]
        for key in (f"{prefix}/data/a/x", f"{prefix}-other/x"):
            filesystem.call_s3("create_multipart_upload", Bucket="demo", Key=key)
        assert store.sweep(3600) == 0
        assert store.sweep(-3600) == 1
        left = filesystem.call_s3("list_multipart_uploads", Bucket="demo", Prefix=prefix)
        assert [upload["Key"] for upload in left["Uploads"]] == [f"{prefix}-other/x"]

    def test_what_one_client_wrote_another_reads_at_once(self, s3_server: S3Server) -> None:
        prefix = uuid.uuid4().hex
        writer, reader = (Store.open(f"{s3_server.url}/{prefix}", s3_server.options) for _ in range(2))
        for number in range(10):
            assert writer.put_new(f"log/{number}", b"%d" % number)
            assert reader.get(f"log/{number}") == b"%d" % number


def environment(server: S3Server, folder: Path, source: str) -> dict[str, str]:
    """Where a user may have written down how to reach the server."""
    known = server.environment
    if source == "variables":
        return known
    keys = {name: known[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    if source == "variables of S3 alone":
        return {**keys, "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ENDPOINT_URL_S3": server.endpoint_url, "AWS_REGION": "us-east-1"}
    lines = [
        "[profile cluster]",
        f"endpoint_url = {server.endpoint_url}",
        "region = us-east-1",
        *(f"{k.lower()} = {v}" for k, v in keys.items()),
    ]
    (folder / "config").write_text("\n".join(lines))
    return {"AWS_CONFIG_FILE": str(folder / "config"), "AWS_PROFILE": "cluster"}
