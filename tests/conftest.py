"""What all tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, settings

# A test never measures time: no deadlines. CI draws the same examples every time, people new ones.
settings.register_profile("keepstep", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("keepstep")


# A shell that starts tests in the background has them ignore Ctrl-C, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", help="golden files: accept what is; commit the diff only if you understand it")
    parser.addoption("--seeds", type=int, default=200, help="simulation: so many simulated runs")
    parser.addoption("--first-seed", type=int, default=0, help="simulation: the first of their seeds")


@pytest.fixture
def rewrite(request: pytest.FixtureRequest) -> bool:
    """True where golden files are to be written instead of compared."""
    return bool(request.config.getoption("--rewrite"))


@pytest.fixture(autouse=True)
def _forget_memory_stores() -> Iterator[None]:
    """fsspec keeps all of them in one dictionary that every listing walks through: what is left there slows all later tests down."""
    yield
    MemoryFileSystem.store.clear()
