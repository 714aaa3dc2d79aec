"""Tests of the tests: a trainer that forgets a part of its state must end with other bits."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.live import LiveRun, Outcome

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]

# Runs at the start of every interpreter of the mutated run, the forkserver's among them.
SITECUSTOMIZE = """
import importlib.abc, importlib.machinery, sys

class Mutate(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != {module!r}:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
{patch}
        spec.loader.exec_module = exec_module
        return spec

import importlib.util
sys.meta_path.insert(0, Mutate())
"""

MUTANTS = {
    "random streams are not restored": (
        "keepstep.trainer.rng",
        "from dataclasses import replace; module.STREAMS = {n: replace(s, restore=lambda saved: None) for n, s in module.STREAMS.items()}",
    ),
    "the optimizer is not restored": (
        "keepstep.trainer.restore",
        "whole = module.restore; module.restore = lambda m, r, tensors: whole(m, r, {'model': tensors['model']})",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=[name.replace(" ", "-") for name in MUTANTS])
def test_forgotten_state_changes_the_bits(start: Start, undisturbed: Outcome, tmp_path: Path, mutant: tuple[str, str]) -> None:
    module, patch = mutant
    folder = tmp_path / "mutant"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE.format(module=module, patch=textwrap.indent(patch, " " * 12)))
    run = start(environment={"PYTHONPATH": str(folder)})
    run.kill(run.wait_for_step(8)["nodes"][-1]["ranks"][-1]["pid"])
    assert run.wait() == 0, "\n".join(run.output[-40:]) + run.logs()
    assert run.outcome().state_sha256 != undisturbed.state_sha256
    assert run.outcome().losses[:6] == undisturbed.losses[:6]  # up to the checkpoint nothing was forgotten
