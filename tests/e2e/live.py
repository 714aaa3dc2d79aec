"""A real `keepstep run` under test: started, watched, broken, read afterwards. Its processes carry a mark, so none can hide."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keepstep.orchestrator.archive import read_events, read_result
from keepstep.orchestrator.processes import is_alive
from keepstep.storage.errors import StorageError
from keepstep.storage.runlog import RunLog
from keepstep.storage.steps import read_steps
from keepstep.storage.store import StorageOptions, Store

ENV_MARK = "KEEPSTEP_TEST_MARK"
PATIENCE_S = 120.0  # for anything that must happen at all; nothing is measured here
STEPS = 24
POLL = threading.Event()  # never set: a wait on it is a pause between two looks at another process


def config_text(text_file: Path) -> str:
    """Four ranks on two nodes, dropout on, a checkpoint every 6 steps."""
    return f"""
[run]
name = "e2e"
seed = 7
steps = {STEPS}
[cluster]
nodes = 2
ranks_per_node = 2
lease_s = 3
fence_s = 0.5
backoff_s = 0.1
[data]
source = "{text_file}"
tokenizer = "bytes"
[model]
layers = 2
width = 32
heads = 2
context = 32
dropout = 0.2
[optimizer]
warmup_steps = 4
[train]
batch_tokens = 512
[checkpoint]
interval = 6
"""


def environment_of(variables: Mapping[str, str]) -> dict[str, str]:
    """Ours and these. Bytecode is always kept: without it each of a run's processes compiles what it imports, a second of its start."""
    return {**{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}, **variables}


NO_HANG = "cluster.hang_s=100"  # whoever waits at a gate does not hang


def gates(folder: Path, *steps: int) -> str:
    """Faults: rank 0 stops itself once after each of these steps, so that all ranks wait there for whatever comes. With NO_HANG."""
    return ";".join(f"rank.step:rank=0:step={step}:signal=STOP:once={folder / f'gate-{step}'}" for step in steps)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What must not depend on what was broken."""

    state_sha256: str
    model_sha256: str
    optimizer_sha256: str
    losses: tuple[str, ...]  # float.hex() of each step of the history


def keepstep(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the command line, to its end."""
    command = [sys.executable, "-m", "keepstep.orchestrator.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=environment_of({}))


@dataclass(slots=True)
class LiveRun:
    config: Path
    root: str
    overrides: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    options: StorageOptions | None = None
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    process: subprocess.Popen[str] | None = None
    output: list[str] = field(default_factory=list)
    _coordinator: tuple[str, str] | None = None
    _store: Store | None = None

    @property
    def store(self) -> Store:
        """Opened once: on S3 a session of its own for each look would take the CPU from the run, and from a proxy in this process."""
        self._store = self._store or Store.open(self.root, self.options)
        return self._store

    def start(self, *, faults: str = "") -> LiveRun:
        command = [sys.executable, "-m", "keepstep.orchestrator.cli", "run", str(self.config), *self.flags, "-o", f"run.root={self.root}"]
        for override in self.overrides:
            command += ["-o", override]
        environment = environment_of({**self.environment, ENV_MARK: self.mark, "KEEPSTEP_FAULTS": faults})
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        threading.Thread(target=self._read_output, args=(self.process,), daemon=True).start()
        return self

    def _read_output(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        with process.stdout as lines:
            self.output.extend(line.rstrip("\n") for line in lines)

    def wait(self) -> int:
        """The exit code of `keepstep run`."""
        assert self.process
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError("the run did not end in time; it said:\n" + "\n".join(self.output[-40:]) + self.logs()) from None

    def status(self) -> dict[str, Any] | None:
        """The coordinator's own view, None while it cannot be reached."""
        with contextlib.suppress(OSError, StorageError):  # not there yet, or not at the moment
            url, token = self._coordinator = self._coordinator or self._look_up()
            request = urllib.request.Request(url + "/v1/status", headers={"Authorization": f"Bearer {token}"})
            with urllib.request.urlopen(request, timeout=2) as answer:
                status: dict[str, Any] = json.load(answer)
                return status
        self._coordinator = None
        return None

    def _look_up(self) -> tuple[str, str]:
        opened = RunLog.open(self.store).newest_opened()
        if opened is None:
            raise FileNotFoundError("no coordinator has opened a term yet")
        return opened.url, self.store.get("token").decode()

    def wait_until(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first status for which `holds` is true."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            status = self.status()
            if status and holds(status):
                return status
            if self.process and self.process.poll() is not None:
                break
            POLL.wait(0.02)
        raise AssertionError(f"it never came to that; the run said:\n{self.said()}")

    def wait_for_step(self, step: int, *, attempt: int = 1) -> dict[str, Any]:
        return self.wait_until(lambda s: s["phase"] == "TRAINING" and s["attempt"] >= attempt and s["step"] >= step)

    def wait_at_gate(self) -> dict[str, Any]:
        """The status while rank 0 stands still, see `gates`."""
        poll_until(lambda: bool(self.stopped()), "a rank has stopped itself", self.said)
        return self.wait_until(lambda status: status["phase"] == "TRAINING" and self._stands_in(status))

    def _stands_in(self, status: Mapping[str, Any]) -> bool:
        stopped = set(self.stopped())
        return any(rank["pid"] in stopped for node in status["nodes"] for rank in node["ranks"])

    def stopped(self) -> list[int]:
        """Those that SIGSTOP holds."""
        return [pid for pid in self.marked() if is_stopped(pid)]

    def open_gate(self) -> None:
        for pid in self.stopped():
            os.kill(pid, signal.SIGCONT)

    def said(self) -> str:
        """For a failing test's message."""
        return "\n".join([line for line in self.output if not line.startswith("step ")][-80:]) + self.logs()

    def marked(self) -> list[int]:
        """Every living process that descends from this run, our own excepted."""
        wanted = f"{ENV_MARK}={self.mark}".encode()
        found = []
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            with contextlib.suppress(OSError):
                if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") and is_alive(pid):
                    found.append(pid)
        return found

    def kill(self, *pids: int) -> None:
        """SIGKILL; all of them must be alive to be killed, except those that die with the first."""
        os.kill(pids[0], signal.SIGKILL)
        for pid in pids[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_everything(self) -> None:
        """SIGKILL to every process of the run at once, as a power cut does."""
        for pid in self.marked():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self.process
        self.process.wait(PATIENCE_S)

    def outcome(self) -> Outcome:
        result = read_result(self.store)
        assert result, "no result.json; " + "\n".join(self.output[-30:])
        history = RunLog.open(self.store).lineage.history(read_steps(self.store))
        assert [step.step for step in history] == list(range(1, len(history) + 1)), "the history has gaps"
        losses = tuple(step.record["loss_hex"] for step in history)
        return Outcome(result["state_sha256"], result["model_sha256"], result["optimizer_sha256"], losses)

    def result(self) -> dict[str, Any]:
        result = read_result(self.store)
        assert result
        return result

    def events(self) -> list[dict[str, Any]]:
        return list(read_events(self.store))

    def logs(self) -> str:
        """The ends of all logs, for a failing test's message."""
        base = Path(self.root) / "logs"
        files = sorted(base.rglob("*.log")) if base.is_dir() else []
        return "".join(f"\n--- {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)

    def check_what_always_holds(self) -> None:
        """Nothing survives the run; the log is linear, and every attempt resumed from the newest commit before it."""
        assert no_process_left(self), f"orphans: {[command_of(pid) for pid in self.marked()]}"
        log = RunLog.read_all(self.store)
        assert log.alarms == []
        check_resumes(log)


def poll_until(holds: Callable[[], bool], what: str, said: Callable[[], str] = str) -> None:
    """Raises AssertionError when it never comes to that."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"it never came to that: {what}\n{said()}"
        POLL.wait(0.02)


def is_stopped(pid: int) -> bool:
    """By SIGSTOP."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def no_process_left(run: LiveRun) -> bool:
    deadline = time.monotonic() + 10
    while run.marked() and time.monotonic() < deadline:
        POLL.wait(0.05)
    return not run.marked()


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:120]
    return f"{pid} is gone"


def check_resumes(log: RunLog) -> None:
    """0 uncommitted loads, 0 committed steps lost."""
    from keepstep.storage.records import Attempt, Commit, Quarantine, Rewind

    committed: list[Commit] = []
    quarantined: set[str] = set()
    for record in log.records:
        if isinstance(record, Commit):
            committed.append(record)
        elif isinstance(record, Quarantine):
            quarantined.add(record.directory)
        elif isinstance(record, Rewind):
            while committed and committed[-1].directory != record.directory:
                committed.pop()
        elif isinstance(record, Attempt):
            good = [commit for commit in committed if commit.directory not in quarantined]
            newest = good[-1].directory if good else ""
            assert record.resume_directory == newest, f"attempt {record.attempt} resumed from {record.resume_directory!r}, not {newest!r}"
