"""The stores that every contract test runs against: memory, a folder, and a real S3 server."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3server import S3Server, running_s3_server

from keepstep.storage.store import Store


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with running_s3_server() as server:
        yield server


@pytest.fixture(params=["memory", "file", pytest.param("s3", marks=[pytest.mark.s3, pytest.mark.slow])])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty root."""
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        return Store.open(f"{server.url}/{uuid.uuid4().hex}", server.options)
    return Store.open(tmp_path / "root" if request.param == "file" else f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: a Unix socket's path has at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="ks-"))
    yield path
    shutil.rmtree(path)
