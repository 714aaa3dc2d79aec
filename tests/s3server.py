"""Real S3 servers for tests, from an environment of their own (KEEPSTEP_S3_VENV): SeaweedFS, one process, one folder, and rclone's, which
ignores conditional writes."""

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
from urllib.parse import urlsplit

import pytest

from keepstep.storage.errors import StoreError
from keepstep.storage.store import StorageOptions, Store

ROOT = Path(__file__).resolve().parents[1]
BUCKET = "demo"
KEY, SECRET = "AKKEEPSTEPTESTS", "secret-of-the-tests"
READY_S = 30.0
GRPC = 10_000  # SeaweedFS adds it to each port
SERVICES = {"s3.port": 0, "s3.port.https": 1, "master.port": 1000, "volume.port": 1001, "filer.port": 1002, "admin.port": 1003}


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """A running server. `environment`: what a child process needs in order to use `url`."""

    endpoint_url: str
    pid: int
    ca_file: str = ""  # of the authority that signed its certificate

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}"

    @property
    def options(self) -> StorageOptions:
        return StorageOptions(endpoint_url=self.endpoint_url, region="us-east-1", key=KEY, secret=SECRET, ca_file=self.ca_file)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            **({"AWS_CA_BUNDLE": self.ca_file} if self.ca_file else {}),
        }


@dataclass(frozen=True, slots=True)
class Certificate:
    """PEM files of a server on 127.0.0.1, and of the private authority that signed it."""

    ca: Path
    cert: Path
    key: Path


def make_certificate(folder: Path) -> Certificate:
    """A private authority and what it signed, through openssl."""
    made = Certificate(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    signed = ["-CA", str(made.ca), "-CAkey", str(folder / "ca.key"), "-addext", "subjectAltName=IP:127.0.0.1", "-subj", "/CN=server"]
    ca = ["-subj", "/CN=tests", "-keyout", str(folder / "ca.key"), "-out", str(made.ca)]
    server = [*signed, "-addext", "basicConstraints=critical,CA:FALSE", "-keyout", str(made.key), "-out", str(made.cert)]
    for arguments in (ca, server):
        subprocess.run([*new, *arguments], check=True, capture_output=True, timeout=30)
    return made


def server_binary(name: str) -> Path:
    """Skips the test where the server is not installed; fails on CI, where it must be."""
    binary = Path(os.environ.get("KEEPSTEP_S3_VENV", ROOT / ".build" / "s3venv")) / "bin" / name
    if binary.exists():
        return binary
    reason = f"no S3 server at {binary}: run `make install`, or set KEEPSTEP_S3_VENV"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def running_s3_server(certificate: Certificate | None = None, *, memory: str = "300MiB", address: str = "127.0.0.1") -> Iterator[S3Server]:
    """An empty SeaweedFS with one bucket on free ports, over TLS with a certificate; killed by its pid at the end.

    With large objects a server short of memory collects garbage instead of serving: give it more to measure it.
    """
    binary, port = server_binary("weed"), _free_port()
    with tempfile.TemporaryDirectory(prefix="keepstep-s3-") as folder:
        (Path(folder) / "data").mkdir()
        command = [str(binary), *_weed_arguments(Path(folder) / "data", address, port, certificate)]
        environment = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "GOMEMLIMIT": memory}
        url = f"https://{address}:{port + 1}" if certificate else f"http://{address}:{port}"
        with _running(command, environment, Path(folder), url, certificate) as server:
            yield server


@contextlib.contextmanager
def running_rclone() -> Iterator[S3Server]:
    """rclone's S3 server on a folder: everybody wins a conditional write."""
    binary, port = server_binary("rclone"), _free_port()
    with tempfile.TemporaryDirectory(prefix="keepstep-rclone-") as folder:
        (Path(folder) / "data" / BUCKET).mkdir(parents=True)
        address = ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", "--config", ""]
        command = [str(binary), "serve", "s3", *address, f"{folder}/data"]
        with _running(command, {}, Path(folder), f"http://127.0.0.1:{port}", None) as server:
            yield server


def _weed_arguments(data: Path, address: str, port: int, certificate: Certificate | None) -> list[str]:
    ports = [f"-{name}={port + offset}" for name, offset in SERVICES.items() if certificate or name != "s3.port.https"]
    fixed = [f"-ip={address}", f"-ip.bind={address}", "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false"]
    policy = ["-admin.ui=false", "-s3.autoCreateBucket=false", "-s3.allowDeleteBucketNotEmpty=false", f"-bucket={BUCKET}"]
    tls = [f"-s3.cert.file={certificate.cert}", f"-s3.key.file={certificate.key}"] if certificate else []
    return ["-logtostderr=true", "mini", f"-dir={data}", *fixed, *ports, *policy, *tls]


@contextlib.contextmanager
def _running(
    command: list[str], environment: dict[str, str], folder: Path, url: str, certificate: Certificate | None
) -> Iterator[S3Server]:
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment}, start_new_session=True)
    try:
        server = S3Server(endpoint_url=url, pid=process.pid, ca_file=str(certificate.ca) if certificate else "")
        _wait_until_ready(server, process, folder)
        yield server
    finally:
        process.kill()
        process.wait(timeout=30)


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
        endpoint = urlsplit(server.endpoint_url)
        return sock.connect_ex((endpoint.hostname, endpoint.port)) == 0


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
