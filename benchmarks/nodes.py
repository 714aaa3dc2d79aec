"""Loss of a node to the next finished step on all ranks, 4 ranks (2 nodes x 2).

    python benchmarks/nodes.py              all, results/nodes.json; as root a cut cable, too
    python benchmarks/nodes.py --quick      one loss of each kind, no hosts

* spare: SIGKILL to the agent of a node and all its processes, ranks included; a warm spare (`cluster.spares`) takes its seat.
* cold: the same without a spare; the node's agent is started again at the same instant, in a new interpreter.
* silent: a host whose cable is cut (network namespaces, `keepstep.orchestrator.lab`): nothing tells of its end; a spare waits.

Cold starts of a whole run are measured by peers.py, beside torchrun's of the same script.

Nodes are agents that this script starts itself, so that nobody else starts one again. All is timed by the ranks' own progress pages, on the
machine's monotonic clock.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from common import HERE, Verdict, machine, median, parser, percentile, publish, recoveries, spent_on, spread
from recovery import Generation, keepstep, run_on

from keepstep.orchestrator.lab import Host, Lab
from keepstep.orchestrator.processes import ENV_SCRATCH, marked
from keepstep.storage.errors import StorageError
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store

CONFIG = HERE / "recovery.toml"
KINDS = ("spare", "cold", "silent")
STEPS_BETWEEN = 12  # more than the checkpoint interval
PATIENCE_S = 90.0
LEASE_S = 5.0  # the default
QUIET = {"OMP_NUM_THREADS": "1", "KEEPSTEP_FAULTS": ""}


Parts: TypeAlias = list[dict[str, float]]  # of each recovery: what it was spent on


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One loss."""

    kind: str
    seconds: float
    step_s: float  # before it
    load: float


class Cluster:
    """A run whose processes are started here, one by one: a coordinator and agents."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder, self.root = folder, folder / "root"
        words = (f"run.root={self.root}", "cluster.nodes=2", "cluster.ranks_per_node=2", *overrides)
        self._options = [word for override in words for word in ("-o", override)]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def spawn(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            environment = {**os.environ, **QUIET}
            self.processes[name] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def prepare(self) -> None:
        subprocess.run(keepstep("prepare", str(CONFIG), *self._options), check=True, stdout=subprocess.DEVNULL, env={**os.environ, **QUIET})

    def coordinate(self) -> None:
        self.spawn("coordinator", keepstep("coordinator", str(CONFIG), *self._options))

    def agent(self, name: str, host: Host | None = None) -> None:
        command = keepstep("agent", "--root", str(self.root), "--node", name, "--scratch", str(self.scratch(name)))
        self.spawn(name, host.command(command) if host else command)

    def scratch(self, name: str) -> Path:
        return self.folder / "s" / name

    def kill_node(self, name: str) -> None:
        """All at once, the agent first: it must not see the others go."""
        agent = self.processes.pop(name)
        pids = (agent.pid, *marked(f"{ENV_SCRATCH}={self.scratch(name)}"))
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        agent.wait()

    def status(self) -> dict[str, Any]:
        import json
        import urllib.request

        with contextlib.suppress(OSError, StorageError):
            store = Store.open(str(self.root))
            if opened := RunLog.open(store).newest_opened():
                request = urllib.request.Request(
                    f"{opened.url}/v1/status", headers={"Authorization": f"Bearer {store.get('token').decode()}"}
                )
                with urllib.request.urlopen(request, timeout=2) as answer:
                    return dict(json.load(answer))
        return {"nodes": []}

    def until(self, holds: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            status = self.status()
            if holds(status):
                return status
            time.sleep(0.1)
        raise SystemExit(f"{what}: not within {PATIENCE_S:g} s, see {self.folder}")

    def end(self) -> None:
        for name, process in list(self.processes.items()):
            process.kill()
            process.wait()
            for pid in marked(f"{ENV_SCRATCH}={self.scratch(name)}"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def cluster(*overrides: str) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="ks-bench-"))
    made = Cluster(folder, *overrides)
    try:
        made.prepare()
        yield made
    finally:
        made.end()
    shutil.rmtree(folder, ignore_errors=True)  # kept after an error: its logs say why


def has_spare(status: dict[str, Any]) -> bool:
    return any(node["state"] == "ready" for node in status["nodes"])


def gang(status: dict[str, Any]) -> list[str]:
    """Names of the nodes that run ranks, the last rank's at the end."""
    running = [node for node in status["nodes"] if node["state"] == "running"]
    return [node["id"].partition("#")[0] for node in sorted(running, key=lambda node: node["ranks"][0]["rank"])]


def lose(kind: str, made: Cluster, generation: Generation, lost: Callable[[str], None], name: str) -> tuple[Row, Generation]:
    """Loses one node; the row, and the generation of ranks that follows."""
    step_s, load = run_on(generation, STEPS_BETWEEN), os.getloadavg()[0]
    time.sleep(random.random() * step_s)
    following = Generation(made.folder / "s")
    at = time.monotonic()
    lost(name)
    stepped_at = following.wait_stepped(PATIENCE_S)
    if stepped_at is None:
        raise SystemExit(f"{kind}: no step within {PATIENCE_S:g} s, see {made.folder}")
    row = Row(kind=kind, seconds=round(stepped_at - at, 3), step_s=round(step_s, 4), load=round(load, 2))
    print(f"{kind}: {row.seconds:.2f} s (step {row.step_s:.3f} s, load {row.load})", flush=True)
    return row, following


def begin(made: Cluster, names: Sequence[str]) -> Generation:
    generation = Generation(made.folder / "s")
    made.coordinate()
    for name in names:
        made.agent(name)
    if generation.wait_stepped(PATIENCE_S) is None:
        raise SystemExit(f"no first step within {PATIENCE_S:g} s, see {made.folder}")
    return generation


def with_spare(times: int, parts: Parts) -> Iterator[Row]:
    with cluster("cluster.spares=1") as made:
        generation = begin(made, ("node0", "node1", "node2"))
        for number in range(times):
            status = made.until(has_spare, "a warm spare")
            name = gang(status)[number % 2 - 1]
            row, generation = lose("spare", made, generation, made.kill_node, name)
            yield row
            made.agent(name)
        parts += recoveries(made.root, times)


def with_cold_replacement(times: int, parts: Parts) -> Iterator[Row]:
    with cluster() as made:
        generation = begin(made, ("node0", "node1"))

        def replace(name: str) -> None:
            made.kill_node(name)
            made.agent(name)

        for number in range(times):
            row, generation = lose("cold", made, generation, replace, f"node{(number + 1) % 2}")
            yield row
        parts += recoveries(made.root, times)


def with_a_cut_cable(times: int, parts: Parts) -> Iterator[Row]:
    """Which host is cut off is random; after the loss its cable is back, and it becomes the spare."""
    folder = Path(tempfile.mkdtemp(prefix="ks-bench-"))
    with Lab(3, shared=(folder,)) as lab:
        hosts = {f"node{number}": host for number, host in enumerate(lab.hosts)}
        made = Cluster(folder, "cluster.spares=1", f"cluster.listen={lab.gateway}:0")
        try:
            made.prepare()
            generation = Generation(folder / "s")
            made.coordinate()
            for name, host in hosts.items():
                made.agent(name, host)
            if generation.wait_stepped(PATIENCE_S) is None:
                raise SystemExit(f"no first step within {PATIENCE_S:g} s, see {folder}")
            for _ in range(times):
                status = made.until(has_spare, "a warm spare")
                name = gang(status)[-1]
                row, generation = lose("silent", made, generation, lambda name: hosts[name].cut(), name)
                yield row
                hosts[name].heal()
            parts += recoveries(made.root, times)
        finally:
            made.end()
    shutil.rmtree(folder, ignore_errors=True)


def verdicts(rows: Sequence[Row], parts: Mapping[str, Parts]) -> list[Verdict]:
    found = {kind: [row.seconds for row in rows if row.kind == kind] for kind in KINDS}
    limits = (
        ("spare", "SIGKILL of a node, a warm spare -> next finished step, 2 x 2", 1.0, "median <= 1 s"),
        ("cold", "SIGKILL of a node, immediate cold replacement -> next finished step, 2 x 2", 4.0, "median <= 4 s"),
        ("silent", "cut cable, a spare -> next finished step, 2 x 2", LEASE_S + 2, "median <= lease_s (5) + 2 s"),
    )
    return [verdict(what, target, found[kind], limit, spent_on(parts.get(kind, []))) for kind, what, limit, target in limits]


def verdict(what: str, target: str, seconds: Sequence[float], limit_s: float, note: str) -> Verdict:
    if not seconds:
        return Verdict(what=what, target=target, result="", met=None, note="not measured in this run")
    result = f"{spread(seconds)}, p95 {percentile(seconds, 0.95):.2f} s"
    return Verdict(what=what, target=target, result=result, met=median(seconds) <= limit_s, note=note)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--times", type=int, default=5, help="losses of each kind")
    made.add_argument("--only", nargs="+", choices=KINDS, default=None)
    options = made.parse_args()
    began_on, rows = machine(), list[Row]()
    times, chosen = (1, options.only or KINDS[:2]) if options.quick else (options.times, options.only or KINDS)
    if "silent" in chosen and (why := Lab.missing()):
        print(f"silent is left out: {why}")
        chosen = [kind for kind in chosen if kind != "silent"]
    sources = {"spare": with_spare, "cold": with_cold_replacement, "silent": with_a_cut_cable}
    parts: dict[str, Parts] = {kind: [] for kind in chosen}
    for kind in chosen:
        rows += sources[kind](times, parts[kind])
    publish("nodes", verdicts(rows, parts), {"parts": parts, "rows": [asdict(row) for row in rows]}, began_on=began_on)


if __name__ == "__main__":
    main()
