"""Reads what a run left of its training: run log, steps files, events. Nothing here needs torch, and nothing is written.

It reads the whole run log, because only there stands every attempt: 0.4 ms per record on a local disk, a few on an object store.
"""

from __future__ import annotations

import tomllib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Final

import numpy as np

from keepstep.storage.errors import NotFound
from keepstep.storage.layout import EVENTS_KEY, RUN_CONFIG_KEY
from keepstep.storage.lineage import Folding, Lineage, Segment
from keepstep.storage.records import Attempt, Failed, Finished, Record, Rewind
from keepstep.storage.runlog import RunLog
from keepstep.storage.steps import attempts_with_steps, is_step, step_lines
from keepstep.storage.store import Store

from .columns import AttemptCourse, Course, Evaluation, Floats, Incident, LayerSamples, Steps
from .config import TrainerConfig

MAX_SAMPLES: Final = 2000  # of layer statistics: of more, every second is dropped until they fit
_INTS: Final = ("step", "attempt", "first_position", "last_position", "batch", "provisional")
_PLAIN: Final = ("loss", "grad_norm", "param_norm", "lr", "tokens", "seconds")
_RATIO: Final = "update_ratio_before"  # a record knows the update that came before its step
_KINDS: Final = ("rejected", "failure", "rewind")  # of incidents, as they follow each other in an attempt
_FAILURE: Final = "failure"  # kind of the event that carries an attempt's verdict


def read_course(store: Store, attempt: int | None = None) -> Course:
    """The training as it stands now, or as it stood at the end of `attempt`.

    Raises:
        ValueError: there is no such attempt, or run.toml is not this version's.
        StoreError: the root cannot be read.
    """
    log = RunLog.read_all(store)
    records = _records_until(log.records, attempt)
    lineage = _fold(records)
    attempts = [record for record in records if isinstance(record, Attempt)]
    config = _config(store)
    reading = _Reading(lineage.segments())
    for number in attempts_with_steps(store):
        if attempt is None or number <= attempt:
            reading.take(number, step_lines(store, number))
    steps, lost = reading.columns()
    return Course(
        run=lineage.run,
        root=store.name,
        config=config,
        steps=steps,
        lost=lost,
        layers=reading.layers.matrices(),
        attempts=tuple(_attempt(record, steps, lost) for record in attempts),
        evaluations=tuple(reading.evaluations[step] for step in sorted(reading.evaluations)),
        incidents=in_order((*reading.rejected, *_told(store, attempt), *_rewinds(records))),
        commits=tuple(sorted(commit.step for commit in lineage.commits if log.lineage.is_usable(commit))),  # not retired since
        outcome=_outcome(lineage),
        **_text(store, config),
    )


def _records_until(records: Sequence[Record], attempt: int | None) -> Sequence[Record]:
    """The records up to the end of an attempt: the next one, and a rewind, begin something else."""
    if attempt is None:
        return records
    numbers = [record.attempt for record in records if isinstance(record, Attempt)]
    if attempt not in numbers:
        raise ValueError(f"there is no attempt {attempt}; this run has {', '.join(map(str, numbers)) or 'none'}")
    kept: list[Record] = []
    newest = 0
    for record in records:
        if newest >= attempt and isinstance(record, Attempt | Rewind):
            break
        newest = record.attempt if isinstance(record, Attempt) else newest
        kept.append(record)
    return kept


def _fold(records: Sequence[Record]) -> Lineage:
    folding = Folding(Lineage())
    for record in records:
        folding.add(record)
    return folding.lineage()


class _Reading:
    """The steps files, one after the other."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._kept = _Columns()
        self._lost = _Columns()
        self.layers = _Layers()
        self.evaluations: dict[int, Evaluation] = {}
        self.rejected: list[Incident] = []

    def take(self, attempt: int, lines: Iterator[Mapping[str, Any]]) -> None:
        segments = [segment for segment in self._segments if segment.attempt == attempt]
        for line in lines:
            if is_step(line):
                self._take_step(attempt, line, segments)
            elif isinstance(found := line.get("evaluation"), dict) and isinstance(step := found.get("step"), int):
                if any(segment.holds(step) for segment in segments):
                    self.evaluations[step] = _evaluation(step, attempt, found)
            elif isinstance(rejected := line.get("rejected"), dict):
                self.rejected.append(_rejected(attempt, rejected))

    def _take_step(self, attempt: int, line: Mapping[str, Any], segments: Sequence[Segment]) -> None:
        holding = next((segment for segment in segments if segment.holds(line["step"])), None)
        (self._kept if holding else self._lost).add(attempt, line, provisional=holding is not None and holding.last is None)
        if holding and isinstance(layers := line.get("layers"), dict) and layers:
            self.layers.add(line["step"], layers)

    def columns(self) -> tuple[Steps, Steps]:
        """(lineage, lost work)"""
        kept = self._kept.steps()
        order = np.lexsort((kept.attempt, kept.step))
        newest = np.append(kept.step[order][1:] != kept.step[order][:-1], True) if len(order) else order.astype(np.bool_)
        return _shifted(_picked(kept, order[newest]), is_one_curve=True), _shifted(self._lost.steps(), is_one_curve=False)


class _Columns:
    """Growing columns; 8 bytes a number."""

    def __init__(self) -> None:
        self._ints: dict[str, array[int]] = {name: array("q") for name in _INTS}
        self._floats: dict[str, array[float]] = {name: array("d") for name in (*_PLAIN, _RATIO)}

    def add(self, attempt: int, line: Mapping[str, Any], *, provisional: bool) -> None:
        first, last = _span(line.get("samples"))
        values = (line["step"], attempt, first, last, _digest(line.get("ledger")), int(provisional))
        for column, value in zip(self._ints.values(), values, strict=True):
            column.append(value)
        for name, numbers in self._floats.items():
            numbers.append(_number(line.get(name)))

    def steps(self) -> Steps:
        """`update_ratio` is still that of the update before."""
        columns: dict[str, Any] = {name: np.array(column, dtype=np.int64) for name, column in self._ints.items()}
        columns |= {name: np.array(column, dtype=np.float64) for name, column in self._floats.items()}
        return Steps(update_ratio=columns.pop(_RATIO), provisional=columns.pop("provisional").astype(np.bool_), **columns)


def _picked(steps: Steps, order: Any) -> Steps:
    return Steps(**{column.name: getattr(steps, column.name)[order] for column in fields(Steps)})


def _shifted(steps: Steps, *, is_one_curve: bool) -> Steps:
    """Each step gets the ratio of its own update, which the record of the next one told."""
    ratio: Floats = np.full(len(steps), np.nan)
    if len(steps) > 1:
        follows = steps.step[1:] == steps.step[:-1] + 1
        follows &= is_one_curve or (steps.attempt[1:] == steps.attempt[:-1])
        ratio[:-1][follows] = steps.update_ratio[1:][follows]
    return replace(steps, update_ratio=ratio)


class _Layers:
    """Layer statistics as growing matrices; at most `MAX_SAMPLES` steps of them."""

    def __init__(self) -> None:
        self._names: dict[str, int] = {}
        self._order: dict[str, float] = {}  # in the forward pass
        self._rows: list[tuple[int, dict[str, Floats]]] = []
        self._stride = 1
        self._num_seen = 0

    def add(self, step: int, layers: Mapping[str, Any]) -> None:
        self._num_seen += 1
        if (self._num_seen - 1) % self._stride:
            return
        row: dict[str, Floats] = {}
        for name, statistics in layers.items():
            index = self._names.setdefault(name, len(self._names))
            for statistic, value in statistics.items() if isinstance(statistics, dict) else ():
                if statistic == "order":
                    self._order.setdefault(name, _number(value))
                    continue
                column = row.get(statistic)
                if column is None or len(column) <= index:
                    wider: Floats = np.full(max(len(self._names), len(layers)), np.nan)
                    wider[: 0 if column is None else len(column)] = () if column is None else column
                    row[statistic] = column = wider
                column[index] = _number(value)
        self._rows.append((step, row))
        if len(self._rows) > MAX_SAMPLES:
            self._rows, self._stride = self._rows[::2], 2 * self._stride

    def matrices(self) -> LayerSamples:
        rows = dict(self._rows)  # a step that was computed again replaces itself
        steps, names = sorted(rows), sorted(self._names, key=self._place)
        columns = [self._names[name] for name in names]
        values = {}
        for statistic in sorted({statistic for row in rows.values() for statistic in row}):
            matrix = np.full((len(steps), len(names)), np.nan)
            for i, step in enumerate(steps):
                found = rows[step].get(statistic)
                if found is not None:
                    matrix[i] = np.append(found, np.full(max(0, len(names) - len(found)), np.nan))[columns]
            values[statistic] = matrix
        return LayerSamples(step=np.array(steps, dtype=np.int64), names=tuple(names), values=values)

    def _place(self, name: str) -> tuple[float, int]:
        """A parameter comes with its module; what has no known place keeps the order in which it was met."""
        module = name
        while module and module not in self._order:
            module = module.rpartition(".")[0]
        return self._order.get(module, np.inf), self._names[name]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else np.nan


def _span(samples: Any) -> tuple[int, int]:
    if isinstance(samples, list) and len(samples) == 2 and all(isinstance(value, int) for value in samples):
        return samples[0], samples[1]
    return -1, -1


def _digest(ledger: Any) -> int:
    """Of what all ranks consumed; ranks that shared a batch otherwise give another one. 0: unknown."""
    if not isinstance(ledger, list) or not ledger or not all(isinstance(row, list) and len(row) == 3 for row in ledger):
        return 0
    return hash(tuple(row[2] for row in ledger))


def _evaluation(step: int, attempt: int, found: Mapping[str, Any]) -> Evaluation:
    own = ("step", "held_out_tokens", "held_out_nats", "perplexity")
    others = {name: _number(value) for name, value in found.items() if name not in own}
    nats, perplexity = (_number(found.get(name)) for name in own[2:])
    return Evaluation(step=step, attempt=attempt, nats=nats, perplexity=perplexity, others=others)


def _rejected(attempt: int, line: Mapping[str, Any]) -> Incident:
    step, skips = line.get("step"), line.get("skips")
    return Incident(
        kind="rejected",
        step=step if isinstance(step, int) else -1,
        attempt=attempt,
        why=str(line.get("why") or ""),
        module=str(line.get("module") or ""),
        cause="spike" if line.get("bound") is not None else "non-finite",
        skips=tuple(map(str, skips)) if isinstance(skips, list) else (),
    )


def _told(store: Store, attempt: int | None) -> Iterator[Incident]:
    """Failures, as events.jsonl tells them to people."""
    for event in store.read_records(EVENTS_KEY):
        if event.get("kind") == _FAILURE and (attempt is None or event.get("attempt", 0) <= attempt):
            yield Incident(
                kind="failure",
                step=int(event.get("step", -1)),
                attempt=int(event.get("attempt", 0)),
                why=str(event.get("why", "")),
                cause=str(event.get("cause", "")),
            )


def _rewinds(records: Sequence[Record]) -> Iterator[Incident]:
    newest = 0
    for record in records:
        newest = record.attempt if isinstance(record, Attempt) else newest
        if isinstance(record, Rewind):
            cause = "bad-step" if record.bad_step >= 0 else "people"
            changes: dict[str, Any] = {"skips": record.skips, "overrides": record.overrides}
            yield Incident(kind="rewind", step=max(0, record.step), attempt=newest, why=record.why, cause=cause, **changes)


def in_order(incidents: Iterable[Incident]) -> tuple[Incident, ...]:
    """As they happened: an attempt refuses a step, ends, and is rewound. Those of one kind come in the order in which they were told."""
    return tuple(sorted(incidents, key=lambda incident: (incident.attempt, _KINDS.index(incident.kind))))


def _attempt(record: Attempt, steps: Steps, lost: Steps) -> AttemptCourse:
    kept, gone = steps.step[steps.attempt == record.attempt], lost.step[lost.attempt == record.attempt]
    computed = np.concatenate([kept, gone])
    return AttemptCourse(
        attempt=record.attempt,
        world_size=record.world_size,
        nodes=record.nodes,
        resume_step=record.resume_step,
        at=record.at,
        first_step=int(computed.min()) if len(computed) else 0,
        last_step=int(computed.max()) if len(computed) else 0,
        kept_steps=len(kept),
        lost_steps=len(gone),
    )


def _outcome(lineage: Lineage) -> str:
    match lineage.outcome:
        case Finished(outcome=outcome):
            return outcome
        case Failed():
            return "failed"
        case _:
            return ""


def _config(store: Store) -> TrainerConfig:
    """Of the root's run.toml; defaults where there is none."""
    try:
        text = store.get(RUN_CONFIG_KEY).decode()
    except NotFound:
        return TrainerConfig()
    return TrainerConfig.model_validate(tomllib.loads(text))  # both errors are ValueErrors


def _text(store: Store, config: TrainerConfig) -> dict[str, Any]:
    """What is known of the text that is trained on; a script brings its own."""
    from .tokens import read_index

    try:
        index = read_index(store)
    except ValueError:
        return {}  # of another version, or damaged: then epochs and the unigram loss are unknown
    if index is None:
        return {}
    return {
        "epoch_samples": max(0, index.train.tokens - 1) // config.model.context,
        "unigram_nats": index.held_out.unigram_nats,
        "vocabulary": index.vocabulary,
    }
