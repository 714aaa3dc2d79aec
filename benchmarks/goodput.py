"""The ledger against the truth: faults of known cost, timed by the injector's own clock, next to what keepstep says the time went to.

    python benchmarks/goodput.py           two runs of 160 steps, results/goodput.json
    python benchmarks/goodput.py --quick   one of 80 steps

One coordinator and two nodes of two ranks, started by this script alone. In each run every save of rank 1 is held up (a fault point), rank
2 is killed at a known step (redone, stop, start), loading is slowed in a later attempt (restore), a node is killed and withheld (wait), a
rank is stopped until its silence is a hang (detect), and the whole run is ended and begun again after a pause (finish, away). The truth
comes from this script: when it did what, and what the ranks' progress pages showed when, read every few milliseconds. Target: no class
differs by more than 3 % of the wall time.

What the injector does not know: what saves cost beside the inflicted pause (truth: productive, ledger: stall), and that a coordinator
lingers after its last record until its agents know of the end (truth: finish, ledger: away).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import HERE, Verdict, machine, parser, progress_pages, publish
from live import make_folder

from keepstep.orchestrator import config as configs
from keepstep.orchestrator.commands import ready
from keepstep.orchestrator.ledger import CLASSES
from keepstep.orchestrator.processes import python_command
from keepstep.storage.faults import ENV_FAULTS
from keepstep.storage.runlog import RunLog
from keepstep.trainer.contract import PROGRESS, Phase

TARGET = 0.03  # of the wall time
INTERVAL = 10  # steps between checkpoints
STALL_S = 0.15  # of every save, on purpose
SLOW_LOAD_S = 2.5
WITHHELD_S = 4.0
AWAY_S = 3.0
POLL_S = 0.004
DEADLINE_S = 90.0
PAGE = re.compile(r"progress-(\d+)-\d+")
CLI = "keepstep.orchestrator.cli"


@dataclass(slots=True)
class Seen:
    """What the pages of one attempt's ranks showed, by the time of this script's clock."""

    resume: int
    loading_at: dict[str, float] = field(default_factory=dict)
    began_at: dict[str, float] = field(default_factory=dict)
    stepped_at: dict[int, float] = field(default_factory=dict)  # step -> when the last rank had finished it
    saves: dict[str, list[int]] = field(default_factory=dict)


class Watcher(threading.Thread):
    """Reads every rank's progress page all the time."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._folder = folder
        self.attempts: dict[int, Seen] = {}
        self.last_look: dict[int, float] = {}

    def run(self) -> None:
        while True:
            for path, content in progress_pages(self._folder):
                if len(content) >= PROGRESS.size:
                    self._see(path, content)
            time.sleep(POLL_S)

    def _see(self, path: Path, content: bytes) -> None:
        phase, _, step, beats, at, *_ = PROGRESS.unpack_from(content)
        if not (name := PAGE.fullmatch(path.name)):
            return
        attempt, rank = int(name[1]), f"{path.parent.name}/{path.name}"
        seen = self.attempts.setdefault(attempt, Seen(resume=step))
        if beats and phase == Phase.LOAD:
            seen.loading_at.setdefault(rank, at)
        if phase >= Phase.STEP and beats:
            seen.began_at.setdefault(rank, at)
        if phase == Phase.SAVE and step not in (saves := seen.saves.setdefault(rank, [])):
            saves.append(step)
        if phase >= Phase.STEP and step > seen.resume and step not in seen.stepped_at:
            seen.stepped_at[step] = at
        self.last_look[attempt] = time.monotonic()


class Story:
    """One run: what was done to it, when, and what that must have cost."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        root = folder / "root"
        overrides = [
            "cluster.nodes=2",
            "cluster.ranks_per_node=2",
            "cluster.hang_s=2",
            "cluster.max_failures=100",
            "cluster.backoff_s=0.05",
        ]
        overrides += [f"run.root={root}", f"run.steps={steps}", f"checkpoint.interval={INTERVAL}", "cluster.strikes=100"]
        self.config = configs.load(HERE / "recovery.toml", overrides)
        self.store, self.config_path = ready(self.config)
        self.logs = (folder / "log").open("ab")
        self.slow = folder / "slow-load"
        os.environ[ENV_FAULTS] = (
            f"rank.stage.before:rank=1:action=pause:seconds={STALL_S};rank.restore:rank=2:when={self.slow}:action=pause:seconds={SLOW_LOAD_S}"
        )
        self.watcher = Watcher(folder / "s")
        self.watcher.start()
        self.truth = dict.fromkeys(CLASSES, 0.0)
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        self.ready_at: list[float] = []
        self.began_at = 0.0
        self.attempts: list[tuple[int, float, float | None]] = []  # number, launched, killed

    # What is done to it.

    def coordinator(self) -> subprocess.Popen[bytes]:
        config_path = str(self.config_path)
        return self._spawn(python_command(CLI, "coordinator", config_path, "--managed"))

    def agent(self, name: str) -> None:
        command = ("agent", "--root", self.config.run.root, "--node", name, "--scratch", str(self.folder / "s" / name))
        self.agents[name] = self._spawn(python_command(CLI, *command))

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=self.logs, stderr=self.logs, stdin=subprocess.DEVNULL, start_new_session=True)

    def status(self) -> dict[str, Any]:
        from keepstep.orchestrator.viewing import read_status

        return read_status(self.config.run.root)

    def until(self, holds: Callable[[], Any]) -> float:
        deadline = time.monotonic() + DEADLINE_S
        while not holds():
            assert time.monotonic() < deadline, f"it never came to that, see {self.folder}"
            time.sleep(POLL_S)
        return time.monotonic()

    def until_step(self, attempt: int, step: int) -> float:
        return self.until(lambda: max(self.seen(attempt).stepped_at, default=-1) >= step)

    def seen(self, attempt: int) -> Seen:
        return self.watcher.attempts.get(attempt) or Seen(resume=0)

    def pid_of(self, rank: int) -> int:
        return next(r["pid"] for node in self.status()["nodes"] for r in node["ranks"] if r["rank"] == rank)

    def pids(self) -> list[int]:
        return [r["pid"] for node in self.status()["nodes"] for r in node["ranks"]]

    def until_dead(self, pids: list[int]) -> float:
        return self.until(lambda: not any(_is_alive(pid) for pid in pids))


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def tell(story: Story) -> dict[str, float]:
    """Does everything to the run; returns what the injector knows of where its time went."""
    truth, third = story.truth, story.steps // 4
    opened = story.coordinator()
    story.began_at = story.until(lambda: RunLog.read_all(story.store).lineage.opened)
    story.agent("node0")
    story.agent("node1")
    joined = story.until(lambda: 1 in story.watcher.attempts)  # both were ready a moment before
    truth["wait"] += joined - story.began_at
    story.until_step(1, third + 3)  # three steps after a checkpoint

    pids = story.pids()
    os.kill(story.pid_of(2), signal.SIGKILL)
    killed = time.monotonic()
    dead = story.until_dead(pids)
    story.attempts.append((1, joined, killed))
    truth["stop"] += dead - killed
    story.slow.touch()
    launched = dead

    story.until_step(2, 2 * third + 4)
    pids, stopped = story.pids(), time.monotonic()
    os.kill(story.pid_of(3), signal.SIGSTOP)
    dead = story.until(lambda: not all(_is_alive(pid) for pid in pids))
    story.attempts.append((2, launched, stopped))
    truth["detect"] += dead - stopped
    launched = dead

    story.until_step(3, 3 * third + 2)
    pids, killed = story.pids(), time.monotonic()
    os.killpg(story.agents["node1"].pid, signal.SIGKILL)
    story.agents["node1"].wait()
    dead = story.until_dead(pids)
    story.attempts.append((3, launched, killed))
    truth["stop"] += dead - killed
    time.sleep(WITHHELD_S)
    story.agent("node1")
    joined = story.until(lambda: 4 in story.watcher.attempts)
    truth["wait"] += joined - dead

    left = story.until_step(4, 3 * third + 8)
    opened.send_signal(signal.SIGTERM)
    opened.wait()
    gone = time.monotonic()
    story.attempts.append((4, joined, None))
    truth["finish"] += gone - max(story.seen(4).stepped_at.values(), default=left)
    for agent in story.agents.values():
        agent.wait()
    time.sleep(AWAY_S)
    opened = story.coordinator()
    again = story.until(lambda: RunLog.read_all(story.store).lineage.term == 2)
    truth["away"] += again - gone
    story.agent("node0")
    story.agent("node1")
    joined = story.until(lambda: 5 in story.watcher.attempts)
    truth["wait"] += joined - again
    opened.wait()
    ended = time.monotonic()
    story.attempts.append((5, joined, None))
    truth["finish"] += ended - max(story.seen(5).stepped_at.values())
    for agent in story.agents.values():
        agent.wait()
    for attempt in story.attempts:
        book_attempt(story, *attempt)
    return truth


def book_attempt(story: Story, attempt: int, launched: float, killed: float | None) -> None:
    """From its launch to its last step, or to its death."""
    seen, truth = story.seen(attempt), story.truth
    loading, began = max(seen.loading_at.values(), default=None), max(seen.began_at.values())
    truth["start"] += (loading or began) - launched
    truth["restore"] += began - (loading or began)
    last = max(seen.stepped_at)
    stalls = [step for step in max(seen.saves.values(), key=len, default=[]) if step < last]
    truth["stall"] += STALL_S * len(stalls)
    kept = last if killed is None else story.seen(attempt + 1).resume
    kept_s = seen.stepped_at.get(kept, began) - began - STALL_S * len([step for step in stalls if step < kept])
    truth["productive"] += kept_s
    truth["redone"] += (seen.stepped_at[last] - began) - STALL_S * len(stalls) - kept_s
    if killed is not None:
        truth["redone"] += max(0.0, killed - seen.stepped_at[last])


def told(story: Story) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((Path(story.config.run.root) / "result.json").read_text())
    return result


def compare(number: int, truth: dict[str, float], result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    wall_s = sum(truth.values())
    for name in CLASSES:
        found = result["seconds"][name]
        error = abs(found - truth[name]) / wall_s
        yield {"run": number, "class": name, "truth_s": round(truth[name], 3), "ledger_s": found, "error": round(error, 4)}
    sums = sum(result["seconds"].values())
    yield {
        "run": number,
        "class": "sum",
        "truth_s": round(wall_s, 3),
        "ledger_s": round(sums, 3),
        "error": round(abs(sums - wall_s) / wall_s, 4),
    }


def main() -> None:
    quick = parser(__doc__).parse_args().quick
    began_on, rows, results = machine(), list[dict[str, Any]](), list[dict[str, Any]]()
    for number in range(1 if quick else 2):
        story = Story(make_folder(), 80 if quick else 160)
        truth = tell(story)
        results.append(told(story))
        for row in compare(number, truth, results[-1]):
            rows.append(row)
            print(f"{row['class']:<12} truth {row['truth_s']:8.2f} s   ledger {row['ledger_s']:8.2f} s   off by {100 * row['error']:.2f} %")
    worst = max((row for row in rows if row["class"] != "sum"), key=lambda row: row["error"])
    sums = max(row["error"] for row in rows if row["class"] == "sum")
    verdicts = [
        Verdict(
            what="goodput ledger against injected truth: the worst class",
            target=f"<= {100 * TARGET:g} % of the wall time",
            result=f"{100 * worst['error']:.2f} % ({worst['class']}: {worst['ledger_s']:.2f} s for {worst['truth_s']:.2f} s)",
            met=worst["error"] <= TARGET,
        ),
        Verdict(what="its classes sum to the wall time", target="within 1 %", result=f"{100 * sums:.2f} %", met=sums <= 0.01),
    ]
    publish("goodput", verdicts, {"rows": rows, "results": results}, began_on=began_on)


if __name__ == "__main__":
    main()
