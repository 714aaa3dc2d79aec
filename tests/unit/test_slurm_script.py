"""What deploy/slurm/keepstep.sbatch makes of exit codes, signals and lost nodes: real bash, stand-ins for the programs that it calls."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "slurm" / "keepstep.sbatch"
POLL = threading.Event()  # never set: a wait on it is a pause between two looks at another process
PATIENCE_S = 60.0

# Each stand-in writes down how it was called. The coordinator's and the agent's exit codes are taken from files, line by line.
KEEPSTEP = """
next() { code=$(head -n 1 "$1"); sed -i 1d "$1"; }
case $1 in
    coordinator)
        next "$HERE/coordinator"
        [[ $code == KILL ]] && kill -KILL $$
        trap 'code=75' TERM USR1
        while [[ $code == told ]]; do sleep 0.02; done
        touch "$HERE/over"
        exit "$code" ;;
    agent) echo "grace $KEEPSTEP_GRACE_S" >> "$HERE/calls"; next "$HERE/agent"; exit "$code" ;;
    status) echo "r: WAITING: 3 of 4 nodes are ready" ;;
esac
"""
SRUN = """
while [[ $1 != bash ]]; do shift; done
[[ -s $HERE/agent ]] && SLURM_NODEID=1 "$@"
[[ -e $HERE/no-agents ]] || until [[ -e $HERE/over ]]; do sleep 0.02; done
"""
SQUEUE = """
case $* in
    *%T) cat "$HERE/state" ;;
    *%D) cat "$HERE/left" ;;
    *%N) echo 'node[2-4]' ;;
esac
"""
SCONTROL = """
[[ $2 == hostnames ]] && printf 'node2\\nnode3\\nnode4\\n'
[[ $2 == config ]] && echo 'KillWait                = 12 sec'
[[ $1 != requeue ]] || touch "$HERE/over"
"""


@dataclass(slots=True)
class Script:
    folder: Path
    restarts: int = 0

    def tell(self, **files: str) -> Script:
        """What the stand-ins are to say."""
        for name, text in files.items():
            (self.folder / name.replace("_", "-")).write_text(text + "\n")
        return self

    def start(self) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "HERE": str(self.folder),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "4",
            "SLURM_RESTART_COUNT": str(self.restarts),
            "SLURMD_NODENAME": "node1",
            "KEEPSTEP_LOOK_S": "0.05",
            "KEEPSTEP_PATIENCE_S": "1",
        }
        command = ["bash", str(SCRIPT), "run.toml", "/runs/mine", "-o", "run.steps=5"]
        return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def run(self) -> int:
        """Its exit code."""
        return self.end(self.start())

    def end(self, process: subprocess.Popen[str]) -> int:
        said, _ = process.communicate(timeout=PATIENCE_S)
        (self.folder / "said").write_text(said)
        return process.returncode

    def calls(self, prefix: str) -> list[str]:
        calls = self.folder / "calls"
        return [line for line in calls.read_text().splitlines() if line.startswith(prefix)] if calls.exists() else []

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text()

    @property
    def requeued(self) -> bool:
        return self.calls("scontrol requeue") == ["scontrol requeue 7"]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    (tmp_path / "bin").mkdir()
    for name, text in {"keepstep": KEEPSTEP, "srun": SRUN, "squeue": SQUEUE, "scontrol": SCONTROL}.items():
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/bash\necho "{name} $*" >> "$HERE/calls"\n{text}')
        program.chmod(0o755)
    return Script(tmp_path).tell(state="RUNNING", left="4")


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (75, 9, True), (3, 0, True), (3, 2, True), (3, 3, False), (4, 0, False), (2, 0, False), (70, 0, False)],
)
@pytest.mark.slow
def test_the_exit_code_decides_whether_the_job_is_requeued(script: Script, code: int, restarts: int, requeued: bool) -> None:
    script.restarts = restarts
    assert script.tell(coordinator=str(code)).run() == code
    assert script.requeued == requeued
    assert script.calls("keepstep coordinator") == [
        "keepstep coordinator run.toml -o run.root=/runs/mine --listen 0.0.0.0:0 -o run.steps=5"
    ]


@pytest.mark.slow
def test_a_killed_coordinator_is_succeeded(script: Script) -> None:
    assert script.tell(coordinator="KILL\n0").run() == 0
    assert len(script.calls("keepstep coordinator")) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("number", "state", "requeued"), [(signal.SIGUSR1, "RUNNING", True), (signal.SIGTERM, "COMPLETING", False)])
def test_a_signal_stops_the_run_and_only_a_job_that_slurm_does_not_end_itself_is_requeued(
    script: Script, number: signal.Signals, state: str, requeued: bool
) -> None:
    process = script.tell(coordinator="told", state=state).start()
    deadline = time.monotonic() + PATIENCE_S
    while (script.folder / "coordinator").read_text() and time.monotonic() < deadline:
        POLL.wait(0.02)
    process.send_signal(number)
    assert script.end(process) == 75
    assert script.requeued == requeued


@pytest.mark.slow
def test_a_job_that_lost_nodes_and_waits_for_more_is_requeued(script: Script) -> None:
    assert script.tell(coordinator="told", left="3").run() == 75
    assert script.requeued
    assert "3 nodes are left, and the run waits for more" in script.said


@pytest.mark.slow
def test_a_job_without_agents_is_requeued(script: Script) -> None:
    assert script.tell(coordinator="told", no_agents="").run() == 75
    assert script.requeued
    assert "no agent is left" in script.said


@pytest.mark.slow
@pytest.mark.parametrize("last", [0, 75])
def test_a_node_restarts_its_agent_and_requeues_a_job_that_lost_its_batch_host(script: Script, last: int) -> None:
    """node1 was the batch host. An agent that has ended with 0 or 75 was told to."""
    assert script.tell(coordinator="told", agent=f"137\n{last}").run() == 75
    assert script.calls("grace") == ["grace 12"] * 2
    assert script.calls("keepstep agent") == ["keepstep agent --root /runs/mine"] * 2
    assert "the batch host node1 is lost" in script.said
