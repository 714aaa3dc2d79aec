"""Random steps of a run that had failures are computed again, to the bit; and a replay leaves nothing behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.live import ENV_MARK, NO_HANG, PATIENCE_S, LiveRun, environment_of, gates, keepstep, no_process_left, poll_until
from keepstep.orchestrator.replaying import Archive, Way, replay_steps, travel
from keepstep.storage.steps import read_steps

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Start = Callable[..., LiveRun]
STEPS = 48


@pytest.fixture(scope="module")
def broken(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> LiveRun:
    """Two ranks and a node were killed; the newest two checkpoints are left, and one that stays for ever."""
    folder = tmp_path_factory.mktemp("broken")
    overrides = (NO_HANG, f"run.steps={STEPS}", "checkpoint.keep=2", "checkpoint.keep_every=18")
    run = LiveRun(config_file, str(folder / "root"), overrides).start(faults=gates(folder, 9, 15, 33))
    for _ in range(2):
        run.kill(run.wait_at_gate()["nodes"][-1]["ranks"][-1]["pid"])
        poll_until(lambda: run.stopped() == [], "the group of a killed rank is killed whole", run.said)
    node = run.wait_at_gate()["nodes"][1]
    run.kill(node["pid"], *(rank["pid"] for rank in node["ranks"]))
    poll_until(lambda: run.stopped() == [], "the ranks of the other node are stopped", run.said)
    run.open_gate()
    assert run.wait() == 0, run.said()
    assert len(run.result()["failures"]) == 3
    return run


def files_of(root: str) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in Path(root).rglob("*")}


def test_twenty_random_steps_of_a_run_that_had_failures_come_out_to_the_bit(broken: LiveRun) -> None:
    before = files_of(broken.root)
    steps = sorted(random.Random(20).sample(range(1, STEPS + 1), 20))
    outcomes = replay_steps(broken.root, steps)
    computed = {step for outcome in outcomes for step in outcome.replayed.records.keys() & outcome.recorded.keys()}
    assert set(steps) <= computed, "each of them has a record, and was compared with it"
    assert [str(found.sentence()) for outcome in outcomes for found in outcome.comparison.differences] == []
    assert {leg.attempt for outcome in outcomes for leg in outcome.route.legs} == {1, 2, 3, 4}
    assert {outcome.route.base.step if outcome.route.base else 0 for outcome in outcomes} >= {0, 18}, "most checkpoints were retired"
    assert files_of(broken.root) == before


def test_on_one_process_the_losses_of_four_ranks_come_out_within_float_tolerance(broken: LiveRun) -> None:
    (outcome,) = replay_steps(broken.root, [30], on_one_process=True)
    assert outcome.comparison.num_compared == 12
    assert outcome.comparison.holds
    assert outcome.comparison.widest < outcome.comparison.tolerance / 10


def test_lost_work_is_computed_again_as_it_was(broken: LiveRun) -> None:
    archive = Archive(broken.root)
    lost = [(attempt, max(steps)) for attempt, steps in archive.records.items() if attempt < 4]
    outcomes = [travel(archive, attempt, step, Way()) for attempt, step in lost]
    assert [outcome.comparison.differences for outcome in outcomes] == [()] * 3
    assert all(outcome.recorded[step]["loss_hex"] for outcome, (_, step) in zip(outcomes, lost, strict=True))


def test_the_command_shows_a_step_of_a_live_run_and_its_exit_code_says_whether_it_came_out(start: Start, tmp_path: Path) -> None:
    run = start(NO_HANG, faults=gates(tmp_path, 10))
    run.wait_at_gate()
    poll_until(lambda: any(record["step"] == 8 for record in read_steps(run.store).get(1, ())), "step 8 is in the history", run.said)
    out = tmp_path / "step8"
    done = keepstep("replay", run.root, "--step", "8", "--rank", "3", "--dump", "gradients", "--out", str(out), "--json")
    run.open_gate()
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["holds"]
    assert report["checked"] == "bits of the loss"
    assert {sample["rank"] for sample in report["samples"]} == {3}
    assert {path.name for path in out.iterdir()} == {"gradients.safetensors", "index.json"}
    assert run.wait() == 0, run.said()
    run.check_what_always_holds()
    beyond = keepstep("replay", run.root, "--step", "999")
    assert beyond.returncode == 2
    assert "step 999 is not recorded; the history reaches from step 1 to 24" in beyond.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_replay_that_is_killed_leaves_no_process(undisturbed_run: LiveRun, tmp_path: Path, number: signal.Signals) -> None:
    mark = uuid.uuid4().hex
    words = f"-m keepstep.orchestrator.cli replay {undisturbed_run.root} --step 1 --dump gradients --out out"
    environment = environment_of({ENV_MARK: mark, "TMPDIR": str(tmp_path), "KEEPSTEP_FAULTS": "rank.replay:signal=STOP"})
    with subprocess.Popen(
        [sys.executable, *words.split()], env=environment, cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL
    ) as process:
        replay = LiveRun(undisturbed_run.config, undisturbed_run.root, mark=mark)
        poll_until(lambda: len(replay.stopped()) == 4, "all ranks of the replay compute")
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)  # Ctrl-C goes to all
        process.wait(PATIENCE_S)
    assert no_process_left(replay)
    assert process.returncode != 0
    if number != signal.SIGKILL:
        assert [path.name for path in tmp_path.iterdir() if "out" in path.name or "replay" in path.name] == [], "nor a temporary folder"
