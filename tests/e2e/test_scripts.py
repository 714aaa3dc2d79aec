"""Anybody's torchrun script runs in the same way: same environment, restarts, logs, verdicts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2e.live import LiveRun

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
import ahead
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
out = Path(sys.argv[1])
marker = out / "failed-once"
if len(sys.argv) > 2 and dist.get_rank() == 1 and not marker.exists():
    marker.touch()
    raise ValueError("the third batch is broken")
dist.barrier()
facts = {"environment": dict(os.environ), "total": total.item(), "path": sys.path[0], "threads": torch.get_num_threads(), "argv": sys.argv}
facts["ahead"] = [ahead.PID, ahead.PID == os.getpid(), ahead.SAW_RANK]
(out / f"rank{dist.get_rank()}.json").write_text(json.dumps(facts))
print("rank", dist.get_rank(), "says hello")
dist.destroy_process_group()
"""
OURS = ("KEEPSTEP_", "AWS_")
# Different in every launch, or of the process manager itself.
VARYING = {"MASTER_PORT", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE", "PYTHONPATH", "LC_CTYPE"}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "my_train.py"
    path.write_text(SCRIPT)
    (tmp_path / "ahead.py").write_text("import os\nPID, SAW_RANK = os.getpid(), 'RANK' in os.environ\n")
    return path


def scripted(start: Start, script: Path, out: Path, *more: str) -> LiveRun:
    arguments = json.dumps([str(out), *more])
    out.mkdir()
    preload = json.dumps(["ahead", "not.there"])
    return start(f"train.script={script}", f"train.script_args={arguments}", f"train.preload={preload}")


def facts_of(folder: Path, rank: int) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / f"rank{rank}.json").read_text())
    return facts


def test_a_script_has_torchruns_environment_and_one_that_fails_is_named_and_started_again(
    start: Start, script: Path, tmp_path: Path
) -> None:
    run = scripted(start, script, tmp_path / "ours", "fail")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", str(script), str(theirs)]
    assert run.wait() == 0, run.said()
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    run.check_what_always_holds()
    result = run.result()
    assert (result["outcome"], result["attempts"]) == ("succeeded", 2)
    (failure,) = result["failures"]
    assert failure["rank"] == 1
    assert "ValueError: the third batch is broken" in failure["why"]
    log = Path(run.root) / "logs" / "attempt-000002" / "rank-00001.log"
    assert "rank 1 says hello" in log.read_text()
    for rank in range(4):
        mine, torchruns = facts_of(tmp_path / "ours", rank), facts_of(theirs, rank)
        assert mine["total"] == torchruns["total"] == 4.0
        assert "TORCHELASTIC_ERROR_FILE" in launch_environment(mine)
        assert (mine["path"], mine["threads"]) == (torchruns["path"], torchruns["threads"])
        assert torchruns["ahead"][1:] == [True, True]
        assert mine["ahead"] == [facts_of(tmp_path / "ours", rank - rank % 2)["ahead"][0], False, False], "once per node, before the ranks"
        ours, reference = launch_variables(mine), launch_variables(torchruns)
        assert ours.keys() == reference.keys()
        on_two_nodes = {"GROUP_RANK": str(rank // 2), "GROUP_WORLD_SIZE": "2", "LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}
        assert ours == reference | on_two_nodes


def launch_environment(facts: dict[str, Any]) -> dict[str, str]:
    environment = facts["environment"]
    assert isinstance(environment, dict)
    return environment


def launch_variables(facts: dict[str, Any]) -> dict[str, str]:
    environment = launch_environment(facts)
    inherited = set(environment) & {"PATH", "HOME"}
    assert inherited
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(("TORCH", "MASTER", "RANK", "LOCAL", "GROUP", "ROLE", "WORLD", "OMP")) and name not in VARYING
    }


def test_the_same_error_twice_ends_the_run_with_do_not_requeue(start: Start, tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("raise KeyError('never there')\n")
    run = start(f"train.script={script}")
    assert run.wait() == 4
    run.check_what_always_holds()
    result = run.result()
    assert result["outcome"] == "failed"
    assert "KeyError: 'never there'" in result["why"]
    assert result["attempts"] == 2
