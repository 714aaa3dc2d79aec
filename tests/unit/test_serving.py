"""What a coordinator checks and says of overrides that a rewind has left in the log."""

from __future__ import annotations

import pytest

from keepstep.orchestrator import config as configs
from keepstep.orchestrator.errors import InputError
from keepstep.orchestrator.serving import _check_overrides

WORKERS = ("train.loader_workers=2",)


def test_a_config_that_a_rewind_does_not_fit_is_refused_before_a_term_is_opened() -> None:
    config = configs.parse("[data]\nstreaming = true\n", "run.toml")
    with pytest.raises(InputError, match=r"a rewind of this run set train.loader_workers=2, which does not fit .*streaming") as caught:
        _check_overrides(config, WORKERS)
    assert "keepstep rewind ROOT --to STEP -o" in str(caught.value)
    _check_overrides(configs.parse("", "run.toml"), WORKERS)


def test_values_of_run_toml_that_do_not_hold_are_named() -> None:
    config = configs.parse("[run]\nsteps = 500\n[train]\nloader_workers = 2\n", "run.toml")
    assert configs.explain_overrides(config, ()) == configs.explain_overrides(config, WORKERS) == ""
    told = configs.explain_overrides(config, (*WORKERS, "run.steps=60", "optimizer.lr=1e-3"))
    assert told == "since a rewind run.steps = 60, not 500; optimizer.lr = 0.001, not 0.003; another `keepstep rewind` with -o changes that"
