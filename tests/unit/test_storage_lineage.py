"""What the run log means: history, terms, void records."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import reduce
from typing import Any

import pytest

from keepstep.storage.layout import checkpoint_directory
from keepstep.storage.lineage import Folding, Lineage, Segment, fold, refusal
from keepstep.storage.records import Attempt, Commit, Failed, Finished, Opened, Pin, Quarantine, Record, Retire, Rewind, Verified
from keepstep.storage.skips import cover


def opened(term: int = 1, identity: str = "i") -> Opened:
    return Opened(term=term, run="x", identity=identity, host="h", pid=1)


def directory(attempt: int, step: int) -> str:
    return checkpoint_directory(attempt, step, f"nonce-{attempt}")


def attempt(number: int, resume: tuple[int, int] | None = None, term: int = 1, at: str = "") -> Attempt:
    """`resume`: (attempt, step) of the checkpoint."""
    return Attempt(
        term=term,
        attempt=number,
        nodes=("a#1",),
        world_size=2,
        resume_step=resume[1] if resume else -1,
        resume_directory=directory(*resume) if resume else "",
        nonce=f"nonce-{number}",
        at=at,
    )


def commit(number: int, step: int, term: int = 1) -> Commit:
    return Commit(term=term, attempt=number, step=step, directory=directory(number, step), manifest_sha256="00", world_size=2)


def quarantine(number: int, step: int) -> Quarantine:
    return Quarantine(term=1, directory=directory(number, step), why="damaged")


def retire(*of: tuple[int, int]) -> Retire:
    return Retire(term=1, directories=tuple(directory(*one) for one in of))


def pin(number: int, step: int, *, pinned: bool = True) -> Pin:
    return Pin(term=1, directory=directory(number, step), pinned=pinned)


def verified(number: int, step: int) -> Verified:
    return Verified(term=1, directory=directory(number, step))


def rewind(to: tuple[int, int] | None, skips: tuple[str, ...] = (), term: int = 1, **other: Any) -> Rewind:
    """`to`: (attempt, step) of the checkpoint."""
    where = (directory(*to), to[1]) if to else ("", -1)
    return Rewind(term=term, directory=where[0], step=where[1], skips=skips, why="x", **other)


def lineage_of(*records: Record) -> Lineage:
    return reduce(fold, records, Lineage())


def steps(*numbers: int) -> list[dict[str, int]]:
    return [{"step": number} for number in numbers]


class TestHistory:
    def test_an_empty_log_has_nothing(self) -> None:
        assert lineage_of().newest_committed() is None
        assert lineage_of().history({1: steps(1, 2)}) == ()

    def test_the_newest_commit_is_resumed_from(self) -> None:
        assert lineage_of(opened(), attempt(1), commit(1, 20), commit(1, 40)).newest_committed() == commit(1, 40)

    def test_steps_belong_to_the_attempt_that_the_commits_select(self) -> None:
        lineage = lineage_of(opened(), attempt(1), commit(1, 2), attempt(2, (1, 2)), commit(2, 4))
        records = {1: steps(1, 2, 3, 4), 2: steps(3, 4, 5)}
        history = [(step.step, step.attempt, step.provisional) for step in lineage.history(records)]
        assert history == [(1, 1, False), (2, 1, False), (3, 2, False), (4, 2, False), (5, 2, True)]

    def test_without_a_commit_everything_of_the_running_attempt_is_provisional(self) -> None:
        history = lineage_of(opened(), attempt(1), attempt(2)).history({1: steps(1, 2), 2: steps(1)})
        assert [(step.step, step.attempt, step.provisional) for step in history] == [(1, 2, True)]

    def test_an_attempt_without_commits_leaves_no_trace(self) -> None:
        lineage = lineage_of(opened(), attempt(1), commit(1, 2), attempt(2, (1, 2)), attempt(3, (1, 2)), commit(3, 4))
        history = lineage.history({1: steps(1, 2), 2: steps(3), 3: steps(3, 4)})
        assert [(step.step, step.attempt) for step in history] == [(1, 1), (2, 1), (3, 3), (4, 3)]

    def test_a_step_written_twice_by_one_attempt_counts_once(self) -> None:
        history = lineage_of(opened(), attempt(1), commit(1, 2)).history({1: [{"step": 1, "n": 1}, {"step": 1, "n": 2}]})
        assert [step.record["n"] for step in history] == [2]

    def test_a_rewind_takes_later_commits_out_of_the_history(self) -> None:
        lineage = lineage_of(opened(), attempt(1), commit(1, 20), commit(1, 40), attempt(2, (1, 20)))
        assert lineage.newest_committed() == commit(1, 20)
        assert lineage.abandoned == (commit(1, 40),)

    def test_starting_from_scratch_leaves_nothing_in_the_history(self) -> None:
        lineage = lineage_of(opened(), attempt(1), commit(1, 20), attempt(2))
        assert (lineage.newest_committed(), lineage.commits) == (None, ())


class TestDamage:
    def test_a_quarantined_checkpoint_is_not_resumed_from(self) -> None:
        lineage = lineage_of(opened(), attempt(1), commit(1, 20), commit(1, 40), quarantine(1, 40))
        assert lineage.newest_committed() == commit(1, 20)

    def test_a_retired_checkpoint_is_not_resumed_from(self) -> None:
        lineage = lineage_of(opened(), attempt(1), commit(1, 20), commit(1, 40), retire((1, 20)), quarantine(1, 40))
        assert lineage.newest_committed() is None
        assert not lineage.is_usable(commit(1, 20))


class TestRetired:
    LOG = (opened(), attempt(1), *(commit(1, step) for step in (1, 2, 3, 4)))

    def test_their_steps_stay_in_the_history(self) -> None:
        lineage = lineage_of(*self.LOG, retire((1, 1), (1, 2)))
        assert [step.step for step in lineage.history({1: steps(1, 2, 3, 4)})] == [1, 2, 3, 4]

    def test_their_segments_are_merged_up_to_the_next_live_commit(self) -> None:
        committed = lineage_of(*self.LOG, retire((1, 1), (1, 3))).segments()[:-1]
        assert committed == (Segment(attempt=1, after=-1, last=2), Segment(attempt=1, after=2, last=4))

    def test_a_change_of_the_attempt_stays_a_boundary(self) -> None:
        lineage = lineage_of(*self.LOG, attempt(2, (1, 2)), commit(2, 5), commit(2, 6), retire((1, 1), (1, 2), (2, 5)))
        assert lineage.segments() == (
            Segment(attempt=1, after=-1, last=2),
            Segment(attempt=2, after=2, last=6),
            Segment(attempt=2, after=6, last=None),
        )

    def test_nothing_else_of_them_is_kept(self) -> None:
        marked = (verified(1, 1), verified(1, 3), pin(1, 1), pin(1, 1, pinned=False), quarantine(1, 2), pin(1, 3), attempt(2, (1, 3)))
        lineage = lineage_of(*self.LOG, *marked, retire((1, 1), (1, 2), (1, 4)))
        assert lineage.live == lineage.commits == (commit(1, 3),)
        assert (lineage.pinned, lineage.verified, lineage.quarantined) == ({directory(1, 3)}, {directory(1, 3)}, frozenset())
        assert lineage.commit_of(directory(1, 1)) is None
        assert lineage.ever_committed

    def test_a_step_is_not_committed_again_when_its_checkpoint_is_gone(self) -> None:
        lineage = lineage_of(*self.LOG, quarantine(1, 4), retire((1, 4)))
        assert lineage.committed_step == 4
        assert "commit of step 4 after step 4" in refusal(lineage, commit(1, 4))

    def test_what_the_running_attempt_resumed_from_stays_known(self) -> None:
        lineage = lineage_of(*self.LOG, attempt(2, (1, 2)), commit(2, 5), retire((1, 2)))
        assert lineage.resumed == commit(1, 2)
        assert lineage_of(*self.LOG, attempt(2)).resumed is None


class TestAttempts:
    def test_they_are_counted_and_the_first_one_says_when_the_run_began(self) -> None:
        lineage = lineage_of(opened(), attempt(1, at="first"), attempt(3, at="second"))
        assert (lineage.num_attempts, lineage.began_at, lineage.newest_attempt()) == (2, "first", attempt(3, at="second"))


class TestVerified:
    def test_it_holds_until_the_checkpoint_is_retired(self) -> None:
        log = (opened(), attempt(1), commit(1, 20), commit(1, 40), verified(1, 20), verified(1, 40))
        assert lineage_of(*log).verified == {directory(1, 20), directory(1, 40)}
        assert lineage_of(*log, retire((1, 20))).verified == {directory(1, 40)}


class TestVoidRecords:
    @pytest.mark.parametrize(
        ("log", "record", "why"),
        [
            ([opened(2)], opened(2), "term 2 was opened after term 2"),
            ([opened(1)], opened(2, identity="other"), "holds run 'x' with identity i, not 'x' with other"),
            ([opened(1), opened(2)], attempt(1, term=1), "attempt of term 1 while term 2 is open"),
            ([opened()], attempt(1, term=2), "attempt of term 2 while term 1 is open"),
            ([], attempt(1), "attempt of term 1 while term 0 is open"),
            ([opened(), attempt(3)], attempt(3), "attempt 3 came after attempt 3"),
            ([opened(), attempt(3)], attempt(2), "attempt 2 came after attempt 3"),
            ([opened()], attempt(1, (7, 20)), "not a usable commit of the history"),
            ([opened(), attempt(1), commit(1, 20), quarantine(1, 20)], attempt(2, (1, 20)), "not a usable commit"),
            ([opened()], commit(1, 20), "while attempt none runs"),
            ([opened(), attempt(1), attempt(2)], commit(1, 20), "commit of attempt 1 while attempt 2 runs"),
            ([opened(), attempt(1), commit(1, 20)], commit(1, 20), "commit of step 20 after step 20"),
            ([opened(), attempt(1)], quarantine(1, 20), "never committed"),
            ([opened(), attempt(1), commit(1, 20), commit(1, 30), retire((1, 20))], quarantine(1, 20), "or is retired"),
            ([opened(), attempt(1)], pin(1, 20), "never committed"),
            ([opened(), attempt(1)], verified(1, 20), "never committed"),
            ([opened(), attempt(1), commit(1, 20)], retire((1, 20)), "last usable checkpoint"),
            ([opened(), attempt(1), commit(1, 20), commit(1, 30), pin(1, 20)], retire((1, 20)), "which is pinned"),
            ([opened(), attempt(1), commit(1, 20)], replace(commit(1, 30), directory=directory(1, 20)), "is committed already"),
        ],
    )
    def test_a_void_record_changes_nothing_and_says_why(self, log: list[Record], record: Record, why: str) -> None:
        lineage = lineage_of(*log)
        assert why in refusal(lineage, record)
        assert fold(lineage, record) is lineage

    def test_a_resume_step_must_be_the_committed_one(self) -> None:
        lineage = lineage_of(opened(), attempt(1), commit(1, 20))
        wrong = Attempt(term=1, attempt=2, nodes=(), world_size=2, resume_step=21, resume_directory=directory(1, 20), nonce="n")
        assert "calls" in refusal(lineage, wrong)

    def test_the_end_is_forgotten_when_the_run_goes_on(self) -> None:
        end = Finished(term=1, step=20, outcome="stopped", why="asked to")
        assert lineage_of(opened(), attempt(1), commit(1, 20), end).outcome == end
        assert lineage_of(opened(), attempt(1), commit(1, 20), end, attempt(2, (1, 20))).outcome is None
        assert lineage_of(opened(), Failed(term=1, why="x", requeue=False)).outcome == Failed(term=1, why="x", requeue=False)


class TestRewind:
    LOG = (opened(), attempt(1), commit(1, 20), commit(1, 40), commit(1, 60))
    BACK = rewind((1, 20), ("300:308",), overrides=("optimizer.lr=0.001",))
    NEXT = replace(attempt(2, (1, 20)), skips=("300:308",), overrides=("optimizer.lr=0.001",))

    def test_what_came_after_leaves_the_history_at_once(self) -> None:
        lineage = lineage_of(*self.LOG, self.BACK)
        assert (lineage.commits, lineage.abandoned) == ((commit(1, 20),), (commit(1, 40), commit(1, 60)))
        assert lineage.newest_committed() == commit(1, 20)
        assert [step.step for step in lineage.history({1: steps(20, 21, 40, 61)})] == [20]

    def test_the_last_checkpoint_of_the_old_history_stays_until_it_is_unpinned(self) -> None:
        lineage = lineage_of(*self.LOG, self.BACK)
        assert lineage.pinned == lineage.tips == {directory(1, 60)}
        assert "pinned" in refusal(lineage, retire((1, 60)))
        assert lineage_of(*self.LOG, self.BACK, pin(1, 60, pinned=False), retire((1, 60))).tips == frozenset()

    def test_a_damaged_one_is_no_last_checkpoint(self) -> None:
        assert lineage_of(*self.LOG, quarantine(1, 60), self.BACK).tips == {directory(1, 40)}

    def test_a_bad_step_that_takes_nothing_along_pins_nothing(self) -> None:
        lineage = lineage_of(*self.LOG, rewind((1, 60), ("500:502",), bad_step=63))
        assert (lineage.pinned, lineage.tips, lineage.num_bad_steps) == (frozenset(), frozenset(), 1)

    def test_the_attempt_that_was_rewound_commits_nothing_any_more(self) -> None:
        lineage = lineage_of(*self.LOG, self.BACK)
        assert refusal(lineage, commit(1, 80)) == "commit of attempt 1, which was rewound"
        assert refusal(fold(lineage, self.NEXT), commit(2, 40)) == ""

    def test_the_next_attempt_says_all_that_holds_or_is_void(self) -> None:
        lineage = lineage_of(*self.LOG, self.BACK)
        assert "fewer than are skipped already" in refusal(lineage, attempt(2, (1, 20)))
        assert "in force are" in refusal(lineage, replace(self.NEXT, overrides=()))
        assert "in force are" in refusal(lineage, replace(self.NEXT, skips=("300:309",)))
        after = fold(lineage, self.NEXT)
        assert (after.skips, after.overrides, after.rewound) == (("300:308",), ("optimizer.lr=0.001",), None)

    def test_skips_never_become_fewer(self) -> None:
        lineage = lineage_of(*self.LOG, self.BACK, self.NEXT)
        assert refusal(lineage, rewind((1, 20), ("302:308",))) == (
            "a rewind skips ('302:308',), fewer than are skipped already: ('300:308',)"
        )
        assert refusal(lineage, rewind((1, 20), ("300:310",))) == ""
        assert "FIRST:LAST" in refusal(lineage, rewind((1, 20), ("300:308", "x")))

    def test_it_leads_to_a_usable_checkpoint_of_the_history_only(self) -> None:
        lineage = lineage_of(*self.LOG, self.BACK, self.NEXT, commit(2, 30))
        skips = ("300:308",)
        assert "not a usable commit" in refusal(lineage, rewind((1, 40), skips))
        assert "not a usable commit" in refusal(fold(lineage, quarantine(2, 30)), rewind((2, 30), skips))
        assert "it is step 30" in refusal(lineage, replace(rewind((2, 30), skips), step=31))
        assert "without a directory" in refusal(lineage, replace(rewind(None, skips), step=31))
        assert refusal(lineage_of(opened()), rewind(None)) == "a rewind before the first attempt"

    def test_to_the_beginning_there_was_never_a_commit(self) -> None:
        lineage = lineage_of(*self.LOG, rewind(None))
        assert (lineage.newest_committed(), lineage.ever_committed, lineage.committed_step) == (None, False, -1)
        assert refusal(lineage, attempt(2)) == ""

    def test_the_end_of_a_run_is_void_then_and_its_attempt_stays_over(self) -> None:
        end = Finished(term=1, step=60, outcome="succeeded", why="done")
        lineage = lineage_of(*self.LOG, end, self.BACK)
        assert (lineage.outcome, lineage.is_ended) == (None, True)
        assert not lineage_of(*self.LOG, end, self.BACK, self.NEXT).is_ended
        assert not lineage_of(*self.LOG, self.BACK).is_ended

    def test_its_target_is_not_retired_before_somebody_resumes_from_it(self) -> None:
        log = (*self.LOG, rewind((1, 40)))
        assert "to which the run was rewound" in refusal(lineage_of(*log), retire((1, 40)))
        assert refusal(lineage_of(*log, attempt(2, (1, 40)), commit(2, 60)), retire((1, 40))) == ""

    def test_where_a_rewind_to_a_step_leads(self) -> None:
        lineage = lineage_of(*self.LOG, quarantine(1, 40))
        assert [lineage.newest_until(step) for step in (19, 20, 59, 60, 99)] == [None, *[commit(1, 20)] * 2, *[commit(1, 60)] * 2]


class TestLostRecords:
    """What a later record proves about one that cannot be read."""

    HISTORY = (opened(), attempt(1), commit(1, 10), opened(2), attempt(2, (1, 10), term=2), commit(2, 20, term=2))

    def without(self, lost: int) -> Lineage:
        folding = Folding(Lineage())
        for number, record in enumerate(self.HISTORY):
            if number == lost:
                folding.lose()
            else:
                assert folding.add(record) == ""
        return folding.lineage()

    @pytest.mark.parametrize("lost", range(len(HISTORY) - 1))
    def test_whatever_is_lost_the_newest_checkpoint_is_there(self, lost: int) -> None:
        lineage = self.without(lost)
        assert lineage.newest_committed() == commit(2, 20, term=2)
        assert lineage.term == 2
        assert lineage.newest_attempt() is not None

    def test_a_lost_commit_from_which_an_attempt_began_cannot_be_verified(self) -> None:
        source = self.without(2).commit_of(directory(1, 10))
        assert source
        assert (source.step, source.manifest_sha256) == (10, "")

    def test_after_a_lost_first_record_any_identity_may_open_the_next_term(self) -> None:
        assert refusal(self.without(0), opened(3)) == ""

    def test_a_lost_rewind_brings_no_skipped_sample_back(self) -> None:
        folding = Folding(lineage_of(*TestRewind.LOG))
        folding.lose()
        assert folding.add(TestRewind.NEXT) == ""
        lineage = folding.lineage()
        assert (lineage.skips, lineage.overrides) == (TestRewind.NEXT.skips, TestRewind.NEXT.overrides)
        assert lineage.newest_committed() == commit(1, 20)
        assert "fewer than are skipped" in folding.refusal(attempt(3, (1, 20)))

    def test_a_rewind_to_a_lost_commit_skips_all_the_same(self) -> None:
        folding = Folding(lineage_of(opened(), attempt(1), commit(1, 20)))
        folding.lose()  # the commit of step 40
        for record in (commit(1, 60), rewind((1, 40), ("400:404",)), replace(attempt(2, (1, 40)), skips=("400:404",)), commit(2, 60)):
            assert folding.add(record) == ""
        lineage = folding.lineage()
        assert (lineage.skips, lineage.tips) == (("400:404",), {directory(1, 60)})
        assert [(one.attempt, one.step) for one in lineage.commits] == [(1, 20), (1, 40), (2, 60)]

    def test_a_lost_attempt_after_a_rewind_skips_what_the_rewind_said(self) -> None:
        folding = Folding(lineage_of(*TestRewind.LOG, TestRewind.BACK))
        folding.lose()
        assert folding.add(commit(2, 40)) == ""
        assert folding.lineage().skips == ("300:308",)

    def test_in_a_whole_log_nothing_is_implied(self) -> None:
        assert refusal(lineage_of(opened(), attempt(1)), commit(2, 10)) == "commit of attempt 2 while attempt 1 runs"
        assert refusal(lineage_of(opened(), attempt(1)), commit(1, 10, term=2)) == "commit of term 2 while term 1 is open"


def random_record(chance: random.Random, lineage: Lineage) -> Record:
    """Anything, sensible or not."""
    number, step, term = chance.randint(1, 6), chance.randint(0, 9), max(1, lineage.term + chance.choice([0, 0, 0, 0, -1]))
    known = [(c.attempt, c.step) for c in (*lineage.commits, *lineage.abandoned)] or [(1, 1)]
    newest = lineage.newest_attempt()
    running = newest.attempt if newest else 1
    return chance.choice(
        [
            opened(lineage.term + chance.choice([0, 1])),
            attempt(running + chance.choice([0, 1, 1]), chance.choice([None, *known]), term),
            commit(chance.choice([running, running, number]), step, term),
            commit(running, step, term),
            Quarantine(term=term, directory=directory(*chance.choice(known)), why="x"),
            Retire(term=term, directories=tuple(directory(*of) for of in known if chance.random() < 0.5)),
            Pin(term=term, directory=directory(*chance.choice(known)), pinned=chance.random() < 0.3),
            Verified(term=term, directory=directory(*chance.choice(known))),
            Finished(term=term, step=step, outcome="stopped", why="x"),
            rewind(chance.choice([None, *known]), (*lineage.skips, f"{step}:{step + 1}") if chance.random() < 0.9 else (), term),
            replace(attempt(running + 1, chance.choice(known), term), skips=lineage.skips),
        ]
    )


def check(lineage: Lineage) -> None:
    committed = [commit.step for commit in lineage.commits]
    assert committed == sorted(set(committed)), "the history goes forward"
    assert not {c.directory for c in lineage.commits} & {c.directory for c in lineage.abandoned}
    of_history = [step.step for step in lineage.history(EVERYTHING)]
    assert of_history == sorted(set(of_history)), "every step of the history was computed once"
    if newest := lineage.newest_committed():
        assert newest.directory not in lineage.quarantined
    assert lineage.quarantined | lineage.pinned | lineage.verified | lineage.tips <= {commit.directory for commit in lineage.live}


EVERYTHING = {number: steps(*range(12)) for number in range(20)}


@pytest.mark.parametrize("seed", range(40))
def test_no_sequence_of_records_breaks_the_history(seed: int) -> None:
    chance, lineage = random.Random(seed), Lineage()
    for _ in range(60):
        before, lineage = lineage, fold(lineage, random_record(chance, lineage))
        check(lineage)
        assert cover(lineage.skips, before.skips)


@pytest.mark.parametrize("seed", range(40))
def test_forgetting_what_was_retired_changes_no_history(seed: int) -> None:
    chance, lineage, complete = random.Random(seed), Lineage(), Lineage()
    for _ in range(60):
        record = random_record(chance, lineage)
        if not refusal(lineage, record) and not isinstance(record, Retire):
            complete = fold(complete, record)
        lineage = fold(lineage, record)
        assert lineage.history(EVERYTHING) == complete.history(EVERYTHING)
        assert lineage.committed_step == complete.committed_step


@pytest.mark.parametrize("seed", range(10))
def test_records_folded_at_once_mean_what_they_mean_one_by_one(seed: int) -> None:
    chance, lineage, folding = random.Random(seed), Lineage(), Folding(Lineage())
    for _ in range(60):
        record = random_record(chance, lineage)
        assert folding.add(record) == refusal(lineage, record)
        lineage = fold(lineage, record)
    assert folding.lineage() == lineage
