"""Two hundred reigns killed at named points, on a file system and on S3: each successor lands on the newest committed step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from killed import SAVING, TAKING_OVER
from s3server import S3Server

PROGRAM = Path(__file__).parents[1] / "killed.py"
PROGRAMS, LIVES, KILLS = 2, 10, 5  # at a time, roots of each, kills on each root
PATIENCE_S = 800


def run_program(url: str, first_seed: int, environment: dict[str, str]) -> list[dict[str, Any]]:
    """What it says of each kill."""
    command = [sys.executable, str(PROGRAM), url, *map(str, (first_seed, LIVES, KILLS))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, env={**os.environ, **environment})
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def a_hundred_kills(url: str, first_seed: int, environment: dict[str, str]) -> None:
    """At every point, of runs that got somewhere."""
    with ThreadPoolExecutor(PROGRAMS) as pool:
        found = pool.map(lambda seed: run_program(url, seed, environment), (first_seed, first_seed + LIVES * KILLS))
        kills = [kill for of_program in found for kill in of_program]
    assert len(kills) == 100
    assert {kill["point"] for kill in kills} == {*SAVING, *TAKING_OVER}, "a point was never drawn"
    assert kills[-1]["committed"] > KILLS


@pytest.mark.slow
def test_a_hundred_kills_on_a_file_system(tmp_path: Path) -> None:
    a_hundred_kills(str(tmp_path), 0, {})


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.timeout(900)  # 45 s on two free cores
def test_a_hundred_kills_on_s3(s3_server: S3Server) -> None:
    a_hundred_kills(s3_server.url, 1000, s3_server.environment)
