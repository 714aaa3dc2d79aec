"""`keepstep chaos` as a user runs it: four faults in one run, every verdict decided by code, and the bits of the undisturbed run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from e2e.live import PATIENCE_S

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

STEPS = 36
PLAN = """
seed = 3
run = "{run}"
overrides = ["run.steps={steps}"]
faults = [
    {{ fault = "raise-rank", at_step = 7, rank = 2 }},
    {{ fault = "damage-checkpoint", at_step = 14, rank = 1 }},
    {{ fault = "stop-node", at_step = 20, rank = 0, lasting_s = 0.5 }},
    {{ fault = "kill-persister", at_step = 26, rank = 3 }},
]
"""


def test_planned_faults_are_judged_and_cost_no_bit(config_file: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.format(run=config_file, steps=STEPS))
    command = [sys.executable, "-m", "keepstep.orchestrator.cli", "chaos", str(plan), "--root", str(tmp_path / "chaos"), "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    verdict = json.loads(ran.stdout)
    assert verdict["holds"]
    assert [row["kind"] for row in verdict["faults"]] == ["raise-rank", "damage-checkpoint", "stop-node", "kill-persister"]
    assert [row["wrong"] for row in verdict["faults"]] == [""] * 4
    (history,) = (check["found"] for check in verdict["checks"] if check["what"] == "the history is the undisturbed one")
    assert history.startswith(f"{STEPS} losses equal to the last bit, state sha256 ")
