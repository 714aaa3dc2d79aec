"""What is committed, by whom, and what a successor makes of a save that its predecessor left whole but uncommitted."""

from __future__ import annotations

from pathlib import Path

import pytest

from keepstep.orchestrator import events as ev
from keepstep.orchestrator.commits import InvalidCheckpoint, write_manifest
from keepstep.orchestrator.logbook import Logbook, opened_event
from keepstep.orchestrator.wire import Persisted
from keepstep.storage.arena import StagedFile
from keepstep.storage.canonical import sha256_hex
from keepstep.storage.layout import checkpoint_directory, log_key, rank_index_name, shard_name
from keepstep.storage.manifest import RankIndex, TensorEntry
from keepstep.storage.records import Attempt, Commit, Quarantine
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store
from keepstep.storage.submission import Submission, persist
from keepstep.storage.verify import verify_checkpoint

WORLD = 2
ROWS = 8
NONCE = "nonce-1"


def part(store: Store, step: int, rank: int, *, attempt: int = 1, first_row: int | None = None, best_step: int = -1) -> RankIndex:
    """One rank's part of a tensor of WORLD * ROWS bytes, durable."""
    data = bytes([step % 256, rank] * (ROWS // 2))
    tensor = TensorEntry(
        name="model.w",
        file=shard_name(rank),
        offset=0,
        num_bytes=ROWS,
        dtype="uint8",
        shape=(ROWS,),
        starts=(rank * ROWS if first_row is None else first_row,),
        global_shape=(WORLD * ROWS,),
    )
    submission = Submission(
        attempt=attempt,
        rank=rank,
        world_size=WORLD,
        step=step,
        directory=checkpoint_directory(attempt, step, NONCE),
        files=(StagedFile(name=shard_name(rank), offset=0, num_bytes=ROWS),),
        tensors=(tensor,),
        state={"rng": step, "best_step": best_step},
        data=memoryview(data),
    )
    return RankIndex.parse(persist(store, submission, lambda: None))


def reported(index: RankIndex) -> Persisted:
    return Persisted(
        attempt=index.attempt,
        step=index.step,
        rank=index.rank,
        directory=index.directory,
        index_sha256=sha256_hex(index.body()),
        num_bytes=index.num_bytes,
    )


def commit_request(indexes: list[RankIndex]) -> ev.Commit:
    first = indexes[0]
    return ev.Commit(attempt=first.attempt, step=first.step, directory=first.directory, indexes=tuple(map(reported, indexes)))


def open_term(root: Path) -> tuple[RunLog, Logbook]:
    log = RunLog.open(Store.open(root))
    opened = log.open_term(run="r", identity="i", host="here", pid=1)
    return log, Logbook(log, opened.term)


@pytest.fixture
def begun(tmp_path: Path) -> tuple[RunLog, Logbook]:
    """Attempt 1 is in the log."""
    log, logbook = open_term(tmp_path)
    log.append(Attempt(term=1, attempt=1, nodes=("node0#a",), world_size=WORLD, nonce=NONCE))
    return log, logbook


def find(logbook: Logbook) -> ev.Found:
    found = logbook.carry_out(ev.FindCheckpoint())
    assert isinstance(found, ev.Found)
    return found


def steps_of(log: RunLog) -> list[int]:
    return [commit.step for commit in log.lineage.commits]


def test_a_successor_rolls_a_whole_directory_forward(tmp_path: Path, begun: tuple[RunLog, Logbook]) -> None:
    store = begun[0].store
    for step in (20, 40):
        for rank in range(WORLD):
            part(store, step, rank)
    log, logbook = open_term(tmp_path)
    found = find(logbook)
    assert found.rolled_forward
    assert found.resume
    assert (found.resume.step, steps_of(log)) == (40, [40])
    verify_checkpoint(store, found.resume.directory, found.resume.manifest_sha256)
    assert not find(logbook).rolled_forward, "once is enough"


def test_the_best_evaluated_one_is_rolled_forward_too(tmp_path: Path, begun: tuple[RunLog, Logbook]) -> None:
    """Nobody could commit it behind a newer one."""
    for step in (20, 40, 60):
        for rank in range(WORLD):
            part(begun[0].store, step, rank, best_step=40 if step >= 40 else 20)
    log, logbook = open_term(tmp_path)
    found = find(logbook)
    assert found.resume
    assert (found.resume.step, steps_of(log)) == (60, [40, 60])
    best = log.lineage.best()
    assert best
    assert best.step == 40


def test_a_commit_says_which_step_was_the_best(begun: tuple[RunLog, Logbook]) -> None:
    log, logbook = begun
    for step, best_step in ((20, 20), (40, 20), (60, -1)):
        request = commit_request([part(log.store, step, rank, best_step=best_step) for rank in range(WORLD)])
        logbook.commit(write_manifest(log.store, request))
    assert [commit.best_step for commit in log.lineage.commits] == [20, 20, -1]


def test_what_lacks_a_part_is_never_committed(tmp_path: Path, begun: tuple[RunLog, Logbook]) -> None:
    store = begun[0].store
    part(store, 20, 0)
    assert (find(open_term(tmp_path)[1]).resume, find(open_term(tmp_path)[1]).rolled_forward) == (None, False)


def test_an_older_whole_directory_is_taken_where_the_newest_lacks_a_part(tmp_path: Path, begun: tuple[RunLog, Logbook]) -> None:
    store = begun[0].store
    for step, ranks in ((20, (0, 1)), (40, (1,))):
        for rank in ranks:
            part(store, step, rank)
    log, logbook = open_term(tmp_path)
    assert (find(logbook).rolled_forward, steps_of(log)) == (True, [20])


def test_what_is_not_newer_than_the_newest_commit_stays_as_it_is(begun: tuple[RunLog, Logbook]) -> None:
    log, logbook = begun
    older = [part(log.store, 20, rank) for rank in range(WORLD)]
    newer = [part(log.store, 40, rank) for rank in range(WORLD)]
    request = commit_request(newer)
    logbook.commit(write_manifest(log.store, request))
    assert older
    assert (find(logbook).rolled_forward, steps_of(log)) == (False, [40])


def test_parts_that_overlap_are_never_committed(begun: tuple[RunLog, Logbook]) -> None:
    log, logbook = begun
    part(log.store, 20, 0)
    part(log.store, 20, 1, first_row=ROWS // 2)
    assert find(logbook).resume is None


def test_a_directory_of_another_nonce_is_somebody_elses(begun: tuple[RunLog, Logbook]) -> None:
    """After a disaster a root may hold directories of another history with the same attempt number."""
    log, logbook = begun
    indexes = [part(log.store, 20, rank) for rank in range(WORLD)]
    foreign = indexes[0].directory[:-8] + "00000000"
    for index in indexes:
        log.store.put_new(f"{foreign}/{rank_index_name(index.rank)}", index.body())
        log.store.delete(f"{index.directory}/{rank_index_name(index.rank)}")
    assert find(logbook).resume is None


def test_an_index_that_is_not_what_was_reported_is_refused(begun: tuple[RunLog, Logbook]) -> None:
    log, _ = begun
    indexes = [part(log.store, 20, rank) for rank in range(WORLD)]
    key = f"{indexes[0].directory}/{rank_index_name(0)}"
    log.store.put(key, indexes[0].body().replace(b'"rng":20', b'"rng":21'))
    with pytest.raises(InvalidCheckpoint, match="is not what rank 0 reported"):
        write_manifest(log.store, commit_request(indexes))
    log.store.put(key, b" " + indexes[0].body())
    with pytest.raises(InvalidCheckpoint, match="is not what rank 0 reported"):
        write_manifest(log.store, commit_request(indexes))


def committed(log: RunLog, logbook: Logbook, step: int) -> ev.Checkpoint:
    request = commit_request([part(log.store, step, rank) for rank in range(WORLD)])
    logbook.commit(write_manifest(log.store, request))
    found = find(logbook).resume
    assert found
    return found


def wanted(resume: ev.Checkpoint) -> ev.LogAttempt:
    return ev.LogAttempt(attempt=2, gang=("node0#a",), world_size=WORLD, resume=resume)


def test_an_attempt_from_what_people_quarantined_meanwhile_is_void_and_another_is_chosen(begun: tuple[RunLog, Logbook]) -> None:
    log, logbook = begun
    first, second = committed(log, logbook, 20), committed(log, logbook, 40)
    log.append(Quarantine(term=1, directory=second.directory, why="a person said so"))
    answer = logbook.carry_out(wanted(second))
    assert isinstance(answer, ev.AttemptVoid)
    assert "not a usable commit" in answer.why
    found = find(logbook)
    assert (found.resume, found.quarantined) == (first, frozenset({second.directory}))
    assert isinstance(logbook.carry_out(wanted(first)), ev.Logged)


def test_an_attempt_asked_twice_is_logged_once(tmp_path: Path, begun: tuple[RunLog, Logbook]) -> None:
    """The second ask comes from the same term through another object: the first answer was lost."""
    log, logbook = begun
    resume = committed(log, logbook, 20)
    stale = RunLog.open(Store.open(tmp_path))
    first, second = logbook.carry_out(wanted(resume)), Logbook(stale, 1).carry_out(wanted(resume))
    assert isinstance(first, ev.Logged)
    assert isinstance(second, ev.Logged)
    assert first.record == second.record
    assert sum(isinstance(record, Attempt) for record in stale.records) == 2


def test_a_checkpoint_that_was_retired_meanwhile_needs_no_quarantine(begun: tuple[RunLog, Logbook]) -> None:
    _, logbook = begun
    answer = logbook.carry_out(ev.LogQuarantine("data/a000001/s000000020-00000000", "block 3"))
    assert answer == ev.Logged(answer.at, ev.QuarantineRecord("data/a000001/s000000020-00000000"))


def test_a_commit_that_is_there_already_is_answered(begun: tuple[RunLog, Logbook]) -> None:
    log, logbook = begun
    request = commit_request([part(log.store, 20, rank) for rank in range(WORLD)])
    manifest = write_manifest(log.store, request)
    assert isinstance(logbook.commit(manifest), ev.Committed)
    assert isinstance(logbook.commit(write_manifest(log.store, request)), ev.Committed)
    assert [type(record) for record in log.records].count(Commit) == 1


def test_after_a_record_was_lost_no_attempt_number_can_be_one_that_was_used(tmp_path: Path, begun: tuple[RunLog, Logbook]) -> None:
    """The record of attempt 1 rots; its ranks may live."""
    store = begun[0].store
    key = log_key(begun[0].count - 1)
    store.put(key, store.get(key).replace(b"nonce", b"bacon"))
    log, _ = open_term(tmp_path)
    opened = opened_event(log)
    assert (opened.last_attempt, opened.attempts_below) == (0, log.count)
    assert opened.attempts_below > 1
