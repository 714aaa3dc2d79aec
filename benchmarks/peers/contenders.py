"""How each system of benchmarks/peers.py is started, broken and ended: toy.py on 4 ranks, at the settings with which it recovers fastest.

Every process carries the trial's folder in its environment: that is how all of them are found at the end, whoever their parent is by then.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Final

from environments import bin_of
from steplog import ENV_FOLDER

HERE: Final = Path(__file__).resolve().parent
RANKS: Final = 4
LEAVE_S: Final = 10.0
RUN_TOML: Final = """\
[run]
name = "peers"
root = "{root}"
[cluster]
nodes = {nodes}
ranks_per_node = {ranks}
spares = {spares}
max_failures = 1000
strikes = 1000
[train]
script = "{script}"
"""


class Contender(ABC):
    """A training system on `nodes` x 4 / `nodes` ranks."""

    nodes: ClassVar[int] = 2
    settings: ClassVar[str] = "defaults"  # what was changed, for the table
    mends_itself: ClassVar[bool] = False  # it replaces a lost node by itself; else we start the same command again at once

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.agents: dict[int, subprocess.Popen[bytes]] = {}
        self.port = free_port()

    def start(self) -> None:
        for node in range(self.nodes):
            self.agents[node] = self.node(node)

    @abstractmethod
    def node(self, node: int) -> subprocess.Popen[bytes]:
        """Starts what runs on one node."""

    def agent(self, node: int) -> int:
        """Pid of the process that all of a node's processes descend from."""
        return self.agents[node].pid

    def kill_node(self, node: int) -> float:
        """All of its processes at once, as power does; when (monotonic)."""
        pids = descendants(self.agent(node))
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: nobody sees the others die
            killed_at = time.monotonic()
            for pid in pids:
                send(pid, number)
        if not self.mends_itself:
            self.agents[node] = self.node(node)
        return killed_at

    def spawn(self, name: str, *command: str | Path, **environment: str) -> subprocess.Popen[bytes]:
        clean = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
        own = {ENV_FOLDER: str(self.folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TMPDIR": str(self.folder)}
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                list(map(str, command)),
                env={**clean, **own, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                start_new_session=True,
            )

    def stop(self) -> None:
        """Ends every process of the trial, for certain."""
        deadline = time.monotonic() + LEAVE_S
        while (pids := list(processes_of(self.folder))) and time.monotonic() < deadline:
            for pid in pids:
                send(pid, signal.SIGKILL)
            time.sleep(0.05)
        for agent in self.agents.values():
            agent.wait()


class Keepstep(Contender):
    """`keepstep run` plays all nodes; the toy is its script, with hashed and committed checkpoints."""

    mends_itself = True
    spares: ClassVar[int] = 0

    def start(self) -> None:
        config = self.folder / "run.toml"
        ranks, root, script = RANKS // self.nodes, self.folder / "root", HERE / "train_keepstep.py"
        cluster = {"nodes": self.nodes, "ranks": ranks, "spares": self.spares}
        config.write_text(RUN_TOML.format(root=root, script=script, **cluster))
        self.agents[0] = self.node(0)

    def node(self, node: int) -> subprocess.Popen[bytes]:
        scratch = {"KEEPSTEP_SCRATCH_BASE": str(self.folder / "s")}
        return self.spawn("run", sys.executable, "-m", "keepstep.orchestrator.cli", "run", self.folder / "run.toml", **scratch)

    def agent(self, node: int) -> int:
        words = ("--node", f"node{node}")
        return next(pid for pid in descendants(self.agents[0].pid) if "\0".join(words) in command_line(pid))


class KeepstepSpare(Keepstep):
    spares = 1
    settings = "one warm spare"


class KeepstepOneNode(Keepstep):
    nodes = 1


class Torchrun(Contender):
    """One agent per node."""

    settings = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    command: ClassVar[tuple[str, ...]] = ("-m", "torch.distributed.run")
    script: ClassVar[str] = "train_env.py"
    more: ClassVar[tuple[str, ...]] = ()

    def interpreter(self) -> Path:
        return Path(sys.executable)

    def node(self, node: int) -> subprocess.Popen[bytes]:
        size = (f"--nnodes={self.nodes}", f"--nproc-per-node={RANKS // self.nodes}", "--max-restarts=1000")
        meeting = (
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{self.port}",
            "--rdzv-id=bench",
            f"--rdzv-conf=is_host={int(node == 0)}",
        )
        command = (self.interpreter(), *self.command, *size, *meeting, "--local-addr=127.0.0.1", *self.more, HERE / self.script)
        return self.spawn(f"node{node}", *command, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


class TorchrunOneNode(Torchrun):
    nodes = 1


class TorchrunSameScript(Torchrun):
    """The very script that keepstep runs: for the cold start."""

    script = "train_keepstep.py"


class TorchrunSameScriptOneNode(TorchrunSameScript):
    nodes = 1


class ShellLoop(Contender):
    """What people write by hand: all torchruns end when one does, and start again on a new port."""

    settings = "static rendezvous, new port each time"
    mends_itself = True

    def start(self) -> None:
        self.agents[0] = self.node(0)

    def node(self, node: int) -> subprocess.Popen[bytes]:
        return self.spawn("loop", "bash", HERE / "loop.sh", sys.executable, HERE / "train_env.py", self.folder)

    def agent(self, node: int) -> int:
        return int((self.folder / f"node{node}.pid").read_text())


class NvrxLauncher(Torchrun):
    settings = "one heartbeat per step"
    command = ("-m", "nvidia_resiliency_ext.fault_tolerance.launcher")
    script = "train_nvrx.py"
    more = ("--ignore-missing-fault-tol-cfg",)

    def interpreter(self) -> Path:
        return bin_of("nvrx") / "python"


class NvrxInProcess(Contender):
    """Four ranks train, spares wait in the same process group. No node is replaced: spares take over."""

    spares: ClassVar[int] = 3  # enough for one rank, then for one node
    settings = f"{spares} spares, gloo time-out 2 s, polls 0.1 s"
    mends_itself = True

    def start(self) -> None:
        size = RANKS + self.spares
        for rank in range(size):
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}
            script = HERE / "train_inprocess.py"
            self.agents[rank] = self.spawn(f"rank{rank}", bin_of("nvrx") / "python", script, **variables, **place)

    def node(self, node: int) -> subprocess.Popen[bytes]:
        raise NotImplementedError("spares are there from the beginning")

    def kill_node(self, node: int) -> float:
        """The two living ranks with the highest numbers: ranks 0 and 1 are near the store, which the first process hosts."""
        living = [rank for rank, agent in sorted(self.agents.items()) if agent.poll() is None]
        pids = [self.agents[rank].pid for rank in living[1:3]]
        killed_at = time.monotonic()
        for pid in pids:
            send(pid, signal.SIGKILL)
        return killed_at


class TorchFT(Contender):
    """A lighthouse and four replica groups of one rank; a shell loop restarts each."""

    settings = "lighthouse heartbeat 1 s, join 1 s, min replicas 4"

    def start(self) -> None:
        options = ("--min_replicas", str(RANKS), "--heartbeat_timeout_ms", "1000", "--join_timeout_ms", "1000")
        self.lighthouse = self.spawn("lighthouse", bin_of("torchft") / "torchft_lighthouse", "--bind", f"[::]:{self.port}", *options)
        wait_for_port(self.port)
        super().start()

    def node(self, node: int) -> subprocess.Popen[bytes]:
        replicas = range(node * RANKS // self.nodes, (node + 1) * RANKS // self.nodes)
        loops = " ".join(f"(until REPLICA={replica} $0 $1; do :; done) &" for replica in replicas)
        place = {"TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{self.port}"}
        return self.spawn(f"node{node}", "bash", "-c", f"{loops} wait", bin_of("torchft") / "python", HERE / "train_torchft.py", **place)

    def stop(self) -> None:
        super().stop()
        self.lighthouse.wait()


class DLRover(Contender):
    settings = "master started by hand"

    def start(self) -> None:
        options = ("--port", str(self.port), "--node_num", str(self.nodes), "--job_name", "bench", "--platform", "local")
        self.master = self.spawn("master", bin_of("dlrover") / "python", "-m", "dlrover.python.master.main", *options)
        wait_for_port(self.port)
        super().start()

    def node(self, node: int) -> subprocess.Popen[bytes]:
        own = self.folder / f"tmp{node}"
        own.mkdir(exist_ok=True)
        place = {"DLROVER_MASTER_ADDR": f"127.0.0.1:{self.port}", "POD_IP": "127.0.0.1", "TMPDIR": str(own)}
        numbers = {"NODE_RANK": str(node), "NODE_ID": str(node), "NODE_NUM": str(self.nodes), "ELASTIC_JOB_NAME": f"bench{node}"}
        size = (f"--nnodes={self.nodes}", f"--nproc_per_node={RANKS // self.nodes}", "--max-restarts=1000")
        shared = {"DLROVER_SHARED_DIR": str(own / "shared")}
        return self.spawn(f"node{node}", bin_of("dlrover") / "dlrover-run", *size, HERE / "train_env.py", **place, **numbers, **shared)

    def stop(self) -> None:
        super().stop()
        self.master.wait()


class Ray(Contender):
    """Train v2: a head and a second raylet, two CPUs each."""

    settings = "Train v2, max_failures"

    def start(self) -> None:
        self.temporary = Path(f"/tmp/ks-ray-{self.port}")  # Ray's sockets need a short path
        self.agents[0] = self.node(0)
        wait_for_port(self.port)
        self.agents[1] = self.node(1)
        time.sleep(4)  # until both raylets take work
        script, address = HERE / "train_ray.py", f"127.0.0.1:{self.port}"
        self.agents[2] = self.spawn("driver", bin_of("ray") / "python", script, address, self.folder / "store", RAY_TRAIN_V2_ENABLED="1")

    def node(self, node: int) -> subprocess.Popen[bytes]:
        common = ("--node-ip-address=127.0.0.1", "--num-cpus=2", "--num-gpus=0", "--block", "--disable-usage-stats")
        head = ("--head", f"--port={self.port}", "--include-dashboard=false", f"--temp-dir={self.temporary}")
        place = head if node == 0 else (f"--address=127.0.0.1:{self.port}",)
        memory = "--object-store-memory=200000000"
        variables = {"RAY_TRAIN_V2_ENABLED": "1", "RAY_DISABLE_MEMORY_MONITOR": "1"}
        return self.spawn(f"node{node}", bin_of("ray") / "ray", "start", *place, *common, memory, **variables)

    def stop(self) -> None:
        super().stop()
        shutil.rmtree(self.temporary, ignore_errors=True)


CONTENDERS: Final[Mapping[str, type[Contender]]] = {
    "keepstep 2x2": Keepstep,
    "keepstep 2x2, spare": KeepstepSpare,
    "keepstep 1x4": KeepstepOneNode,
    "torchrun 1x4": TorchrunOneNode,
    "torchrun 2x2": Torchrun,
    "shell loop 2x2": ShellLoop,
    "torchft 4x1": TorchFT,
    "NVRx launcher 2x2": NvrxLauncher,
    "NVRx in-process 4+3": NvrxInProcess,
    "DLRover 2x2": DLRover,
    "Ray Train 2x2": Ray,
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def wait_for_port(port: int, patience_s: float = 60.0) -> None:
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise TimeoutError(f"nobody listens on port {port} after {patience_s:.0f} s")


def send(pid: int, number: signal.Signals) -> None:
    assert pid > 1, "0 and 1 are no process of ours"
    with contextlib.suppress(ProcessLookupError):  # it is gone already
        os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    """Of a living process, and itself, the oldest first."""
    children = defaultdict(list)
    for each, parent in parents():
        children[parent].append(each)
    found = [pid]
    for each in found:  # grows meanwhile
        found += children[each]
    return found


def parents() -> Iterator[tuple[int, int]]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            yield int(path.parent.name), int(path.read_text().rpartition(")")[2].split()[1])


def processes_of(folder: Path) -> Iterable[int]:
    """Those that carry the trial's folder in their environment and have not ended."""
    mark = f"{ENV_FOLDER}={folder}\0".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if mark in path.read_bytes() and int(path.parent.name) != os.getpid():
                yield int(path.parent.name)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:  # it ended meanwhile
        return ""
