"""A real Slurm for tests: munged, slurmctld and several slurmd on this machine, on free ports, all in one temporary directory.

    with SlurmCluster(folder, num_nodes=4) as slurm:
        job = slurm.run("sbatch", "--parsable", "job.sbatch")
        slurm.kill_node("node2")
        slurm.boot_node("node2")

Every process of it, the jobs' included, carries a mark in its environment, so that none can hide: at the end all of them are killed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final

from keepstep.orchestrator.processes import is_alive, kill

ENV_MARK: Final = "KEEPSTEP_TEST_SLURM"
ENV_NODE: Final = "KEEPSTEP_TEST_SLURM_NODE"
PATIENCE_S: Final = 60.0
PROGRAMS: Final = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
POLL = threading.Event()  # never set: a wait on it is a pause between two looks at another process


def missing() -> str:
    """Why there can be no cluster here; "" if there can."""
    if absent := [name for name in PROGRAMS if not shutil.which(name)]:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm slurmctld slurmd slurm-client munge"
    return "" if os.getuid() == 0 else "slurmd needs root"


class SlurmCluster:
    """`folder` must be short: sockets live there. Nodes are called node1, node2, ..."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder = folder
        self.nodes = tuple(f"node{i + 1}" for i in range(num_nodes))
        self.config = folder / "slurm.conf"
        self._mark = uuid.uuid4().hex
        self._environment = {**os.environ, "SLURM_CONF": str(self.config), ENV_MARK: self._mark}
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> SlurmCluster:
        try:
            self._boot()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def _boot(self) -> None:
        for name in ("state", "spool", "log"):
            (self.folder / name).mkdir()
        key, munge = self.folder / "munge.key", self.folder / "munge"
        munge.mkdir(mode=0o755)
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        self.config.write_text(_config_text(self.folder, munge / "socket", self.nodes))
        files = (f"--{kind}-file={munge / kind}" for kind in ("pid", "log", "seed"))
        self._start("munged", "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge / 'socket'}", *files)
        self._wait_until((munge / "socket").exists, "munged's socket is there")
        self._start("slurmctld", "slurmctld", "-D", "-c", "-f", str(self.config))
        for name in self.nodes:
            self.boot_node(name)
        self._wait_until(lambda: self.idle_nodes() == len(self.nodes), "all nodes are idle")

    def boot_node(self, name: str) -> None:
        self._start(f"slurmd-{name}", "slurmd", "-D", "-N", name, "-f", str(self.config), environment={ENV_NODE: name})

    def kill_node(self, name: str) -> None:
        """SIGKILL to its slurmd and everything below it, as a power cut does; but connections are closed, because this kernel lives on."""
        while pids := self._marked(f"{ENV_NODE}={name}"):
            kill(_with_descendants(pids))

    def idle_nodes(self) -> int:
        return int(self.try_run("sinfo", "-h", "-t", "idle", "-o", "%D") or 0)

    def run(self, *command: str, environment: Mapping[str, str] | None = None) -> str:
        """What a client printed. Raises AssertionError with what it complained about."""
        variables = {**self._environment, **(environment or {})}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}{self.logs()}"
        return done.stdout.strip()

    def try_run(self, *command: str) -> str:
        """The same for what may fail, while a controller starts for example; "" then."""
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: "JobState", "Restarts", "NumNodes", ..."""
        words = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """The ends of all daemons' logs, for a failing test's message."""
        files = sorted((self.folder / "log").iterdir())
        return "".join(f"\n--- {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)

    def end(self) -> None:
        while pids := self._marked(f"{ENV_MARK}={self._mark}"):
            kill(_with_descendants(pids))
        for child in self._children:
            child.wait()

    def _start(self, log: str, *command: str, environment: Mapping[str, str] | None = None) -> None:
        with open(self.folder / "log" / log, "ab") as output:
            variables = {**self._environment, **(environment or {})}
            child = subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
        self._children.append(child)

    def _marked(self, word: str) -> list[int]:
        """Living processes of this cluster's daemons that carry the word in their environment, slurmstepd included."""
        wanted = {f"{ENV_MARK}={self._mark}".encode(), word.encode()}
        found = []
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            with contextlib.suppress(OSError):
                if wanted <= set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")) and is_alive(pid):
                    found.append(pid)
        return found

    def _wait_until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline, f"it never came to that: {what}{self.logs()}"
            POLL.wait(0.1)


def _with_descendants(pids: list[int]) -> list[int]:
    children: dict[int, list[int]] = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(pid)
    found = dict.fromkeys(pids)
    waiting = list(pids)
    while waiting:
        new = [pid for pid in children.get(waiting.pop(), ()) if pid not in found]
        found.update(dict.fromkeys(new))
        waiting += new
    return list(found)


def _config_text(folder: Path, munge_socket: Path, nodes: tuple[str, ...]) -> str:
    controller, *ports = _free_ports(len(nodes) + 1)
    lines = [
        f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=2" for name, port in zip(nodes, ports, strict=True)
    ]
    return f"""
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={munge_socket},cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
MpiDefault=none
ReturnToService=2
SlurmdTimeout=5
KillWait=10
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
{chr(10).join(lines)}
PartitionName=main Nodes={",".join(nodes)} Default=YES State=UP
"""


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]
