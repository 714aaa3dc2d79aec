"""From which checkpoint, through which attempts, a step can be computed again; on logs written by hand."""

from __future__ import annotations

from collections.abc import Sequence

from keepstep.storage.layout import checkpoint_directory
from keepstep.storage.lineage import Folding, Lineage
from keepstep.storage.records import Attempt, Commit, Entry, Opened, Quarantine, Record, Retire, Rewind
from keepstep.storage.routes import Past, Route, attempt_of, read_past, routes


def directory(attempt: int, step: int) -> str:
    return checkpoint_directory(attempt, step, "nonce")


def began(attempt: int, source: tuple[int, int] | None = None, *, world: int = 2, **more: tuple[str, ...]) -> Attempt:
    """`source`: (attempt, step) of the checkpoint that it resumes from."""
    resumes = {"resume_step": source[1], "resume_directory": directory(*source)} if source else {}
    return Attempt(term=1, attempt=attempt, nodes=("n#1",), world_size=world, nonce="nonce", **resumes, **more)  # type: ignore[arg-type]


def saved(attempt: int, step: int) -> Commit:
    return Commit(term=1, attempt=attempt, step=step, directory=directory(attempt, step), manifest_sha256="0" * 64, world_size=2)


def past_of(*records: Record) -> Past:
    opened = Opened(term=1, run="r", identity="i", host="h", pid=1)
    folding = Folding(Lineage())
    for record in (opened, *records):
        assert folding.add(record) == "", "the log of a test is one that could have been written"
    return read_past([entry(i, record) for i, record in enumerate((opened, *records))])


def entry(sequence: int, record: Record | None) -> Entry:
    return Entry(sequence=sequence, uuid="", previous="", sha256="", record=record)


def told(route: Route) -> tuple[int, list[tuple[int, int, int]]]:
    """(step of the checkpoint, (attempt, after, last) of each leg)."""
    return route.base.step if route.base else 0, [(leg.attempt, leg.after, leg.last) for leg in route.legs]


def ways(past: Past, attempt: int, step: int) -> list[tuple[int, list[tuple[int, int, int]]]]:
    return [told(route) for route in routes(past, attempt, step)]


FAILING: Sequence[Record] = (
    began(1),
    *(saved(1, 10), saved(1, 20)),
    began(2, (1, 20), world=3),
    began(3, (1, 20)),
    saved(3, 30),
    began(4, (3, 30)),
)


def test_the_nearest_checkpoint_comes_first_and_scratch_last() -> None:
    past = past_of(*FAILING)
    assert ways(past, 4, 35) == [
        (30, [(4, 30, 35)]),
        (20, [(3, 20, 30), (4, 30, 35)]),
        (10, [(1, 10, 20), (3, 20, 30), (4, 30, 35)]),
        (0, [(1, 0, 20), (3, 20, 30), (4, 30, 35)]),
    ]


def test_the_checkpoint_of_the_step_itself_is_too_late() -> None:
    past = past_of(*FAILING)
    assert told(next(routes(past, 3, 30))) == (20, [(3, 20, 30)])
    assert told(next(routes(past, 1, 11))) == (10, [(1, 10, 11)])
    assert told(next(routes(past, 1, 10))) == (0, [(1, 0, 10)])


def test_lost_work_goes_its_own_way() -> None:
    past = past_of(*FAILING)
    assert [attempt_of(past.lineage, step) for step in (10, 11, 20, 21, 30, 31)] == [1, 1, 1, 3, 3, 4]
    assert ways(past, 2, 25)[0] == (20, [(2, 20, 25)])
    assert ways(past, 1, 25)[0] == (20, [(1, 20, 25)]), "attempt 1 went on after its last checkpoint"


def test_what_was_retired_or_is_damaged_is_no_base() -> None:
    past = past_of(*FAILING, Retire(term=1, directories=(directory(1, 20),)), Quarantine(term=1, directory=directory(3, 30), why="damaged"))
    assert [base for base, _ in ways(past, 4, 35)] == [10, 0]


def test_a_checkpoint_that_left_the_history_serves_the_steps_that_followed_it() -> None:
    back = Rewind(term=1, directory=directory(1, 10), step=10, skips=("500:501",), overrides=("optimizer.lr=0.1",), why="asked")
    past = past_of(*FAILING, back, began(5, (1, 10), skips=back.skips, overrides=back.overrides))
    assert attempt_of(past.lineage, 15) == 5
    assert told(next(routes(past, 4, 35))) == (30, [(4, 30, 35)])
    (route, *_) = (route for route in routes(past, 5, 15) if route.base is None)
    assert [(leg.skips, leg.overrides) for leg in route.legs] == [((), ()), (back.skips, back.overrides)]


def test_legs_are_one_stretch_until_the_world_the_skips_or_the_overrides_change() -> None:
    past = past_of(
        began(1),
        saved(1, 10),
        began(2, (1, 10)),
        saved(2, 20),
        began(3, (2, 20), world=3),
        saved(3, 30),
        Rewind(term=1, directory=directory(3, 30), step=30, skips=("9999:10000",), overrides=(), why="bad"),
        began(4, (3, 30), world=3, skips=("9999:10000",)),
    )
    (scratch,) = (route for route in routes(past, 4, 35) if route.base is None)
    assert [[leg.attempt for leg in legs] for legs in scratch.stretches()] == [[1, 2], [3], [4]]
    assert scratch.num_steps == 35


def test_where_a_record_cannot_be_read_the_ways_further_back_are_unknown() -> None:
    records: list[Record | None] = [Opened(term=1, run="r", identity="i", host="h", pid=1), *FAILING]
    records[1] = None  # attempt 1
    past = read_past([entry(i, record) for i, record in enumerate(records)])
    assert [base for base, _ in ways(past, 4, 35)] == [30, 20]
