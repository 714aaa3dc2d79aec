"""A job on a real Slurm, four nodes and a spare on this machine: what breaks, and what Slurm and people do to it, costs no bit."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import SlurmCluster, missing

from e2e.live import ENV_MARK, LiveRun, Outcome, is_stopped, poll_until
from keepstep.orchestrator.archive import read_result
from keepstep.storage.records import Attempt
from keepstep.storage.runlog import RunLog

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]  # the job starts three times, each time with five nodes

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "slurm" / "keepstep.sbatch"
OVERRIDES = ("cluster.nodes=4", "cluster.ranks_per_node=1", "cluster.hang_s=200")  # nobody is to find out that this test stops a rank
HELD_RANK = 1


@dataclass(slots=True)
class Job(LiveRun):
    """deploy/slurm/keepstep.sbatch as a job. Everything that it starts carries the run's mark."""

    slurm: SlurmCluster = field(kw_only=True)
    folder: Path = field(kw_only=True)
    id: str = ""

    def submit(self) -> Job:
        """HELD_RANK stops after step 8, and whenever `hold()` was called."""
        held = f"rank.step:rank={HELD_RANK}:signal=STOP"
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "KEEPSTEP_SCRATCH_BASE": str(self.slurm.folder),
            "KEEPSTEP_FAULTS": f"{held}:step=8:once={self.folder / 'held-once'};{held}:when={self.folder / 'hold'}",
            "OMP_NUM_THREADS": "1",  # as several ranks on a node have it: the number of threads decides the order of sums
            ENV_MARK: self.mark,
        }
        self.slurm.run("keepstep", "prepare", str(self.config), "-o", f"run.root={self.root}", environment=environment)
        options = ("--parsable", "--nodes=5", f"--chdir={self.folder}", "--output=job.log")
        words = (word for override in OVERRIDES for word in ("-o", override))
        self.id = self.slurm.run("sbatch", *options, str(SCRIPT), str(self.config), self.root, *words, environment=environment)
        return self

    def hold(self, attempt: int) -> dict[str, Any]:
        """Stops the run after one of the first steps of an attempt, and gives the status."""
        self.wait_until(lambda s: s["phase"] == "TRAINING" and s["attempt"] == attempt)
        (self.folder / "hold").touch()
        return self.wait_until_held(attempt)

    def wait_until_held(self, attempt: int) -> dict[str, Any]:
        return self.wait_until(lambda s: s["phase"] == "TRAINING" and s["attempt"] == attempt and is_stopped(held_pid(s)))

    def wait_for_end(self) -> dict[str, str]:
        """What Slurm says of the job then."""
        poll_until(lambda: (read_result(self.store) or {}).get("outcome") in ("succeeded", "failed"), "the run is over")
        poll_until(lambda: self.slurm.job(self.id)["JobState"] not in ("RUNNING", "COMPLETING"), "the job is over")
        return self.slurm.job(self.id)

    def logs(self) -> str:
        log = self.folder / "job.log"
        return f"\n--- {log.name}\n{log.read_text(errors='replace')[-6000:]}" if log.exists() else self.slurm.logs()


def held_pid(status: dict[str, Any]) -> int:
    """0 while that rank is not there."""
    return next((rank["pid"] for node in status["nodes"] for rank in node["ranks"] if rank["rank"] == HELD_RANK), 0)


def host_of(node: dict[str, Any]) -> str:
    return str(node["id"].partition("#")[0])


@pytest.fixture
def slurm(short_folder: Path) -> Iterator[SlurmCluster]:
    """Skips where Slurm is not installed; fails on CI, where it must be."""
    why = missing()
    if why and os.environ.get("CI"):
        pytest.fail(f"{why} (`make install` installs it)")
    if why:
        pytest.skip(why)
    with SlurmCluster(short_folder, num_nodes=5) as cluster:
        yield cluster


def test_a_lost_node_a_requeue_and_the_time_limit_cost_no_bit(
    slurm: SlurmCluster, config_file: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    job = Job(config_file, str(tmp_path / "root"), slurm=slurm, folder=tmp_path).submit()
    spoiled = job.wait_until_held(attempt=1)
    victim = next(node for node in spoiled["nodes"] if node["ranks"] and host_of(node) != slurm.job(job.id)["BatchHost"])
    slurm.kill_node(host_of(victim))
    slurm.run("scontrol", "update", f"NodeName={host_of(victim)}", "State=DOWN", "Reason=killed")  # Slurm would find out within a minute

    requeued = job.hold(attempt=2)
    assert slurm.job(job.id)["NumNodes"] == "4", "the job goes on with the nodes that are left"
    slurm.boot_node(host_of(victim))  # back in Slurm, and in the job from its next start on
    slurm.run("scontrol", "requeue", job.id)  # which wakes the held rank up, too: Slurm sends SIGCONT before SIGTERM

    warned = job.hold(attempt=3)
    slurm.run("scancel", "--batch", "--signal=USR1", job.id)  # what #SBATCH --signal does when the time limit comes near
    poll_until(lambda: "departure" in {event["kind"] for event in job.events() if event["attempt"] == 3}, "all ranks are asked to leave")
    os.kill(held_pid(warned), signal.SIGCONT)

    ended = job.wait_for_end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "2"), job.logs()
    job.check_what_always_holds()
    assert job.outcome() == undisturbed
    assert [failure["node"] for failure in job.result()["failures"]] == [victim["id"]]
    attempts = [record for record in RunLog.read_all(job.store).records if isinstance(record, Attempt)]
    reached = [6, requeued["step"], warned["step"]]
    assert all(resumed.resume_step >= step for resumed, step in zip(attempts[1:], reached, strict=True)), "requeues cost no step"
