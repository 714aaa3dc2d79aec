"""What `keepstep trace` prints and writes, for a run of which everything is known."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text
from test_course import attempt, commit, directory_of, record, rooted
from test_diagnosis import course as synthetic
from test_diagnosis import falling
from typer.testing import CliRunner

from keepstep.orchestrator import config as configs
from keepstep.orchestrator.cli import app, main
from keepstep.orchestrator.curves import AXIS, Line, chart, figure, lane, scale_of, thinned
from keepstep.orchestrator.errors import InputError
from keepstep.orchestrator.sections import RunConfig
from keepstep.orchestrator.tracepage import page
from keepstep.orchestrator.tracing import headline, show
from keepstep.orchestrator.viewing import visit
from keepstep.storage.layout import EVENTS_KEY, RUN_CONFIG_KEY
from keepstep.storage.records import Rewind
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store
from keepstep.trainer.columns import Course
from keepstep.trainer.course import read_course
from keepstep.trainer.diagnosis import diagnose
from keepstep.trainer.findings import Finding, Severity
from keepstep.trainer.ledger import Ledger

STEPS = 60
BAD = Finding(
    name="loss-spike", severity=Severity.WARNING, since=9, layers=("a<b>",), evidence="loss 5 & more", remedy="keepstep rewind <ROOT>"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Attempt 1 trains to step 35 and is killed, attempt 2 goes on from step 30 to 60 and evaluates."""
    layers = {f"blocks.{i}.up.weight": {"grad_norm": 0.5 + i, "param_norm": 3.0} for i in range(3)}

    def of(step: int) -> dict[str, Any]:
        return record(step, layers=layers) if step % 10 == 0 else record(step)

    evaluation = {
        "evaluation": {"step": STEPS, "held_out_nats": 4.6, "held_out_tokens": 9, "perplexity": 99.5, "accuracy": 0.125, "f1": None}
    }
    store = rooted(
        tmp_path,
        [attempt(1), commit(1, 30), attempt(2, 30, 1), commit(2, STEPS)],
        {1: map(of, range(1, 36)), 2: [*map(of, range(31, STEPS + 1)), evaluation]},
    )
    event = {"kind": "failure", "why": "rank 1 on b#1 was killed by SIGKILL", "attempt": 1, "step": 35, "cause": "signal"}
    store.append(EVENTS_KEY, json.dumps(event).encode())
    config = RunConfig.model_validate({"run": {"steps": STEPS, "root": str(tmp_path)}})
    store.put(RUN_CONFIG_KEY, configs.to_toml(config).encode())
    return tmp_path


@pytest.fixture
def course(root: Path) -> Course:
    return read_course(Store.open(root))


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["trace", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


class TestCommand:
    def test_it_shows_curves_attempts_lost_work_and_what_was_found(self, root: Path) -> None:
        shown = run(str(root))
        assert "steps 1 to 60 of 60 (not over), 2 attempts, 5 computed again" in shown
        assert "held-out loss 4.6000 nats per token, perplexity 99.5, at step 60" in shown
        for title in ("loss  4.99 to 4.4", "gradient norm  1 to 1", "update ratio", "learning rate", "tokens/s  200 to 200"):
            assert title in shown
        assert "│1──" in shown
        assert "▒" in shown
        assert "rank 1 on b#1 was killed by SIGKILL" in shown
        assert "no findings" in shown

    def test_json_has_the_columns_the_findings_and_nothing_else(self, root: Path) -> None:
        document = json.loads(run(str(root), "--json"))
        assert document["steps"]["step"] == list(range(1, STEPS + 1))
        assert document["steps"]["update_ratio"][-1] is None
        assert document["lost"]["step"] == [31, 32, 33, 34, 35]
        assert [(a["attempt"], a["kept_steps"], a["lost_steps"]) for a in document["attempts"]] == [(1, 30, 5), (2, 30, 0)]
        assert document["evaluations"] == [{"step": 60, "attempt": 2, "nats": 4.6, "perplexity": 99.5, "accuracy": 0.125, "f1": None}]
        assert document["findings"] == []
        assert document["ledger"] is None

    def test_a_part_and_an_earlier_attempt(self, root: Path) -> None:
        assert json.loads(run(str(root), "--json", "--from", "20", "--to", "40"))["steps"]["step"] == list(range(20, 41))
        earlier = json.loads(run(str(root), "--json", "--attempt", "1"))
        assert earlier["steps"]["step"] == list(range(1, 36))
        assert earlier["lost"]["step"] == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--attempt", "7"], "there is no attempt 7; this run has 1, 2"),
            (["--from", "90"], "--from 90: there are steps 1 to 60"),
            (["--to", "-3"], "--to -3: a step is 1 or more; there are steps 1 to 60"),
            (["--from", "9", "--to", "3"], "--from 9 is behind --to 3; there are steps 1 to 60"),
            (["--html", "-"], "a page goes into a file"),
            (["--html", "/proc/nowhere/x.html"], "/proc/nowhere/x.html: cannot be written: no such folder"),
        ],
    )
    def test_what_cannot_be_shown_is_one_sentence(
        self, root: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("sys.argv", ["keepstep", "trace", str(root), *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2
        assert message in capsys.readouterr().err

    def test_overrides_of_a_rewind_count(self, root: Path) -> None:
        log = RunLog.open(Store.open(root))
        log.append(Rewind(term=1, directory="", step=-1, overrides=("run.steps=90",), why="people asked"))
        log.append(replace(attempt(3), overrides=("run.steps=90",)))
        log.store.append("steps/attempt-000003.jsonl", json.dumps(record(1)).encode())
        assert "steps 1 to 1 of 90" in run(str(root))

    def test_a_persons_rewind_is_why_an_attempt_ended(self, root: Path) -> None:
        log = RunLog.open(Store.open(root))
        changes: dict[str, Any] = {"skips": ("7:9",), "overrides": ("run.steps=90",)}
        log.append(Rewind(term=1, directory=directory_of(1, 30), step=30, **changes, why="people asked"))
        course = read_course(log.store)
        told = "a person asked to go back to step 30, without samples 7:9, with run.steps=90"
        assert course.endings(2) == [told]
        assert [(i.kind, i.attempt) for i in course.incidents] == [("failure", 1), ("rewind", 2)]
        assert told in " ".join(run(str(root)).split())
        assert told in page(course, ())
        assert json.loads(run(str(root), "--json"))["incidents"][-1]["overrides"] == ["run.steps=90"]

    def test_a_ledger_that_is_not_proved_has_an_exit_code(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ledgers = iter([Ledger(samples=8, problems=("step 3: a gap",)), Ledger(samples=240, problems=())])
        monkeypatch.setattr("keepstep.trainer.ledger.prove", lambda *given, **named: next(ledgers))
        results = [CliRunner().invoke(app, ["trace", str(root), "--ledger", "--json"]) for _ in range(2)]
        assert [result.exit_code for result in results] == [3, 0]
        assert [json.loads(result.output)["ledger"] for result in results] == [
            {"proved": False, "samples": 8, "sentence": "ledger: not proved: step 3: a gap"},
            {"proved": True, "samples": 240, "sentence": "ledger: 240 samples, each exactly once"},
        ]

    def test_it_is_as_wide_as_columns_says_when_it_is_piped(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "40")
        assert max(map(len, run(str(root)).splitlines())) == 40
        monkeypatch.delenv("COLUMNS")
        assert max(map(len, run(str(root)).splitlines())) == 80

    def test_what_no_rule_could_look_at_is_said(self, root: Path) -> None:
        shown = run(str(root))
        assert "every rule was looked at" not in shown
        assert "not looked at: under-fitting and repeated text: the tokens" in shown

    def test_a_log_of_which_nothing_can_be_read_is_named(self, root: Path) -> None:
        for file in (root / "log").iterdir():
            file.write_bytes(file.read_bytes()[:20])
        shutil.rmtree(root / "snapshots", ignore_errors=True)
        with pytest.raises(InputError, match="its run log is damaged"):
            visit(str(root))


class TestTerminal:
    def shown(self, course: Course, *, width: int, encoding: str = "utf-8", findings: tuple[Finding, ...] = ()) -> list[str]:
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        show(Console(file=out, width=width, highlight=False), course, findings)
        out.seek(0)
        return out.read().splitlines()

    @pytest.mark.parametrize("width", [40, 60, 80, 140])
    def test_nothing_is_wider_than_the_terminal(self, course: Course, width: int) -> None:
        lines = self.shown(course, width=width, findings=(BAD,))
        assert max(len(line.rstrip()) for line in lines) <= width
        assert any(len(line) > width - 5 for line in lines)  # and the width is used

    def test_a_terminal_without_unicode_gets_ascii(self, course: Course) -> None:
        lines = self.shown(course, width=60, encoding="ascii")
        assert "".join(lines).isascii()
        assert any("*" in line for line in lines)
        assert any("|1---" in line for line in lines)

    def test_severity_is_a_word_not_only_a_colour(self, course: Course) -> None:
        lines = self.shown(course, width=100, findings=(BAD,))
        assert "WARNING: loss-spike, since step 9 in a<b>" in lines
        assert any("evidence" in line and "loss 5 & more" in line for line in lines)
        assert any("remedy" in line and "keepstep rewind <ROOT>" in line for line in lines)

    def test_the_headline_of_an_undisturbed_run(self, course: Course) -> None:
        assert "5 computed again" in headline(course)[0]


class TestCurves:
    def rows(self, y: list[float], *, width: int = 30, height: int = 4, ascii_only: bool = True) -> list[str]:
        line = Line(x=np.arange(1, len(y) + 1), y=np.array(y))
        return [row.plain for row in chart(Text("t"), [line], 1, len(y), width=width, height=height, ascii_only=ascii_only)]

    def test_a_falling_line_falls(self) -> None:
        title, *rows = self.rows(list(np.linspace(2, 1, 20)))
        assert title == "t"
        drawn = ["".join(row[AXIS + column] for row in rows) for column in range(20)]
        falls = [column.index("*") for column in drawn]
        assert falls == sorted(falls)
        assert (falls[0], falls[-1]) == (0, 3)
        assert rows[0].strip().startswith("2 |")
        assert rows[-1].strip().startswith("1 |")

    def test_braille_has_eight_dots_to_a_character(self) -> None:
        rows = self.rows([1.0, 2.0], width=AXIS + 2, height=1, ascii_only=False)
        assert rows[1][AXIS:] == "⡠⠊"

    def test_values_of_different_magnitude_are_drawn_on_a_logarithmic_scale(self) -> None:
        scale = scale_of([np.array([1e-4, 1.0])])
        assert scale is not None
        assert scale.is_log
        np.testing.assert_allclose(scale.share(np.array([1e-4, 1e-2, 1.0])), [0, 0.5, 1])
        assert scale_of([np.array([np.nan])]) is None
        assert self.rows([np.nan, np.nan]) == ["t  nothing recorded"]

    def test_no_spike_is_lost_by_thinning(self) -> None:
        y = np.zeros(100_000)
        y[54_321] = 9.0
        y[77_777] = np.nan
        x, thin = thinned(np.arange(100_000), y, 100)
        assert len(x) <= 400
        assert (x[0], x[-1]) == (0, 99_999)
        assert x[thin == 9.0].tolist() == [54_321]

    @pytest.mark.parametrize(
        ("value", "text"), [(0.0, "0"), (12345.6, "12346"), (1e7, "1.0e+07"), (3e-5, "3.0e-05"), (-0.12345, "-0.1235")]
    )
    def test_figures_fit_beside_the_axis(self, value: float, text: str) -> None:
        assert figure(value) == text
        assert len(text) <= AXIS - 2

    def test_a_lane_puts_its_spans_where_the_curve_has_them(self) -> None:
        row = lane("attempt", [(1, 50, "-", "|1"), (51, 100, "-", "|2")], 1, 100, width=AXIS + 100).plain
        assert row[AXIS:] == "|1" + "-" * 48 + "|2" + "-" * 48


class Reader(HTMLParser):
    """Collects what a page is made of; every tag that needs one must be closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in {"meta", "th"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


class TestPage:
    @pytest.fixture
    def html(self, course: Course) -> str:
        return page(course, (BAD,), ledger="ledger: 240 samples, each exactly once")

    @pytest.fixture
    def read(self, html: str) -> Reader:
        reader = Reader()
        reader.feed(html)
        assert reader.open == []
        return reader

    def test_it_needs_no_network(self, html: str, read: Reader) -> None:
        assert not re.search(r"(?:https?:)?//\w|url\(|@import", html)
        assert not [tag for tag, _ in read.seen if tag in {"link", "img", "iframe", "object"}]
        assert not [attributes for _, attributes in read.seen if "src" in attributes or "href" in attributes]

    def test_it_says_everything_without_its_script(self, read: Reader) -> None:
        for text in ("loss-spike, since step 9", "a<b>", "loss 5 & more", "keepstep rewind <ROOT>", "ledger: 240 samples", "attempt 2"):
            assert text in read.text
        assert "rank 1 on b#1 was killed by SIGKILL" in read.text
        curves = [attributes for tag, attributes in read.seen if tag == "polyline"]
        assert len([c for c in curves if c["class"] == "train"]) == 5  # loss, gradient norm, update ratio, learning rate, throughput
        assert len([c for c in curves if c["class"] == "lost"]) >= 1

    def test_curves_stay_inside_their_frames(self, read: Reader) -> None:
        for tag, attributes in read.seen:
            if tag == "polyline":
                points = [tuple(map(float, point.split(","))) for point in (attributes["points"] or "").split()]
                assert all(64 <= x <= 948 and 8 <= y <= 178 for x, y in points)

    def test_layers_are_a_row_each_and_sampled_steps_a_column(self, read: Reader) -> None:
        cells = [attributes for tag, attributes in read.seen if tag == "rect" and re.fullmatch(r"s\d", attributes.get("class") or "")]
        assert len(cells) == 3 * (STEPS // 10)
        assert "blocks.2.up.weight" in read.text

    def test_the_script_has_the_numbers(self, html: str) -> None:
        found = re.search(r"const data = (\{.*?\}), tip = ", html, flags=re.DOTALL)
        assert found
        data = json.loads(found[1])
        assert data["step"] == list(range(1, STEPS + 1))
        assert data["values"]["loss"][0] == 4.99
        assert data["values"]["update ratio"][-1] is None
        assert data["heldOut"] == [[60, 4.6]]

    def test_what_a_run_is_called_cannot_break_the_page(self, course: Course) -> None:
        assert "<script>alert" not in page(replace(course, run="</title><script>alert(1)</script>"), ())

    def test_a_long_training_makes_a_small_page(self) -> None:
        assert len(page(synthetic(falling(20_000, 9.0, 0.05, 0)), ())) < 500_000


def test_nothing_that_was_known_raises_a_finding(course: Course) -> None:
    assert diagnose(course) == ()
