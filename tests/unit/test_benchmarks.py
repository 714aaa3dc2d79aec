"""What the benchmarks share: the table of targets, medians and percentiles, and that the suite, its scripts and their document agree."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "peers")]

import bench  # noqa: E402
import common  # noqa: E402
import environments  # noqa: E402
import steplog  # noqa: E402

sys.path[:2] = []
SHARED = {"bench", "common", "live", "saving", "torchrun_train", "flame"}  # no benchmarks of their own
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in SHARED)
VALUES = st.lists(st.floats(0, 1e6), min_size=1, max_size=50)


class TestFigures:
    @given(VALUES, st.floats(0.01, 1.0))
    def test_a_percentile_is_a_value_that_so_many_do_not_exceed(self, values: list[float], share: float) -> None:
        found = common.percentile(values, share)
        assert found in values
        assert sum(each <= found for each in values) >= math.floor(share * len(values))

    def test_the_nearest_rank_of_twenty(self) -> None:
        twenty = list(range(1, 21))
        assert [common.percentile(twenty, share) for share in (0.05, 0.5, 0.95, 1.0)] == [1, 10, 19, 20]

    def test_of_nothing_there_is_nothing(self) -> None:
        assert common.percentile([], 0.5) is None
        assert common.median([]) is None
        assert common.spread([]) == "nothing measured"

    def test_a_spread_shows_median_extremes_and_number(self) -> None:
        assert common.spread([3.0, 1.0, 2.0]) == "2.00 s (1.00 to 3.00, n = 3)"

    def test_a_machine_says_what_it_computes_with(self) -> None:
        found = common.machine()
        assert found["cores"] >= 1
        assert found["torch"].startswith("2.")
        assert found["cpu"]


class TestRecoveries:
    def test_their_parts_come_from_the_events_and_the_note_shows_the_medians(self, tmp_path: Path) -> None:
        told = [{"name": "detect", "seconds": 0.001}, {"name": "restore", "seconds": 0.25}]
        events = [{"kind": "training"}, *({"kind": "trains-again", "recovery": {"spans": told}} for _ in range(2))]
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        parts = common.recoveries(tmp_path, 2)
        assert parts == [{"detect": 0.001, "restore": 0.25}] * 2
        assert common.spent_on([*parts, {"detect": 0.5, "restore": 0.75}]) == "spent on: restore 0.25 s"
        assert common.spent_on([]) == ""

    def test_one_that_is_never_told_is_not_waited_for_for_ever(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(common, "EVENTS_S", 0.0)
        (tmp_path / "events.jsonl").write_text("")
        assert common.recoveries(tmp_path, 1) == []


class TestTable:
    @pytest.fixture
    def results(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv(common.ENV_OUT, str(tmp_path))
        met = common.Verdict(what="rank", target="<= 1 s", result="0.4 s", met=True)
        missed = common.Verdict(what="node", target="<= 1 s", result="2.0 s", met=False, note="detection 1.6 s")
        open_ = common.Verdict(what="S3", target=">= 2 x", result="not measured", met=None)
        common.publish("recovery", [met, missed], [1, 2, 3])
        common.publish("storage", [open_], {})
        return tmp_path

    def test_stored_verdicts_come_back_with_their_date_and_every_measurement_stays(self, results: Path) -> None:
        outcome = bench.read(results / "recovery.json")
        assert [each.met for each in outcome.verdicts] == [True, False]
        assert len(outcome.date) == 10
        assert json.loads((results / "recovery.json").read_text())["measured"] == [1, 2, 3]

    def test_target_and_result_stand_side_by_side_and_what_broke_is_named_with_its_last_lines(self, results: Path) -> None:
        outcomes = [bench.read(results / "recovery.json"), bench.Outcome(name="nodes", broke="exit code 1\nKeyError: 'x'")]
        table = bench.table_of(outcomes)
        rows = list(zip(*(column.cells for column in table.columns), strict=True))
        assert rows[0] == ("recovery", "rank", "<= 1 s", "0.4 s", "met", "")
        assert rows[1] == ("recovery", "node", "<= 1 s", "2.0 s", "MISSED", "detection 1.6 s")
        assert rows[2][:5] == ("nodes", "", "", "exit code 1\nKeyError: 'x'", bench.BROKE)
        assert bench.count(outcomes) == "2 targets: 1 met, 1 missed, 0 not measured; 1 scripts broke"

    def test_the_summary_is_markdown_with_machine_date_and_why_something_was_missed(self, results: Path) -> None:
        text = bench.markdown([bench.read(path) for path in sorted(results.glob("*.json"))], common.machine())
        assert "| node | <= 1 s | 2.0 s | MISSED | [recovery.py](../recovery.py) |" in text
        assert "| S3 | >= 2 x | not measured | - | [storage.py](../storage.py) |" in text
        assert "* node: detection 1.6 s" in text
        assert "cores" in text

    def test_results_of_another_form_are_no_verdicts(self, tmp_path: Path) -> None:
        (tmp_path / "old.json").write_text('{"at": "2026-01-01", "summary": {}}')
        assert bench.read(tmp_path / "old.json").verdicts == ()


class TestRunning:
    """Scripts that are run, end as they do, and leave results or none."""

    @pytest.fixture
    def run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setattr(bench, "HERE", tmp_path)
        monkeypatch.setattr(bench, "LOGS", tmp_path)

        def run(body: str) -> bench.Outcome:
            (tmp_path / "one.py").write_text(f"import sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\n{body}")
            return bench.run(bench.Script(name="one", minutes=1), quick=False, out=tmp_path)

        return run

    def test_a_script_that_publishes_ends_well(self, run: Any) -> None:
        outcome = run("import common\ncommon.publish('one', [common.Verdict(what='a', target='b', result='c', met=False)], {})")
        assert outcome.broke == ""
        assert outcome.verdicts[0].result == "c"

    def test_one_that_raises_is_told_with_its_last_lines(self, run: Any) -> None:
        broke = run("raise KeyError('gone')").broke
        assert broke.startswith("exit code 1\n")
        assert broke.endswith("KeyError: 'gone'")

    def test_one_that_publishes_nothing_broke_too(self, run: Any, tmp_path: Path) -> None:
        (tmp_path / "one.json").write_text('{"verdicts": []}')  # of an earlier run
        assert run("print('hello')").broke == "published nothing\nhello"


class TestSuite:
    @pytest.mark.parametrize("script", bench.SUITE, ids=lambda script: script.name)
    def test_every_script_of_the_suite_exists_takes_quick_and_publishes_under_its_name(self, script: bench.Script) -> None:
        tree = ast.parse((BENCHMARKS / f"{script.name}.py").read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        called = [(node.func.id, node.args) for node in calls if isinstance(node.func, ast.Name)]
        assert any(name in ("parser", "compare") for name, _ in called)  # compare(), of saving.py, parses and publishes
        named = [arguments[0] for name, arguments in called if name == "publish"] + [
            arguments[1] for name, arguments in called if name == "compare"
        ]
        assert {argument.value for argument in named if isinstance(argument, ast.Constant)} == {script.name}

    def test_every_script_is_in_the_suite(self) -> None:
        assert sorted(script.name for script in bench.SUITE) == SCRIPTS

    def test_the_whole_suite_takes_less_than_45_minutes_and_a_quick_run_less_than_5(self) -> None:
        assert sum(script.minutes for script in bench.SUITE) < 45
        assert sum(script.quick_s for script in bench.SUITE) < 300

    @pytest.mark.parametrize("name", [*SCRIPTS, "bench", "flame"])
    def test_the_document_names_every_script(self, name: str) -> None:
        assert f"[{name}.py]({name}.py)" in (BENCHMARKS / "README.md").read_text()

    def test_the_suite_lists_itself(self) -> None:
        answer = subprocess.run([sys.executable, BENCHMARKS / "bench.py", "--help"], capture_output=True, text=True, check=True)
        assert "make bench-quick" in answer.stdout


def step(rank: int, number: int, at: float, *, pid: int = 0, loss: float = 1.0) -> steplog.Step:
    return steplog.Step(pid=pid or rank + 1, life=0, rank=rank, step=number, at=at, loss=loss)


class TestPeers:
    def test_steps_are_read_as_they_were_written_a_torn_record_is_left_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(steplog.ENV_FOLDER, str(tmp_path))
        log = steplog.StepLog(rank=3)
        log.stepped(1, 0.5)
        log.stepped(2, 0.25)
        (path,) = (tmp_path / "steps").iterdir()
        with path.open("ab") as file:
            file.write(b"half")
        assert [(each.rank, each.step, each.loss) for each in steplog.read_steps(tmp_path)] == [(3, 1, 0.5), (3, 2, 0.25)]

    def test_all_have_stepped_when_the_last_of_them_has(self) -> None:
        steps = [step(0, 8, 1.0), step(1, 8, 1.1), step(0, 6, 2.0, pid=10), step(1, 6, 2.2, pid=11)]
        assert steplog.all_stepped(steps, ranks=2, since=0.5) == steps[1]
        assert steplog.all_stepped(steps, ranks=2, since=1.05) == steps[3]
        assert steplog.all_stepped(steps, ranks=2, since=2.1) is None

    def test_a_survivors_end_of_the_broken_step_and_a_dead_mans_do_not_count(self) -> None:
        steps = [step(1, 8, 1.0), step(0, 8, 1.1), step(0, 9, 3.0), step(1, 9, 3.1, pid=20)]
        assert steplog.all_stepped(steps, ranks=2, since=0.9, dead={2}) == steps[3]

    def test_a_step_done_again_with_another_loss_is_not_the_same(self) -> None:
        again = [step(0, 1, 1.0, loss=0.5), step(0, 2, 2.0, loss=0.4), step(0, 2, 9.0, loss=0.4)]
        assert steplog.same_bits(again)
        assert not steplog.same_bits([*again, step(0, 2, 10.0, loss=math.nextafter(0.4, 1.0))])

    def test_of_an_installers_output_the_error_is_shown(self) -> None:
        assert environments.last_error("Collecting x\nERROR: no such version\nsee above\n") == "ERROR: no such version"
        assert environments.last_error("") == "no output"
