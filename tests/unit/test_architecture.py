"""What the import contracts in pyproject.toml cannot say: which modules they must name, and what a process really loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("orchestrator", "trainer", "storage")
TORCH_FREE_TRAINER = ("contract", "config", "attach", "course")


def torch_free_modules() -> list[str]:
    """The coordinator's image has no torch, and an agent must answer before torch is imported."""
    own = [path for name in ("orchestrator", "storage") for path in sorted((ROOT / name).glob("*.py")) if path.stem not in {"__init__"}]
    return [f"keepstep.{path.parent.name}.{path.stem}" for path in own] + [f"keepstep.trainer.{name}" for name in TORCH_FREE_TRAINER]


def test_every_module_that_calls_itself_pure_is_held_to_it() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (pure,) = [contract for contract in contracts if contract["name"].startswith("Pure modules")]
    modules = (path for package in PACKAGES for path in (ROOT / package).glob("*.py"))
    claims = {
        f"keepstep.{path.parent.name}.{path.stem}"
        for path in modules
        if re.search(r"\bPure\b", ast.get_docstring(ast.parse(path.read_text())) or "")
    }
    assert claims == set(pure["source_modules"])


PROGRAM = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
"""


@pytest.mark.slow
def test_a_process_without_ranks_never_loads_torch() -> None:
    command = [sys.executable, "-c", PROGRAM, *torch_free_modules()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
