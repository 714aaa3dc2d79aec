"""A real S3 server for tests: SeaweedFS, one process, one folder, from an environment of its own (KEEPSTEP_S3_VENV)."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from keepstep.storage.errors import StoreError
from keepstep.storage.store import StorageOptions, Store

ROOT = Path(__file__).resolve().parents[1]
BUCKET = "demo"
KEY, SECRET = "AKKEEPSTEPTESTS", "secret-of-the-tests"
READY_S = 30.0
GRPC = 10_000  # SeaweedFS adds it to each port
SERVICES = {"s3.port": 0, "master.port": 1000, "volume.port": 1001, "filer.port": 1002, "admin.port": 1003}


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """A running server. `environment`: what a child process needs in order to use `url`."""

    endpoint_url: str
    pid: int

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}"

    @property
    def options(self) -> StorageOptions:
        return StorageOptions(endpoint_url=self.endpoint_url, region="us-east-1", key=KEY, secret=SECRET)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }


def weed_binary() -> Path:
    """Skips the test where the server is not installed; fails on CI, where it must be."""
    binary = Path(os.environ.get("KEEPSTEP_S3_VENV", ROOT / ".build" / "s3venv")) / "bin" / "weed"
    if binary.exists():
        return binary
    reason = f"no S3 server at {binary}: run `make install`, or set KEEPSTEP_S3_VENV"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def running_s3_server() -> Iterator[S3Server]:
    """An empty server with one bucket on free ports; killed by its pid at the end."""
    binary = weed_binary()
    with tempfile.TemporaryDirectory(prefix="keepstep-s3-") as folder:
        process, port = _start(binary, Path(folder), _free_port())
        try:
            server = S3Server(endpoint_url=f"http://127.0.0.1:{port}", pid=process.pid)
            _wait_until_ready(server, process, Path(folder))
            yield server
        finally:
            process.kill()
            process.wait(timeout=30)


def _start(binary: Path, folder: Path, port: int) -> tuple[subprocess.Popen[bytes], int]:
    ports = [f"-{name}={port + offset}" for name, offset in SERVICES.items()]
    fixed = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false"]
    policy = ["-admin.ui=false", "-s3.autoCreateBucket=false", "-s3.allowDeleteBucketNotEmpty=false", f"-bucket={BUCKET}"]
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "GOMEMLIMIT": "300MiB"}
    command = [str(binary), "-logtostderr=true", "mini", f"-dir={folder / 'data'}", *fixed, *ports, *policy]
    (folder / "data").mkdir()
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True), port


def _wait_until_ready(server: S3Server, process: subprocess.Popen[bytes], folder: Path) -> None:
    store = Store.open(server.url, server.options)
    until = time.monotonic() + READY_S
    while time.monotonic() < until and process.poll() is None:
        if _listens(server) and _answers(store):
            return
        threading.Event().wait(0.05)
    pytest.fail(f"the S3 server did not get ready: {(folder / 'log').read_text(errors='replace')[-2000:]}")


def _listens(server: S3Server) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", int(server.endpoint_url.rpartition(":")[2]))) == 0


def _answers(store: Store) -> bool:
    try:
        store.put("ready", b"")
        store.delete("ready")
    except StoreError:
        return False
    return True


def _free_port() -> int:
    """The first of a block of ports that are all free now, gRPC ports included."""
    choice = random.SystemRandom()
    for _ in range(100):
        port = choice.randrange(20_000, 44_000)
        if all(_is_free(port + offset + extra) for offset in SERVICES.values() for extra in (0, GRPC)):
            return port
    raise RuntimeError("no block of free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
