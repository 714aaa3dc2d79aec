"""What all tests share."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite", action="store_true", help="accept what golden files say now; only commit the diff if you understand what caused it"
    )


@pytest.fixture
def rewrite(request: pytest.FixtureRequest) -> bool:
    """True where golden files are to be written instead of compared."""
    return bool(request.config.getoption("--rewrite"))
