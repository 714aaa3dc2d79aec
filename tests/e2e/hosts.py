"""A run whose coordinators and agents live on hosts of a laboratory: own addresses, own processes, cables that can be cut."""

from __future__ import annotations

import math
import os
import select
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from e2e.parts import CLI, PartedRun
from keepstep.orchestrator.lab import Host, Lab

PACES = {"slow": 0.7, "crawl": 2.0}  # seconds that a step takes longer; they add up
Status = Mapping[str, Any]


def lab_or_skip() -> None:
    """Skips where no laboratory can be set up; on CI, where root is there, that is a failure."""
    if why := Lab.missing():
        if os.environ.get("CI") and os.geteuid() == 0:
            pytest.fail(f"no laboratory: {why}")
        pytest.skip(f"no laboratory here: {why}")


@dataclass(slots=True)
class HostedRun(PartedRun):
    """`coordinate` on one host, `join` on the others. Steps are slow until `hurry`: faults must meet a run that is under way."""

    def coordinate(self, host: Host, *, name: str = "coordinator") -> None:
        part = self._begin(name, host.command(self._command("coordinator")), {})
        self.process, self.output = part.process, part.output

    def url(self) -> str:
        """The coordinator's, as soon as it answers."""
        url: str = self.wait_until(lambda status: True)["coordinator"]["url"]
        return url

    def join(self, *hosts: Host, url: str = "") -> None:
        """An agent on each; with a URL it is not told the root."""
        where = ["--coordinator", url] if url else ["--root", self.root]
        self.slow_down("slow")
        faults = (f"rank.step:action=pause:seconds={seconds}:during={self.scratch / pace}" for pace, seconds in PACES.items())
        variables = {"KEEPSTEP_FAULTS": ";".join(faults), "OMP_NUM_THREADS": "1"}
        token = {"KEEPSTEP_TOKEN": self.store.get("token").decode()} if url else {}
        for host in hosts:
            name = f"agent-{host.name}-{len(self.parts)}"
            self._begin(name, host.command([*CLI, "agent", *where]), {**variables, **token})

    def slow_down(self, pace: str) -> None:
        (self.scratch / pace).touch()

    def hurry(self) -> None:
        for pace in PACES:
            (self.scratch / pace).unlink(missing_ok=True)

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events() if event["kind"] == kind]


@dataclass(slots=True)
class RankProcess:
    """A process of a host, as this machine sees it; times by time.monotonic()."""

    rank: int
    pid: int
    ended_at: float = math.inf

    @property
    def has_ended(self) -> bool:
        return self.ended_at < math.inf


def ranks_of(status: Mapping[str, Any], hosts: Iterable[Host]) -> list[RankProcess]:
    """The ranks that these hosts run, by the coordinator's view."""
    found = []
    for host in hosts:
        node = next((node for node in status["nodes"] if node["host"] == host.name and node["ranks"]), None)
        for rank in node["ranks"] if node else ():
            found.append(RankProcess(rank["rank"], host.pid_here(rank["pid"])))
    return found


def watch_deaths(watched: Iterable[RankProcess]) -> None:
    """Notes when each of them ends, to the millisecond."""
    for process in watched:
        threading.Thread(target=_await_death, args=(process, os.pidfd_open(process.pid)), daemon=True).start()


def _await_death(process: RankProcess, pidfd: int) -> None:
    select.select([pidfd], [], [])
    process.ended_at = time.monotonic()
    os.close(pidfd)
