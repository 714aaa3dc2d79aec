"""Killed for want of memory, or by somebody: the kernel's own words, and a real OOM kill where root may make a cgroup."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from keepstep.orchestrator import cgroups
from keepstep.orchestrator.oom import WINDOW_S, KernelLog, MemoryGroup, OomWitness, killed_in, memory_group, read_count

KMSG = """6,2041,93221448,-;python3 invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0
3,2069,93221571,-;Memory cgroup out of memory: Killed process 3841 (python3) total-vm:1064804kB, anon-rss:497164kB, file-rss:8192kB, \
shmem-rss:0kB, UID:0 pgtables:1052kB oom_score_adj:0
3,2070,93221599,-;Out of memory: Killed process 77 (we)ird) total-vm:9kB, anon-rss:8kB, file-rss:0kB, shmem-rss:0kB, UID:1000
"""


def test_the_kernels_log_names_what_it_killed() -> None:
    assert killed_in(KMSG) == {3841: 497164 << 10, 77: 8 << 10}
    assert killed_in("6,1,2,-;Killed by a person") == {}


def test_both_versions_count_alike() -> None:
    assert read_count("low 0\nhigh 0\nmax 41\noom 2\noom_kill 3\noom_group_kill 0\n") == 3
    assert read_count("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n") == 2
    assert read_count("") == 0


def mount(root: str, at: Path, kind: str, options: str) -> str:
    return f"36 35 0:31 {root} {at} rw,nosuid - {kind} {kind} {options}"


def made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("oom_kill 0\n")
    return path


def test_a_groups_file_is_found_in_version_2(tmp_path: Path) -> None:
    events = made(tmp_path / "job/step/memory.events")
    mounts = mount("/", tmp_path, "cgroup2", "rw,nsdelegate")
    assert memory_group("0::/job/step\n", mounts) == MemoryGroup(events)
    assert memory_group("0::/job/step/without/controller\n", mounts) == MemoryGroup(events), "the nearest one above"
    assert memory_group("0::/other\n", mounts) is None


def test_a_groups_file_is_found_in_version_1_and_beside_it(tmp_path: Path) -> None:
    control = made(tmp_path / "v1/job/memory.oom_control")
    mounts = "\n".join((mount("/", tmp_path / "v1", "cgroup", "rw,memory"), mount("/", tmp_path / "v2", "cgroup2", "rw")))
    assert memory_group("4:memory:/job\n3:cpuset:/else\n0::/\n", mounts) == MemoryGroup(control)


def test_a_containers_part_of_the_tree_counts(tmp_path: Path) -> None:
    control = made(tmp_path / "memory.oom_control")
    mounts = mount("/docker/123", tmp_path, "cgroup", "rw,memory")
    assert memory_group("4:memory:/docker/123\n", mounts) == MemoryGroup(control)
    assert memory_group("4:memory:/docker/123/gone\n", mounts) == MemoryGroup(control)


@dataclass
class Witness:
    """A node's witness without a kernel log, and the cgroup that it looks at."""

    events: Path
    kernel_log: KernelLog = field(default_factory=KernelLog)

    def __post_init__(self) -> None:
        self.asked = OomWitness(self.kernel_log)
        self.asked._groups = {pid: MemoryGroup(self.events) for pid in (1, 2, 3)}
        self.asked.refresh(WINDOW_S)
        self.asked.refresh(2 * WINDOW_S)

    def count(self, kills: int) -> None:
        self.events.write_text(f"oom_kill {kills}\n")


def test_as_many_deaths_are_explained_as_the_kernel_counted(tmp_path: Path) -> None:
    witness = Witness(made(tmp_path / "memory.events"))
    assert witness.asked.verdict(1) == ""
    witness.count(2)
    assert [bool(witness.asked.verdict(pid)) for pid in (1, 2, 3)] == [True, True, False]


def test_a_kill_of_long_ago_explains_nothing(tmp_path: Path) -> None:
    witness = Witness(made(tmp_path / "memory.events"))
    witness.count(1)
    witness.asked.refresh(3 * WINDOW_S)
    witness.asked.refresh(4 * WINDOW_S)
    assert witness.asked.verdict(1) == ""


def test_a_kill_that_was_counted_a_moment_ago_still_explains_a_death(tmp_path: Path) -> None:
    witness = Witness(made(tmp_path / "memory.events"))
    witness.count(1)
    witness.asked.refresh(3 * WINDOW_S)
    assert witness.asked.verdict(1)


def test_the_process_that_the_kernel_names_explains_the_count(tmp_path: Path) -> None:
    witness = Witness(made(tmp_path / "memory.events"), KernelLog(named={4711: 1 << 30}))
    witness.count(1)
    assert witness.asked.verdict(1) == "", "it was a loader's worker"


def test_the_sentence_has_the_numbers(tmp_path: Path) -> None:
    witness = Witness(made(tmp_path / "memory.events"), KernelLog(named={1: 489_000_000}))
    (tmp_path / "memory.max").write_text("512000000\n")
    (tmp_path / "memory.peak").write_text("511999999\n")
    expected = "SIGKILL by the kernel's OOM killer, 489 MB of its own, its cgroup's limit is 512 MB, the most that was used in it 512 MB"
    assert witness.asked.verdict(1) == expected


EATER = """
import sys
sys.stdin.readline()
eaten = []
while True:
    eaten.append(b"x" * (4 << 20))
"""


@pytest.fixture
def tight() -> Iterator[cgroups.Cgroup]:
    """40 MB for everything in it."""
    if why := cgroups.missing():
        pytest.skip(why)
    group = cgroups.Cgroup(f"keepstep-test-{uuid.uuid4().hex[:8]}")
    group.make()
    group.limit_memory(40_000_000)
    yield group
    group.remove()


@pytest.mark.slow
@pytest.mark.parametrize("kernel_log", [KernelLog.open(), KernelLog()], ids=["with-the-kernels-log", "by-the-count-alone"])
def test_a_real_oom_kill_is_told_from_a_kill_by_somebody(tight: cgroups.Cgroup, kernel_log: KernelLog) -> None:
    witness = OomWitness(kernel_log)
    eater, victim = (subprocess.Popen([sys.executable, "-c", EATER], stdin=subprocess.PIPE) for _ in range(2))
    for process in (eater, victim):
        tight.enter(process.pid)
    witness.watch([eater.pid, victim.pid])
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    assert witness.verdict(victim.pid) == ""
    eater.communicate(b"\n")
    assert eater.returncode == -signal.SIGKILL
    why = witness.verdict(eater.pid)
    assert "SIGKILL by the kernel's OOM killer" in why
    assert "limit is 40 MB" in why
    kernel_log.close()
