"""One coordinator and ten thousand agents: what it costs on one core, and how soon all of them hear of a lost node.

    python benchmarks/coordinator_scale.py            100, 1,000 and 10,000 agents, results/coordinator_scale.json
    python benchmarks/coordinator_scale.py --quick    100 and 2,000

The coordinator is the real one (`keepstep coordinator`), bound to one core; the agents are connections of one process on another core.
They send real reports and obey directives as a node would: they join, launch, step, stop. Measured: CPU time of the coordinator's process
from /proc while reports come (as often as it tells them to), and, after one node has died, the time until the last of the others has been
told to stop, and until the last has been told to launch the next attempt, which a spare makes possible.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from common import Verdict, machine, parser, publish

from keepstep.orchestrator.tether import tie
from keepstep.orchestrator.wire import AGENT_PATH
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store

SPARES = 8
JOIN_AT_ONCE = 200
NO_MASK: Final = bytes(4)  # a mask of zeros: what is masked with it stays as it is
STEADY_S = 20.0
PATIENCE_S = 120.0
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Crowd:
    """What all agents together have heard."""

    size: int
    launched: dict[int, dict[str, float]] = field(default_factory=dict)  # attempt -> node -> when it was told to launch it
    stopped: dict[str, float] = field(default_factory=dict)  # node -> when it was told to run nothing, since `clear`
    reports: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, what: str, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not holds():
                self.news.clear()
                await self.news.wait()
        print(f"  {what}", flush=True)


class SimulatedAgent(asyncio.Protocol):
    """A node with one rank, as its coordinator sees it.

    It speaks WebSocket (RFC 6455) by hand: a client library costs more per message than the coordinator, and all agents share one core.
    """

    def __init__(self, number: int, crowd: Crowd) -> None:
        self.node = f"gpu{number:05d}#{number:04x}"
        self.steps = 0
        self._host = f"gpu{number:05d}"
        self._crowd = crowd
        self._sequence = 0
        self._told: dict[str, Any] = {}
        self._attempt = 0
        self._rank: dict[str, Any] | None = None
        self._store: dict[str, Any] | None = None
        self._report_s = 1.0
        self._is_open = False
        self._bytes = b""
        self._transport: asyncio.Transport | None = None
        self._next: asyncio.TimerHandle | None = None

    async def join(self, url: str, token: str) -> None:
        _, _, address = url.partition("//")
        host, _, port = address.rpartition(":")
        await asyncio.get_running_loop().create_connection(lambda: self, host, int(port))
        request = (
            f"GET {AGENT_PATH} HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\n\r\n"
        )
        self._open_transport.write(request.encode())

    def leave(self) -> None:
        """As the kernel would close the connection of a dead process."""
        if self._next:
            self._next.cancel()
        if self._transport:
            self._transport.abort()

    @property
    def _open_transport(self) -> asyncio.Transport:
        assert self._transport
        return self._transport

    # --- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._bytes += data
        if not self._is_open:
            head, end, self._bytes = self._bytes.partition(b"\r\n\r\n")
            if not end:
                self._bytes = head
                return
            assert head.startswith(b"HTTP/1.1 101"), head
            self._is_open = True
            self._tell()
        while (text := self._text()) is not None:
            self._hear(json.loads(text))

    def _text(self) -> bytes | None:
        """The next whole frame. Those of a server are not masked."""
        if len(self._bytes) < 2:
            return None
        length, begin = self._bytes[1], 2
        if length >= 126:
            begin = 4 if length == 126 else 10
            length = int.from_bytes(self._bytes[2:begin], "big")
        if len(self._bytes) < begin + length:
            return None
        text, self._bytes = self._bytes[begin : begin + length], self._bytes[begin + length :]
        return text

    # --- a node's life

    def _tell(self) -> None:
        self._crowd.reports += 1
        self._sequence += 1
        text = json.dumps(self._report()).encode()
        header = bytes((0x81, 0x80 | len(text))) if len(text) < 126 else bytes((0x81, 0xFE)) + len(text).to_bytes(2, "big")
        self._open_transport.write(header + NO_MASK + text)
        self._tell_within(self._report_s)

    def _tell_within(self, seconds: float) -> None:
        if self._next:
            self._next.cancel()
        self._next = asyncio.get_running_loop().call_later(seconds, self._step_and_tell)

    def _step_and_tell(self) -> None:
        if self._rank and self._rank["state"] == "running":
            self.steps += 1
            self._rank |= {"step": self.steps, "beats": self.steps + 1, "quiet_s": 0.1}
        self._tell()

    def _report(self) -> dict[str, Any]:
        return {
            "node": self.node,
            "host": self._host,
            "pid": 1,
            "address": "127.0.0.1",
            "slots": 1,
            "sequence": self._sequence,
            "term": self._told.get("term", 0),
            "obeyed": self._told.get("revision", 0),
            "ready": True,
            "attempt": self._attempt,
            "ranks": [self._rank] if self._rank else [],
            "store": self._store,
        }

    def _hear(self, answer: dict[str, Any]) -> None:
        self._report_s = answer.get("report_s", 1.0)
        told = answer.get("directive")
        if told is None:
            return
        self._told = told
        launch = told.get("launch")
        if launch is None:
            self._crowd.stopped.setdefault(self.node, time.monotonic())
            if self._rank and self._rank["state"] == "running":
                self._rank |= {"state": "exited", "exit_code": -9, "stopped_by_agent": True, "exit_order": 0}
        elif launch["attempt"] != self._attempt:
            self._launch(launch)
        self._crowd.news.set()
        self._tell()

    def _launch(self, launch: dict[str, Any]) -> None:
        if launch.get("store") is None:
            if launch["store_node"] == self.node:
                self._store = {"attempt": launch["attempt"], "host": "127.0.0.1", "port": 1}
            return
        self._attempt = launch["attempt"]
        self.steps = (launch["resume"]["step"] if launch.get("resume") else 0) + 1
        rank = launch["first_rank"]
        self._rank = {"rank": rank, "local_rank": 0, "pid": 1, "state": "running", "phase": 2, "step": self.steps, "beats": 2}
        self._crowd.launched.setdefault(self._attempt, {})[self.node] = time.monotonic()


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def config_of(folder: Path, agents: int) -> Path:
    path = folder / "run.toml"
    path.write_text(
        f'[run]\nname = "scale"\nroot = "{folder / "root"}"\nsteps = 1000000\n'
        f"[cluster]\nnodes = {agents - SPARES}\nspares = {SPARES}\nranks_per_node = 1\nlease_s = 20\nstall_s = 600\nstart_timeout_s = 600\n"
        f"[train]\nscript = {json.dumps(str(Path(__file__).resolve()))}\n"
    )
    return path


def begin_coordinator(folder: Path, agents: int) -> tuple[subprocess.Popen[bytes], str, str]:
    """On the first core. Its URL and token."""
    command = ["taskset", "-c", "0", sys.executable, "-m", "keepstep.orchestrator.cli", "coordinator", str(config_of(folder, agents))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=(folder / "coordinator.err").open("wb"))
    store = Store.open(folder / "root")
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        if (folder / "root" / "log").exists() and (opened := RunLog.open(store).newest_opened()):
            return process, opened.url, store.get("token").decode()
        if process.poll() is not None:
            raise RuntimeError((folder / "coordinator.err").read_text())
        time.sleep(0.05)
    raise RuntimeError("the coordinator did not open a term")


async def measure(agents: int, steady_s: float) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="ks-scale-"))
    process, url, token = begin_coordinator(folder, agents)
    os.sched_setaffinity(0, {os.cpu_count() - 1 if os.cpu_count() else 0})
    crowd = Crowd(agents)
    found = [SimulatedAgent(number, crowd) for number in range(agents)]
    try:
        began, cpu = time.monotonic(), cpu_s(process.pid)
        for begin in range(0, agents, JOIN_AT_ONCE):
            await asyncio.gather(*(agent.join(url, token) for agent in found[begin : begin + JOIN_AT_ONCE]))
        await crowd.until("all are told to launch", lambda: len(crowd.launched.get(1, {})) == agents - SPARES)
        started = {"wall_s": time.monotonic() - began, "cpu_s": cpu_s(process.pid) - cpu}
        await asyncio.sleep(6.0)
        steady = await _steady(process.pid, crowd, steady_s)
        lost = await _lose_one(crowd, found, url, token)
    finally:
        for agent in found:
            agent.leave()
        process.send_signal(signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
    return {"agents": agents, "start": started, **steady, **lost}


async def _steady(pid: int, crowd: Crowd, seconds: float) -> dict[str, Any]:
    began, cpu, own, reports = time.monotonic(), cpu_s(pid), time.process_time(), crowd.reports
    await asyncio.sleep(seconds)
    wall, used, told = time.monotonic() - began, cpu_s(pid) - cpu, crowd.reports - reports
    crowd_share = (time.process_time() - own) / wall
    return {"reports_per_s": told / wall, "core_share": used / wall, "us_per_report": 1e6 * used / max(told, 1), "crowd_share": crowd_share}


async def _lose_one(crowd: Crowd, found: list[SimulatedAgent], url: str, token: str) -> dict[str, Any]:
    """All processes of one that trains die: the kernel closes its connections, and with its tether proves it."""
    victim = len(found) // 2
    tether = await tie(url, token, found[victim].node, within_s=30.0)
    crowd.stopped.clear()
    at = time.monotonic()
    tether.socket.close()
    found[victim].leave()
    others = crowd.size - SPARES - 1
    gang = set(crowd.launched[1]) - {found[victim].node}
    await crowd.until("all are told to stop", lambda: len(gang & crowd.stopped.keys()) == others)
    stopped_s = max(crowd.stopped[node] for node in gang) - at
    await crowd.until("all are told to launch the next attempt", lambda: len(crowd.launched.get(2, {})) == others + 1)
    return {"stopped_s": stopped_s, "launched_s": max(crowd.launched[2].values()) - at}


def main() -> None:
    arguments = parser(__doc__).parse_args()
    began_on = machine()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    sizes = (100, 2000) if arguments.quick else (100, 1000, 10000)
    measured, too_many = [], 0
    for size in sizes:
        print(f"{size} agents", flush=True)
        try:
            measured.append(asyncio.run(measure(size, 5.0 if arguments.quick else STEADY_S)))
        except TimeoutError:
            too_many = size
            print(f"  were not told what they waited for within {PATIENCE_S:g} s", flush=True)
            break
        print(f"  {json.dumps(measured[-1])}", flush=True)
    publish("coordinator_scale", verdicts(measured, too_many, is_full=not arguments.quick), measured, began_on=began_on)


def verdicts(measured: list[dict[str, Any]], too_many: int, *, is_full: bool) -> list[Verdict]:
    largest, smallest = measured[-1], measured[0]
    size = f"{largest['agents']:,} agents"
    start_s, crowd_share = largest["start"]["wall_s"], largest["crowd_share"]
    joined = f"all were told to launch after {start_s:.0f} s; the agents took {crowd_share:.0%} of the other core"
    rate = f"{largest['reports_per_s']:,.0f} reports/s, {largest['us_per_report']:.0f} us each"
    growth = ", ".join(f"{each['agents']:,}: {each['us_per_report']:.0f} us" for each in measured)
    note = f"{too_many:,} agents were not all told to launch within {PATIENCE_S:g} s" if too_many else joined
    return [
        Verdict(
            what=f"coordinator, {size}, a report every {largest['agents'] / largest['reports_per_s']:.0f} s",
            target="< 50 % of one core",
            result=f"{largest['core_share']:.0%} ({rate})",
            met=largest["core_share"] < 0.5 and not too_many if is_full else None,
            note=note,
        ),
        Verdict(
            what=f"a node lost among {size} -> all told to stop",
            target="<= 1 s",
            result=f"{largest['stopped_s']:.2f} s; to launch again: {largest['launched_s']:.2f} s",
            met=largest["stopped_s"] <= 1.0 and not too_many if is_full else None,
            note=note,
        ),
        Verdict(
            what="coordinator's cost per report",
            target="does not grow with the number of nodes",
            result=growth,
            met=largest["us_per_report"] <= 1.5 * smallest["us_per_report"] if is_full else None,
        ),
    ]


if __name__ == "__main__":
    main()
