"""A training's course for other tools: TensorBoard and Parquet. Torch-free; the libraries come with `pip install 'keepstep[trace]'`.

What was written before at the same place is replaced: a training that goes on is written again and again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from keepstep.storage.put_new import temporary_name

from .columns import Course, Evaluation, Floats, LayerSamples, Steps

if TYPE_CHECKING:
    import pyarrow as pa

LINEAGE: Final = "lineage"  # name of the TensorBoard run of what counts
_SUFFIX: Final = ".keepstep"  # of event files; only those are replaced
_CURVES: Final = ("loss", "grad_norm", "param_norm", "update_ratio", "lr", "tokens_per_s", "seconds", "attempt")


def write_parquet(course: Course, path: Path) -> None:
    """One table, ordered by step and attempt; a row per computed step.

    Columns: those of `columns.Steps` but for the batch's digest; tokens_per_s; `lost` (computed, but not in the lineage); held_out_nats,
    perplexity and the other figures of evaluations; and `layers`, a list of {name, statistic, value}. What is unknown is null, as is what
    was not evaluated or not looked into. The file's metadata name the run.

    Raises:
        ImportError: pyarrow is missing; the message says what to install.
        OSError: the file cannot be written; what was there before is untouched.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise _missing("Parquet", "pyarrow", error) from error
    temporary = _local(path).parent / temporary_name()
    try:
        pq.write_table(_table(course), temporary, compression="zstd")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensorboard(course: Course, folder: Path) -> None:
    """A run "lineage", one curve, with every layer's statistics; and one "lost-attempt-N" for the lost work of each attempt.

    Raises:
        ImportError: tensorboard is missing; the message says what to install.
        OSError: a file cannot be written.
    """
    try:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise _missing("TensorBoard", "tensorboard", error) from error
    for old in _local(folder).glob(f"*/events.out.tfevents.*{_SUFFIX}"):
        old.unlink()
    times = _wall_times(course)
    beside: Mapping[int, Mapping[str, float]] = _beside_curves(course)
    runs = [(LINEAGE, course.steps, beside)]
    lost = course.lost
    runs += [(f"lost-attempt-{attempt}", lost.where(lost.attempt == attempt), {}) for attempt in np.unique(lost.attempt)]
    for name, steps, more in runs:
        writer = EventFileWriter(str(folder / name), filename_suffix=_SUFFIX)  # makes the folder
        try:
            for event in _events(steps, times, more):
                writer.add_event(event)
        finally:
            writer.close()


def _missing(what: str, package: str, error: ImportError) -> ImportError:
    return ImportError(f"{what} needs {package}, which is not installed here ({error}): pip install 'keepstep[trace]'")


def _local(path: Path) -> Path:
    """Raises ValueError for a URL."""
    if re.match(r"\w+:/", str(path)):  # Path has made one slash of two
        raise ValueError(f"{path} must be a local path")
    return path


def _table(course: Course) -> pa.Table:
    import pyarrow as pa

    both = [(course.steps, False), (course.lost, True)]
    columns = {name: np.concatenate([getattr(steps, name) for steps, _ in both]) for name in (*_step_columns(), "tokens_per_s")}
    lost = np.concatenate([np.full(len(steps), is_lost) for steps, is_lost in both])
    order = np.lexsort((columns["attempt"], columns["step"]))
    arrays = {name: _array(column[order]) for name, column in columns.items()}
    arrays["lost"] = pa.array(lost[order])
    evaluated = {evaluation.step: evaluation for evaluation in course.evaluations}
    found = [evaluated.get(step) if not is_lost else None for step, is_lost in zip(columns["step"][order], lost[order], strict=True)]
    arrays["held_out_nats"] = pa.array([each and each.nats for each in found], pa.float64(), from_pandas=True)
    for name in ("perplexity", *sorted({name for evaluation in course.evaluations for name in evaluation.others})):
        arrays[name] = pa.array([each and _figures(each).get(name) for each in found], pa.float64(), from_pandas=True)
    arrays["layers"] = _layers(course.layers, columns["step"][order], lost[order])
    return pa.table(arrays).replace_schema_metadata({"keepstep.run": course.run, "keepstep.root": course.root})


def _array(column: Any) -> pa.Array:
    """NaN, and positions that are not known (-1), become null."""
    import pyarrow as pa

    return pa.array(column, mask=np.isnan(column) if column.dtype == np.float64 else column < 0)


def _step_columns() -> Iterator[str]:
    return (column.name for column in fields(Steps) if column.name != "batch")


def _layers(layers: LayerSamples, steps: Any, lost: Any) -> pa.Array:
    """One list for each of `steps`, built from columns: there may be millions of values."""
    import pyarrow as pa

    rows = {int(step): i for i, step in enumerate(layers.step)}
    chosen = [rows.get(int(step)) if not is_lost else None for step, is_lost in zip(steps, lost, strict=True)]
    statistics = tuple(layers.values)
    names, kinds, values, ends = [], [], [], [0]
    for row in (row for row in chosen if row is not None):
        matrix = np.array([layers.values[statistic][row] for statistic in statistics])
        which, who = np.nonzero(~np.isnan(matrix))
        names.append(who)
        kinds.append(which)
        values.append(matrix[which, who])
        ends.append(ends[-1] + len(who))
    starts = iter(ends)
    offsets: list[int | None] = [None if row is None else next(starts) for row in chosen]
    struct = pa.StructArray.from_arrays(
        [_dictionary(names, layers.names), _dictionary(kinds, statistics), pa.array(_joined(values), pa.float64())],
        names=["name", "statistic", "value"],
    )
    return pa.ListArray.from_arrays(pa.array([*offsets, ends[-1]], pa.int32()), struct)


def _dictionary(indices: list[Any], words: tuple[str, ...]) -> pa.DictionaryArray:
    import pyarrow as pa

    return pa.DictionaryArray.from_arrays(pa.array(_joined(indices).astype(np.int32)), pa.array(words, pa.string()))


def _joined(arrays: list[Any]) -> Any:
    return np.concatenate(arrays) if arrays else np.zeros(0)


def _wall_times(course: Course) -> Mapping[tuple[int, int], float]:
    """(attempt, step) -> seconds since 1970, for people: the attempt's start, and the seconds of its steps until then."""
    computed = sorted(
        (int(attempt), int(step), float(seconds))
        for steps in (course.steps, course.lost)
        for attempt, step, seconds in zip(steps.attempt, steps.step, steps.seconds, strict=True)
    )
    at = {attempt.attempt: datetime.fromisoformat(attempt.at).timestamp() for attempt in course.attempts if attempt.at}
    times: dict[tuple[int, int], float] = {}
    for attempt, step, seconds in computed:
        at[attempt] = at.get(attempt, 0.0) + (seconds if np.isfinite(seconds) else 0.0)
        times[attempt, step] = at[attempt]
    return times


def _figures(evaluation: Evaluation) -> dict[str, float]:
    return {"nats": evaluation.nats, "perplexity": evaluation.perplexity, **evaluation.others}


def _beside_curves(course: Course) -> dict[int, dict[str, float]]:
    """By step: what was evaluated, and the layers' statistics, as tags that TensorBoard groups by statistic."""
    values: dict[int, dict[str, float]] = {
        evaluation.step: {f"held_out/{name}": value for name, value in _figures(evaluation).items()} for evaluation in course.evaluations
    }
    layers = course.layers
    for statistic, matrix in layers.values.items():
        for step, row in zip(layers.step, matrix, strict=True):
            there = np.flatnonzero(~np.isnan(row))
            values.setdefault(int(step), {}).update({f"{statistic}/{layers.names[i]}": float(row[i]) for i in there})
    return values


def _events(steps: Steps, times: Mapping[tuple[int, int], float], beside: Mapping[int, Mapping[str, float]]) -> Iterator[Any]:
    """One per step, that holds all its values."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    curves: dict[str, Floats] = {f"step/{name}": getattr(steps, name) for name in _CURVES}
    for i, (step, attempt) in enumerate(zip(steps.step.tolist(), steps.attempt.tolist(), strict=True)):
        values = {tag: float(curve[i]) for tag, curve in curves.items()} | dict(beside.get(step, {}))
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if not np.isnan(value)])
        yield Event(step=step, wall_time=times[attempt, step], summary=summary)
