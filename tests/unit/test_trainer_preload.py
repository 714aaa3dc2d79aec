"""The forkserver has everything that a rank needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trainer_ranks import TINY, run_ranks, train_ranks

pytestmark = pytest.mark.slow

QUIET = """
import sys, threading
import keepstep.trainer.preload
import torch
assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
assert len(__import__("os").listdir("/proc/self/task")) == 1, "native threads"
assert not torch.cuda.is_initialized()
"""


def test_preloading_starts_no_thread_and_touches_no_gpu() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", QUIET], check=True, timeout=120, env={"OMP_NUM_THREADS": "1"})


def watched(rank: int, world_size: int, config: dict[str, Any], resume: Any) -> None:
    import trainer_ranks

    before = set(sys.modules)
    trainer_ranks._train(rank, world_size, config["run"]["root"], config, 2 if resume else 1, resume, 0, "")
    extra = {name for name in set(sys.modules) - before if not name.startswith("fsspec")}  # fsspec: only `prepare` from a path needs it
    assert not extra, f"imported by a running rank, missing in PRELOAD: {sorted(extra)}"


@pytest.mark.parametrize("cluster", [{}, {"exact_reduction": True, "logical_ranks": 2}], ids=["normal", "exact reduction"])
def test_a_rank_imports_nothing_on_its_way_from_the_fork_to_the_end(tmp_path: Path, cluster: dict[str, Any]) -> None:
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / f"text/{i}.txt").write_text("So we beat on, boats against the current.\n" * 20)
    config = TINY | {
        "data": TINY["data"] | {"source": str(tmp_path / "text")},
        "run": {"root": str(tmp_path), "steps": 2},
        "train": TINY["train"] | {"loader_workers": 1},
        "checkpoint": {"interval": 1},
        "cluster": cluster,
    }
    run_ranks(1, watched, config, None)
    from trainer_ranks import commit

    (folder,) = tmp_path.glob("data/a000001/s000000001-*")
    run_ranks(1, watched, config, commit(tmp_path, str(folder.relative_to(tmp_path))))
    train_ranks(tmp_path, config, world_size=1, attempt=3)
