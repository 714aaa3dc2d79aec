"""What people do to a run from outside: look at it, verify it, load its checkpoints with stock PyTorch, watch the demonstration."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from e2e.live import STEPS, LiveRun, keepstep

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]

STOCK_LOAD = """
import json, sys
import torch, torch.distributed.checkpoint as dcp
reader = dcp.FileSystemReader(sys.argv[1])
metadata = reader.read_metadata()
state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in metadata.state_dict_metadata.items()}
dcp.load(state, checkpoint_id=sys.argv[1])
assert not any(name.split(".")[0] == "keepstep" for name in sys.modules)
import hashlib
digest = hashlib.sha256()
for name in sorted(name for name in state if name.startswith("model.")):
    digest.update(state[name].numpy().tobytes())
print(json.dumps({"tensors": len(state), "finite": all(bool(t.isfinite().all()) for t in state.values()), "digest": digest.hexdigest()}))
"""


def test_a_finished_run_is_shown_verified_and_loaded_by_stock_pytorch(undisturbed_run: LiveRun) -> None:
    run = undisturbed_run
    status = json.loads(keepstep("status", run.root, "--json").stdout)
    assert (status["phase"], status["step"], status["last_commit"]["step"]) == ("SUCCEEDED", STEPS, STEPS)

    events = json.loads(keepstep("events", run.root, "--json").stdout)
    assert {"at", "run", "term", "attempt", "node", "rank", "step", "kind", "why"} <= events[0].keys()

    course = json.loads(keepstep("trace", run.root, "--json", "--ledger").stdout)
    assert course["steps"]["step"] == list(range(1, STEPS + 1))
    assert course["ledger"]["proved"]
    assert course["ledger"]["sentence"].endswith("samples, each exactly once")
    assert course["evaluations"][-1]["perplexity"] == run.result()["perplexity"]
    assert [attempt["lost_steps"] for attempt in course["attempts"]] == [0]

    verified = keepstep("checkpoints", "verify", run.root, "--json")
    assert verified.returncode == 0, verified.stderr
    rows = json.loads(verified.stdout)
    assert {row["verdict"] for row in rows} == {"every byte is right"}

    directory = Path(run.root) / rows[-1]["directory"]
    stock = subprocess.run([sys.executable, "-c", STOCK_LOAD, str(directory)], capture_output=True, text=True, timeout=120, check=False)
    assert stock.returncode == 0, stock.stderr
    loaded = json.loads(stock.stdout.splitlines()[-1])
    assert loaded["finite"]
    assert loaded["tensors"] > 20

    generate = ("generate", run.root, "--prompt", "abc", "--tokens", "20", "--seed", "3")
    with ThreadPoolExecutor() as pool:  # each imports torch for seconds
        first, second = (ended.stdout for ended in pool.map(lambda command: keepstep(*command), (generate, generate)))
    evaluated = json.loads(keepstep("evaluate", run.root, "--json").stdout)
    assert evaluated["perplexity"] == pytest.approx(run.result()["perplexity"], rel=1e-4)
    assert first == second
    assert first.startswith("abc")


def test_the_demonstration_kills_a_rank_and_a_node_that_run_and_compares_the_bits(start: Start) -> None:
    run = start("run.steps=80", "cluster.spares=1", flags=("--demo",))
    assert run.wait() == 0, "\n".join(run.output) + run.logs()
    run.check_what_always_holds()
    told = "\n".join(run.output)
    assert told.count("all ranks step again") == 2, told
    assert "every loss came out equal to the last bit" in told
    first, second = run.result()["failures"]
    assert "SIGKILL" in first["why"]
    assert second["why"].startswith("lost node")
