"""Which save is complete, which answers about checkpoints cannot be right."""

from __future__ import annotations

from keepstep.orchestrator import saves
from keepstep.orchestrator.events import Checkpoint
from keepstep.orchestrator.saves import Saves
from keepstep.orchestrator.wire import Persisted

BEGUN = saves.begin_attempt(Saves(), 2, None)


def part(rank: int, step: int = 20, attempt: int = 2, directory: str = "d") -> Persisted:
    return Persisted(attempt=attempt, step=step, rank=rank, directory=f"{directory}{step}", index_sha256="x", num_bytes=1)


def commit(step: int) -> Checkpoint:
    return Checkpoint(step=step, directory=f"d{step}", manifest_sha256="m")


def test_a_save_is_complete_when_all_ranks_are_in_the_same_directory() -> None:
    found = saves.note(BEGUN, [part(0), part(1, directory="other")])
    assert saves.complete(found, 2) is None
    request = saves.complete(saves.note(found, [part(1)]), 2)
    assert request is not None
    assert [index.rank for index in request.indexes] == [0, 1]


def test_the_newest_complete_save_comes_first() -> None:
    request = saves.complete(saves.note(BEGUN, [part(0), part(1), part(0, 40), part(1, 40), part(0, 60)]), 2)
    assert request is not None
    assert request.step == 40


def test_before_it_comes_the_one_with_the_best_evaluation() -> None:
    told = [part(0), part(1), *(part(rank, 40).model_copy(update={"best_step": 20}) for rank in (0, 1))]
    found = saves.note(BEGUN, told)
    request = saves.complete(found, 2)
    assert request is not None
    assert (request.step, saves.newest_whole(found, 2)) == (20, 40)
    request = saves.complete(saves.commit(found, commit(20)), 2)
    assert request is not None
    assert request.step == 40


def test_the_newest_whole_save_counts_whether_it_is_committed_or_not() -> None:
    assert saves.newest_whole(BEGUN, 2) == -1
    assert saves.newest_whole(saves.note(BEGUN, [part(0), part(1), part(0, 40)]), 2) == 20
    assert saves.newest_whole(saves.commit(BEGUN, commit(60)), 2) == 60


def test_parts_of_other_attempts_and_older_steps_are_dropped() -> None:
    found = saves.commit(BEGUN, commit(40))
    assert saves.note(found, [part(0, 60, attempt=1), part(0, 40), part(0, 20)]) is found


def test_what_was_noted_is_not_noted_twice() -> None:
    found = saves.note(BEGUN, [part(0)])
    assert saves.note(found, [part(0)]) is found


def test_a_new_attempt_forgets_older_parts_and_what_came_after_its_source() -> None:
    found = saves.note(saves.commit(saves.commit(BEGUN, commit(20)), commit(40)), [part(0, 60)])
    found = saves.begin_attempt(found, 3, commit(20))
    assert found.committed_step == 20
    assert not found.parts
    assert found.ever_committed


def test_missing_ranks_are_those_of_the_newest_unfinished_save() -> None:
    assert saves.missing_ranks(BEGUN, 2) == frozenset()
    assert saves.missing_ranks(saves.note(BEGUN, [part(0, 20), part(1, 40)]), 2) == frozenset({0})


def test_parts_that_do_not_fit_are_never_asked_for_again() -> None:
    found = saves.discard(saves.note(BEGUN, [part(0), part(1)]), 20, "d20")
    assert saves.complete(saves.note(found, [part(0), part(1)]), 2) is None


def test_stale_answers_are_objected_to() -> None:
    found = saves.commit(saves.commit(BEGUN, commit(20)), commit(40))
    assert saves.objection(found, commit(40)) == ""
    assert saves.objection(found, commit(20)) == "step 20 is older than the commit of step 40"
    assert saves.objection(found, None) == "the log does not show the commit of step 40 yet"
    rotten = saves.quarantine(found, "d40")
    assert saves.objection(rotten, commit(40)) == "d40 is quarantined"
    assert saves.objection(rotten, commit(20)) == ""
