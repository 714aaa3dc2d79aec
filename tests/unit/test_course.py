"""A training's course, read from roots whose logs and steps files say what happened."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keepstep.storage.layout import EVENTS_KEY, steps_key
from keepstep.storage.records import Attempt, Commit, Record, Rewind
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store
from keepstep.trainer.columns import Course
from keepstep.trainer.course import MAX_SAMPLES, _Layers, read_course


def attempt(number: int, source: int = -1, made_by: int = 0, world_size: int = 2) -> Attempt:
    directory = directory_of(made_by, source) if source >= 0 else ""
    return Attempt(
        term=1,
        attempt=number,
        nodes=("a#1", "b#1"),
        world_size=world_size,
        resume_step=source,
        resume_directory=directory,
        nonce=f"n{number}",
    )


def directory_of(made_by: int, step: int) -> str:
    return f"data/a{made_by:06d}/s{step:09d}-00000000"


def commit(number: int, step: int) -> Commit:
    return Commit(term=1, attempt=number, step=step, directory=directory_of(number, step), manifest_sha256="0", world_size=2)


def record(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 5.0 - step / 100,
        "grad_norm": 1.0,
        "lr": 0.1,
        "tokens": 100,
        "seconds": 0.5,
        "samples": [(step - 1) * 4, step * 4],
        "ledger": [[0, 2, step], [2, 4, step + 1]],
        "update_ratio_before": None if step == 1 else (step - 1) / 1000,
    } | more


def evaluation(step: int) -> dict[str, Any]:
    return {"evaluation": {"step": step, "held_out_nats": 4.5, "perplexity": 90.0}}


def rooted(root: Path, records: Iterable[Record], steps: dict[int, Iterable[dict[str, Any]]]) -> Store:
    log = RunLog.open(Store.open(root))
    log.open_term(run="test", identity="x", host="here", pid=1)
    for made in records:
        log.append(made)
    for number, lines in steps.items():
        log.store.append(steps_key(number), b"\n".join(json.dumps(line).encode() for line in lines))
    return log.store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Attempt 1 trains to step 7 and dies, attempt 2 goes on from step 4 with three ranks to step 8, of which 6 is committed."""
    return rooted(
        tmp_path,
        [attempt(1), commit(1, 2), commit(1, 4), attempt(2, 4, 1, world_size=3), commit(2, 6)],
        {
            1: [*map(record, range(1, 8)), evaluation(4), evaluation(7)],
            2: [*(record(step, loss=3.0) for step in range(5, 9)), evaluation(8)],
        },
    )


def test_the_lineage_is_one_curve_and_the_rest_is_lost_work(store: Store) -> None:
    course = read_course(store)
    assert course.steps.step.tolist() == list(range(1, 9))
    assert course.steps.attempt.tolist() == [1] * 4 + [2] * 4
    assert course.steps.provisional.tolist() == [False] * 6 + [True] * 2
    assert course.lost.step.tolist() == [5, 6, 7]
    assert course.lost.attempt.tolist() == [1, 1, 1]
    assert course.steps.loss[4:].tolist() == [3.0] * 4
    assert course.commits == (2, 4, 6)
    assert course.outcome == ""


def test_an_update_ratio_stands_with_the_step_that_made_the_update(store: Store) -> None:
    course = read_course(store)
    assert course.steps.update_ratio[:-1].tolist() == [step / 1000 for step in range(1, 8)]
    assert np.isnan(course.steps.update_ratio[-1])
    assert course.lost.update_ratio[:-1].tolist() == [0.005, 0.006]


def test_attempts_say_what_became_of_their_steps(store: Store) -> None:
    first, second = read_course(store).attempts
    assert (first.world_size, first.resume_step, first.first_step, first.last_step, first.kept_steps, first.lost_steps) == (
        2,
        -1,
        1,
        7,
        4,
        3,
    )
    assert (second.world_size, second.resume_step, second.first_step, second.last_step, second.lost_steps) == (3, 4, 5, 8, 0)


def test_evaluations_of_lost_steps_do_not_count(store: Store) -> None:
    assert [(evaluation.step, evaluation.attempt) for evaluation in read_course(store).evaluations] == [(4, 1), (8, 2)]


def test_an_earlier_attempt_is_shown_as_it_stood_at_its_end(store: Store) -> None:
    course = read_course(store, 1)
    assert course.steps.step.tolist() == list(range(1, 8))
    assert course.steps.provisional.tolist() == [False] * 4 + [True] * 3
    assert len(course.lost) == 0
    assert [evaluation.step for evaluation in course.evaluations] == [4, 7]
    with pytest.raises(ValueError, match="there is no attempt 5; this run has 1, 2"):
        read_course(store, 5)


def test_what_a_rewind_took_away_stays_inspectable(store: Store) -> None:
    log = RunLog.open(store)
    log.append(Rewind(term=1, directory=directory_of(1, 2), step=2, skips=("8:12",), why="step 5 was bad"))
    log.append(replace(attempt(3, 2, 1), skips=("8:12",)))
    store.append(steps_key(3), json.dumps(record(3, loss=2.5)).encode())
    now, before = read_course(store), read_course(store, 2)
    assert now.steps.loss.tolist() == [4.99, 4.98, 2.5]
    assert sorted(set(now.lost.step.tolist())) == [3, 4, 5, 6, 7, 8]
    assert [(i.kind, i.step, i.skips) for i in now.incidents] == [("rewind", 2, ("8:12",))]
    assert before.steps.step.tolist() == list(range(1, 9))
    assert before.incidents == ()


def test_a_rewind_counts_before_the_next_attempt_begins(store: Store) -> None:
    RunLog.open(store).append(Rewind(term=1, directory=directory_of(1, 2), step=2, why="people asked"))
    assert read_course(store).steps.step.tolist() == [1, 2]


def test_torn_and_foreign_lines_are_left_out(store: Store) -> None:
    path = store.local_path(steps_key(2))
    assert path is not None
    path.write_bytes(
        path.read_bytes() + b'[1, 2]\n"x"\n{"step": "9"}\n{"step": 9, "loss": 2.0, "samples": "?", "ledger": 3}\n{"step": 10, "lo'
    )
    course = read_course(store)
    assert course.steps.step.tolist() == list(range(1, 10))
    assert course.steps.first_position[-1] == -1
    assert course.steps.batch[-1] == 0
    assert np.isnan(course.steps.grad_norm[-1])


def test_failures_and_refused_steps_are_told(store: Store) -> None:
    event = {"kind": "failure", "why": "rank 1 was killed", "attempt": 1, "step": 7, "cause": "signal"}
    store.append(EVENTS_KEY, b"\n".join(json.dumps(line).encode() for line in (event, {"kind": "waiting", "why": "", "attempt": 1})))
    refused = {"step": 9, "what": "loss", "bound": None, "module": "blocks.0", "skips": ["32:36"], "why": "step 9: the loss is nan"}
    store.append(steps_key(2), b"\n".join(json.dumps({"rejected": line}).encode() for line in (refused, refused | {"bound": 4.0})))
    failure, non_finite, spike = read_course(store).incidents
    assert (failure.kind, failure.step, failure.cause) == ("failure", 7, "signal")
    assert (non_finite.kind, non_finite.step, non_finite.cause, non_finite.module) == ("rejected", 9, "non-finite", "blocks.0")
    assert (spike.cause, spike.skips) == ("spike", ("32:36",))


def test_layers_stand_in_the_order_of_the_forward_pass(tmp_path: Path) -> None:
    layers = {"b": {"rms": 2.0, "order": 0}, "a": {"rms": 3.0, "order": 1, "dead": 0.5}, "a.weight": {"grad_norm": 1.0, "zeros": None}}
    store = rooted(tmp_path, [attempt(1)], {1: [record(1, layers=layers), record(2), record(3, layers=layers | {"c": {"rms": 9.0}})]})
    found = read_course(store).layers
    assert found.names == ("b", "a", "a.weight", "c")
    assert found.step.tolist() == [1, 3]
    names, rms = found.named("rms")
    assert names == ("b", "a", "c")
    np.testing.assert_array_equal(rms, [[2.0, 3.0, np.nan], [2.0, 3.0, 9.0]])
    assert found.named("dead")[0] == ("a",)
    assert found.named("unheard-of")[0] == ()
    assert len(found.within(2, 9)) == 1


def test_layer_samples_are_thinned_evenly() -> None:
    layers = _Layers()
    for step in range(1, 3 * MAX_SAMPLES + 1):
        layers.add(step, {"a": {"rms": float(step)}})
    found = layers.matrices()
    assert len(found) <= MAX_SAMPLES
    assert set(np.diff(found.step).tolist()) == {4}
    np.testing.assert_array_equal(found.of("rms")[:, 0], found.step)


@pytest.mark.slow
def test_a_long_training_takes_no_more_memory_than_its_columns(tmp_path: Path) -> None:
    import tracemalloc

    count = 30_000
    store = rooted(
        tmp_path, [attempt(1)], {1: (record(step, layers={"a": {"rms": 1.0}} if step % 50 == 0 else {}) for step in range(1, count + 1))}
    )
    file_bytes = store.size(steps_key(1))
    tracemalloc.start()
    course = read_course(store)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(course.steps) == count
    assert peak < 3 * file_bytes  # the lines, once, and columns; parsed records alone would be ten times that


def test_a_part_of_a_course(store: Store) -> None:
    part = read_course(store).within(4, 6)
    assert isinstance(part, Course)
    assert part.steps.step.tolist() == [4, 5, 6]
    assert part.lost.step.tolist() == [5, 6]
    assert [evaluation.step for evaluation in part.evaluations] == [4]
