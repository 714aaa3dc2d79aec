"""What import contracts (pyproject.toml) cannot see: which modules a process really loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCH_FREE_TRAINER = ("contract", "config", "attach")


def torch_free_modules() -> list[str]:
    """The coordinator's image has no torch, and an agent must answer before torch is imported."""
    own = [
        path
        for name in ("orchestrator", "storage")
        for path in sorted((ROOT / name).glob("*.py"))
        if path.stem not in {"__init__", "ranks"}
    ]
    return [f"keepstep.{path.parent.name}.{path.stem}" for path in own] + [f"keepstep.trainer.{name}" for name in TORCH_FREE_TRAINER]


@pytest.mark.slow
def test_a_process_without_ranks_never_loads_torch() -> None:
    program = f"import sys, importlib\nfor name in {torch_free_modules()}:\n importlib.import_module(name)\n assert 'torch' not in sys.modules, name"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
