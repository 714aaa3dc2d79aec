"""Whatever is wrong with what a person wrote: exit code 2, one clear message with the remedy, nothing started, nothing lost."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

GOOD = """
[run]
name = "bad-input"
steps = 2
[data]
source = "{text}"
tokenizer = "bytes"
[model]
context = 32
layers = 1
width = 32
heads = 2
[optimizer]
warmup_steps = 1
[train]
batch_tokens = 256
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} has a few plain words of its own." for i in range(2000)))
    path = tmp_path / "run.toml"
    path.write_text(GOOD.format(text=text))
    return path


def keepstep(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "keepstep.orchestrator.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment})


def refused(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    assert not [part for part in parts if part not in result.stderr], result.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_missing_file(tmp_path: Path) -> None:
    refused(keepstep("run", str(tmp_path / "none.toml")), "none.toml: no such file", "examples/quickstart.toml")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("cluster.leese_s=3", ("leese_s", "cluster.lease_s")),
        ("cluster.lease_s=400", ("lease_s = 400", "stall_s")),
        ("run.steps=many", ("run.steps", "many")),
        ("model.heads=5", ("heads", "width")),
        ("data.source=/no/such/text", ("/no/such/text",)),
        ("cluster.listen=here", ("cluster.listen",)),
    ],
    ids=["unknown-key", "impossible-relation", "wrong-type", "heads", "missing-text", "listen"],
)
def test_a_bad_key(run_file: Path, tmp_path: Path, override: str, parts: tuple[str, ...]) -> None:
    root = tmp_path / "root"
    refused(keepstep("run", str(run_file), "-o", f"run.root={root}", "-o", override), *parts)
    assert not (root / "log").exists(), "something was started"


@pytest.mark.parametrize("root", ["/proc/keepstep", "/dev/null/root"])
def test_a_root_that_cannot_be_written(run_file: Path, root: str) -> None:
    refused(keepstep("run", str(run_file), "-o", f"run.root={root}"), root)


def test_a_first_start_that_was_refused_does_not_stand_in_the_way_of_the_remedy(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"body": "a few plain words of document {i}"}}\n' for i in range(3000)))
    flags = ("-o", f"run.root={tmp_path / 'root'}", "-o", f"data.source={tmp_path / 'texts.jsonl'}")
    refused(keepstep("prepare", str(run_file), *flags), 'no field "text"', "data.text_field")
    assert keepstep("prepare", str(run_file), *flags, "-o", "data.text_field=body").returncode == 0


def test_documents_that_are_too_long_are_told_when_they_are_prepared(run_file: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"{i}", "completion": "x" * (90 if i == 7 else 9)} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    flags = ("-o", f"run.root={tmp_path / 'root'}", "-o", f"data.source={tmp_path / 'pairs.jsonl'}", "-o", "train.objective=pairs")
    for _ in range(2):  # not only the first time
        refused(keepstep("prepare", str(run_file), *flags), "longer than model.context = 32", "train.truncate = true")
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs if len(pair["completion"]) < 30))
    assert keepstep("prepare", str(run_file), *flags).returncode == 0


def test_the_root_of_another_run_is_left_alone(run_file: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert keepstep("prepare", str(run_file), "-o", f"run.root={root}").returncode == 0
    RunLog.open(Store.open(root)).open_term(run="bad-input", identity="i", host="here", pid=1)
    before = contents(root)
    refused(keepstep("run", str(run_file), "-o", f"run.root={root}", "-o", "run.seed=9"), "holds another run", "run.seed = 9", "run.root")
    assert contents(root) == before


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


def test_a_port_in_use(run_file: Path, tmp_path: Path, taken_port: int) -> None:
    result = keepstep("coordinator", str(run_file), "-o", f"run.root={tmp_path / 'root'}", "--listen", f"127.0.0.1:{taken_port}")
    refused(result, str(taken_port), "port")


def test_an_agent_without_a_run_to_go_to(tmp_path: Path) -> None:
    refused(keepstep("agent", "--scratch", str(tmp_path / "scratch")), "--coordinator", "--root")


def test_an_agent_without_a_token(tmp_path: Path) -> None:
    refused(keepstep("agent", "--coordinator", "http://127.0.0.1:9", KEEPSTEP_TOKEN=""), "KEEPSTEP_TOKEN")


@pytest.fixture
def coordinator(run_file: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A real coordinator that waits for nodes; its URL and root."""
    from keepstep.storage.runlog import RunLog
    from keepstep.storage.store import Store

    root = tmp_path / "root"
    command = [sys.executable, "-m", "keepstep.orchestrator.cli", "coordinator", str(run_file), "-o", f"run.root={root}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.readline()  # its first event: the term is open, the port is bound
    opened = RunLog.open(Store.open(root)).newest_opened()
    assert opened
    yield opened.url, root
    process.kill()
    process.communicate()


def test_a_wrong_token(coordinator: tuple[str, Path], tmp_path: Path) -> None:
    url, _ = coordinator
    refused(keepstep("agent", "--coordinator", url, "--scratch", str(tmp_path / "s"), KEEPSTEP_TOKEN="wrong"), "wrong token")
    refused(keepstep("status", url, KEEPSTEP_TOKEN="wrong"), "wrong token")
    refused(keepstep("stop", url, KEEPSTEP_TOKEN="wrong"), "wrong token")


@pytest.mark.parametrize("command", ["status", "events", "stop", "evaluate", "generate"])
def test_a_root_where_no_run_lives(tmp_path: Path, command: str) -> None:
    refused(keepstep(command, str(tmp_path)), "no run lives there")


def test_checkpoints_of_a_root_where_no_run_lives(tmp_path: Path) -> None:
    refused(keepstep("checkpoints", "list", str(tmp_path)), "no run lives there")


def test_doctor_names_what_would_fail(run_file: Path, tmp_path: Path, taken_port: int) -> None:
    good = keepstep("doctor", str(run_file), "-o", f"run.root={tmp_path / 'root'}")
    assert good.returncode == 0, good.stdout
    bad = keepstep("doctor", str(run_file), "-o", "run.root=/proc/x", "-o", f"cluster.listen=127.0.0.1:{taken_port}")
    assert bad.returncode == 2
    assert bad.stdout.count("FAIL") == 2
