"""What other tools read of a training's course: Parquet and TensorBoard files, opened with their own libraries."""

from __future__ import annotations

import builtins
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from keepstep.trainer.columns import AttemptCourse, Course, Evaluation, LayerSamples, Steps, no_layers, no_steps
from keepstep.trainer.exports import write_parquet, write_tensorboard

NAN = math.nan


def steps(numbers: list[int], attempt: list[int]) -> Steps:
    """Every number differs from every other one; step 1 has no ratio, and nobody knows the samples of step 2."""
    columns = {
        column.name: np.array([i + number + 0.5 for number in numbers]) for i, column in enumerate(fields(Steps)) if column.name != "batch"
    }
    ratio = np.array([NAN if number == 1 else 0.01 * number for number in numbers])
    first = np.array([-1 if number == 2 else 8 * (number - 1) for number in numbers])
    return Steps(
        **columns
        | {
            "step": np.array(numbers),
            "attempt": np.array(attempt),
            "provisional": np.array([number > 5 for number in numbers]),
            "update_ratio": ratio,
            "first_position": first,
            "last_position": np.where(first < 0, -1, first + 8),
            "batch": np.zeros(len(numbers), dtype=np.int64),
            "seconds": np.full(len(numbers), 2.0),
        }
    )


@pytest.fixture
def course() -> Course:
    """Steps 1 to 6; the first attempt computed 1 to 5, of which 5 was lost; the second one went on from 4."""
    layers = LayerSamples(
        step=np.array([1, 5]),
        names=("blocks.0", "blocks.0.mlp.up.weight"),
        values={"max": np.array([[3.0, NAN], [4.0, NAN]]), "grad_norm": np.array([[NAN, 0.5], [NAN, NAN]])},
    )
    return Course(
        run="demo",
        root="runs/demo",
        steps=steps([1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 2, 2]),
        lost=steps([5], [1]),
        layers=layers,
        attempts=tuple(
            AttemptCourse(attempt=i, world_size=2, nodes=(), resume_step=-1, at=f"2026-11-22T10:0{i}:00.000+00:00") for i in (1, 2)
        ),
        evaluations=(Evaluation(step=4, attempt=1, nats=2.0, perplexity=7.4, others={"accuracy": 0.25}),),
    )


class TestParquet:
    @pytest.fixture
    def rows(self, course: Course, tmp_path: Path) -> list[dict[str, Any]]:
        write_parquet(course, tmp_path / "course.parquet")
        found: list[dict[str, Any]] = pq.read_table(tmp_path / "course.parquet").to_pylist()
        return found

    def test_the_lineage_is_one_curve_and_lost_work_is_marked(self, rows: list[dict[str, Any]]) -> None:
        assert [(row["step"], row["attempt"], row["lost"]) for row in rows] == [
            (1, 1, False),
            (2, 1, False),
            (3, 1, False),
            (4, 1, False),
            (5, 1, True),
            (5, 2, False),
            (6, 2, False),
        ]

    def test_every_column_holds_what_the_course_does(self, course: Course, rows: list[dict[str, Any]]) -> None:
        kept = [row for row in rows if not row["lost"]]
        for name in (column.name for column in fields(Steps) if column.name not in {"batch", "first_position", "last_position"}):
            written = [NAN if row[name] is None else row[name] for row in kept]
            np.testing.assert_array_equal(written, getattr(course.steps, name), name)
        assert [row["tokens_per_s"] for row in kept] == list(course.steps.tokens / 2.0)

    def test_what_is_unknown_is_null(self, rows: list[dict[str, Any]]) -> None:
        assert [row["update_ratio"] for row in rows[:2]] == [None, 0.02]
        assert [row["first_position"] for row in rows[:3]] == [0, None, 16]
        assert [row["held_out_nats"] for row in rows] == [None, None, None, 2.0, None, None, None]
        assert [row["perplexity"] for row in rows] == [None, None, None, 7.4, None, None, None]
        assert [row["accuracy"] for row in rows] == [None, None, None, 0.25, None, None, None]

    def test_layers_lie_with_the_step_that_was_looked_into(self, rows: list[dict[str, Any]]) -> None:
        looked = {row["step"]: row["layers"] for row in rows if row["layers"] is not None}
        assert looked == {
            1: [
                {"name": "blocks.0", "statistic": "max", "value": 3.0},
                {"name": "blocks.0.mlp.up.weight", "statistic": "grad_norm", "value": 0.5},
            ],
            5: [{"name": "blocks.0", "statistic": "max", "value": 4.0}],
        }
        assert [row["layers"] is None for row in rows if row["step"] == 5] == [True, False], "of the lost one nothing is known"

    def test_the_file_names_its_run(self, course: Course, tmp_path: Path) -> None:
        write_parquet(course, tmp_path / "course.parquet")
        metadata = pq.read_schema(tmp_path / "course.parquet").metadata
        assert (metadata[b"keepstep.run"], metadata[b"keepstep.root"]) == (b"demo", b"runs/demo")

    @pytest.mark.parametrize("layers", [True, False])
    def test_a_course_without_layers_or_without_steps_has_the_same_columns(self, course: Course, tmp_path: Path, layers: bool) -> None:
        write_parquet(course, tmp_path / "whole.parquet")
        less = replace(course, layers=no_layers()) if layers else replace(course, steps=no_steps(), lost=no_steps())
        write_parquet(less, tmp_path / "less.parquet")
        table = pq.read_table(tmp_path / "less.parquet")
        assert table.schema.equals(pq.read_schema(tmp_path / "whole.parquet"))
        assert table.num_rows == (7 if layers else 0)

    def test_a_file_is_replaced_whole_or_not_at_all(self, course: Course, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "course.parquet"
        write_parquet(course.within(1, 2), path)
        write_parquet(course, path)
        assert pq.read_table(path).num_rows == 7

        def fails(table: Any, where: Path, **options: Any) -> None:
            Path(where).write_bytes(b"PAR1")
            raise OSError("no space left on device")

        monkeypatch.setattr(pq, "write_table", fails)
        with pytest.raises(OSError, match="no space"):
            write_parquet(course.within(1, 2), path)
        assert pq.read_table(path).num_rows == 7
        assert list(tmp_path.iterdir()) == [path]

    def test_a_url_is_refused(self, course: Course) -> None:
        with pytest.raises(ValueError, match="must be a local path"):
            write_parquet(course, Path("s3://bucket/course.parquet"))


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def curve(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, pytest.approx(event.value)) for event in accumulator.Scalars(tag)]


class TestTensorBoard:
    def test_the_lineage_is_one_run_and_lost_work_another(self, course: Course, tmp_path: Path) -> None:
        write_tensorboard(course, tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lineage", "lost-attempt-1"]
        lineage, lost = read(tmp_path / "lineage"), read(tmp_path / "lost-attempt-1")
        assert curve(lineage, "step/loss") == list(zip(range(1, 7), course.steps.loss.tolist(), strict=True))
        assert curve(lineage, "step/attempt") == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]
        assert curve(lost, "step/loss") == [(5, course.lost.loss[0])]

    def test_an_unknown_number_is_left_out(self, course: Course, tmp_path: Path) -> None:
        write_tensorboard(course, tmp_path)
        assert [step for step, _ in curve(read(tmp_path / "lineage"), "step/update_ratio")] == [2, 3, 4, 5, 6]

    def test_layers_and_evaluations_have_tags_of_their_own(self, course: Course, tmp_path: Path) -> None:
        write_tensorboard(course, tmp_path)
        lineage, lost = read(tmp_path / "lineage"), read(tmp_path / "lost-attempt-1")
        assert curve(lineage, "max/blocks.0") == [(1, 3.0), (5, 4.0)]
        assert curve(lineage, "grad_norm/blocks.0.mlp.up.weight") == [(1, 0.5)]
        assert curve(lineage, "held_out/perplexity") == [(4, 7.4)]
        assert curve(lineage, "held_out/accuracy") == [(4, 0.25)]
        assert not [tag for tag in lost.Tags()["scalars"] if not tag.startswith("step/")]

    def test_time_goes_on_from_the_start_of_each_attempt(self, course: Course, tmp_path: Path) -> None:
        write_tensorboard(course, tmp_path)
        times = [event.wall_time for event in read(tmp_path / "lineage").Scalars("step/loss")]
        assert np.diff(times).tolist() == [2.0, 2.0, 2.0, 54.0, 2.0]
        assert read(tmp_path / "lost-attempt-1").Scalars("step/loss")[0].wall_time == times[3] + 2.0

    def test_writing_again_replaces_what_was_written_and_nothing_else(self, course: Course, tmp_path: Path) -> None:
        write_tensorboard(course.within(1, 3), tmp_path)
        (theirs := tmp_path / "lineage" / "events.out.tfevents.1.host").write_bytes(b"")
        write_tensorboard(course, tmp_path)
        assert [step for step, _ in curve(read(tmp_path / "lineage"), "step/loss")] == [1, 2, 3, 4, 5, 6]
        assert theirs.exists()


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the extra."""
    import_ = builtins.__import__

    def refuses(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in {"pyarrow", "tensorboard"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return import_(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuses)


@pytest.mark.parametrize(("write", "package"), [(write_parquet, "pyarrow"), (write_tensorboard, "tensorboard")])
def test_a_missing_library_is_told_with_the_extra_that_brings_it(
    course: Course, tmp_path: Path, bare: None, write: Any, package: str
) -> None:
    with pytest.raises(ImportError, match=rf"needs {package}, .*pip install 'keepstep\[trace\]'"):
        write(course, tmp_path / "out")
    assert not (tmp_path / "out").exists()
