"""What ranks printed: the lines that a verdict shows, and where they lie."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from keepstep.orchestrator.ranklogs import LINE_CHARACTERS, TAIL_BYTES, TAIL_LINES, RankLogs, tail
from keepstep.storage.layout import rank_log_key, rank_stacks_key
from keepstep.storage.store import Store


def test_the_last_lines_are_kept_empty_ones_left_out(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {i}\n\n" for i in range(20)))
    assert tail(log) == tuple(f"line {i}" for i in range(20 - TAIL_LINES, 20))


def test_what_an_earlier_attempt_printed_is_not_this_ones(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("earlier\n")
    start = log.stat().st_size
    assert tail(log, start) == ()
    with log.open("a") as file:
        file.write("ours\n")
    assert tail(log, start) == ("ours",)


def test_a_huge_log_and_a_huge_line_are_read_in_part(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * (3 * TAIL_BYTES) + b"\xff\nValueError: the end\n")
    first, last = tail(log)
    assert (len(first), last) == (LINE_CHARACTERS, "ValueError: the end")


def test_no_log_no_lines(tmp_path: Path) -> None:
    assert tail(tmp_path / "none") == ()


CRASH = """
import ctypes, faulthandler
faulthandler.enable()
def innermost():
    ctypes.string_at(0)
def outer(depth):
    outer(depth - 1) if depth else innermost()
outer(20)
"""


@pytest.mark.slow
def test_of_a_crash_in_native_code_the_place_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        subprocess.run([sys.executable, "-c", CRASH], stderr=file, check=False, timeout=60)
    lines = tail(log)
    assert lines[0] == "Fatal Python error: Segmentation fault"
    assert "in innermost" in "\n".join(lines)
    assert len(lines) == TAIL_LINES


def test_stacks_lie_beside_the_log_or_are_shipped_there(tmp_path: Path) -> None:
    key = rank_stacks_key(3, 1)
    assert key.startswith(rank_log_key(3, 1).removesuffix(".log"))
    local = Store.open(tmp_path / "root")
    RankLogs(local, tmp_path / "scratch").write({key: "here"})
    assert local.get(key) == b"here"
    remote = Store.open(f"memory://{uuid.uuid4().hex}")
    logs = RankLogs(remote, tmp_path / "scratch")
    logs.write({key: "there"})
    logs.ship()
    assert remote.get(key) == b"there"
