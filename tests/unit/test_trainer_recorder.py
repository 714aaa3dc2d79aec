"""The line of a step: complete, documented, and JSON whatever the numbers are."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trainer_ranks import TINY, FolderStaging, run_ranks, spec_of

from keepstep.storage.canonical import canonical_json

README = Path(__file__).resolve().parents[2] / "trainer" / "README.md"
NUMBERS = ("loss", "grad_norm", "param_norm", "update_ratio_before", "lr", "tokens_per_s", "seconds")


def three_steps(rank: int, world_size: int, root: str) -> None:
    """The third one's record is written again with numbers that JSON does not know."""
    import math
    import time

    from keepstep.trainer.attach import Attached
    from keepstep.trainer.config import TrainerConfig
    from keepstep.trainer.loop import advance
    from keepstep.trainer.parallel import join
    from keepstep.trainer.recorder import record_step
    from keepstep.trainer.run import open_run

    me = Attached(spec_of(Path(root), rank, 1, None))
    me.__dict__["staging"] = FolderStaging(Path(root), attempt=1, rank=rank, world_size=world_size)
    config = TINY | {"data": TINY["data"] | {"source": f"{root}/text"}, "run": {"root": root, "steps": 3}, "trace": {"interval": 3}}
    run = open_run(TrainerConfig.model_validate(config), me, join(me))
    for step in (1, 2, 3):
        agreed = advance(run, run.share[step])
    broken = replace(agreed, grad_norm=math.nan, param_norm=math.inf, update_ratio_before=math.nan)
    record_step(run, broken, lr=0.0, started_at=time.monotonic())


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("root")
    (root / "text").mkdir()
    for i in range(4):
        (root / "text" / f"{i}.txt").write_text(f"{i}. " + "Stately, plump Buck Mulligan came from the stairhead. " * 20)
    run_ranks(1, three_steps, str(root))
    return [json.loads(line) for line in (root / "records.jsonl").read_text().splitlines()]


def documented(heading: str) -> set[str]:
    """The code spans of the first columns of the first table whose heading begins so, but for names of modules."""
    table = re.search(rf"^\| {re.escape(heading)}.*?(?=\n\n)", README.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert table
    column = 1 if heading == "key" else 2
    return set(re.findall(r"`([\w.]+)`", "\n".join(row.split("|")[column] for row in table.group().splitlines()[2:])))


@pytest.mark.slow
def test_every_number_of_a_step_is_there_and_documented(lines: list[dict[str, Any]]) -> None:
    first, second, third, _ = lines
    assert all(isinstance(second[name], float) for name in NUMBERS)
    assert float.fromhex(second["loss_hex"]) == second["loss"]
    assert second["tokens_per_s"] == pytest.approx(second["tokens"] / second["seconds"], rel=1e-3)
    assert first["update_ratio_before"] is None
    keys = set(first) | set(second) | set(third)
    assert keys - documented("key") == set(), "a key that trainer/README.md does not explain"
    assert documented("key") - keys == {"loss_scale"}, "a key that is no longer written"


@pytest.mark.slow
def test_every_statistic_of_a_layer_is_documented(lines: list[dict[str, Any]]) -> None:
    assert [record["step"] for record in lines[:3] if "layers" in record] == [1, 3]
    found = {statistic for figures in lines[0]["layers"].values() for statistic in figures}
    assert found == documented("name")


@pytest.mark.slow
def test_a_record_is_json_whatever_the_numbers_are(lines: list[dict[str, Any]]) -> None:
    broken = lines[3]
    assert (broken["grad_norm"], broken["param_norm"], broken["update_ratio_before"]) == (None, None, None)
    canonical_json(broken)
