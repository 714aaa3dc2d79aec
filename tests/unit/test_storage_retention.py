"""Which checkpoints may go: never so many that a run is left without a good one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.storage.layout import checkpoint_directory
from keepstep.storage.lineage import Lineage, fold, refusal
from keepstep.storage.records import Attempt, Commit, Opened, Pin, Quarantine, Record, Retire, Rewind, Verified
from keepstep.storage.retention import Retention, choose_retired, garbage

STEPS = (10, 20, 30, 40)


def directory(step: int, attempt: int = 1) -> str:
    return checkpoint_directory(attempt, step, "n")


def began(attempt: int, resume: tuple[int, int] | None = None) -> Attempt:
    """`resume`: (step, attempt) of the checkpoint."""
    step, path = (resume[0], directory(*resume)) if resume else (-1, "")
    return Attempt(term=1, attempt=attempt, nodes=("a#1",), world_size=1, resume_step=step, resume_directory=path, nonce="n")


def commit(step: int, attempt: int = 1, best_step: int = -1) -> Commit:
    path = directory(step, attempt)
    return Commit(term=1, attempt=attempt, step=step, directory=path, manifest_sha256="00", world_size=1, best_step=best_step)


def verified(*steps: int) -> list[Record]:
    return [Verified(term=1, directory=directory(step)) for step in steps]


def damaged(step: int, attempt: int = 1) -> Quarantine:
    return Quarantine(term=1, directory=directory(step, attempt), why="damaged")


def rewound(step: int, attempt: int = 1) -> Rewind:
    return Rewind(term=1, directory=directory(step, attempt), step=step)


def pin(step: int, attempt: int = 1, *, pinned: bool = True) -> Pin:
    return Pin(term=1, directory=directory(step, attempt), pinned=pinned)


def lineage_of(*records: Record) -> Lineage:
    return reduce(fold, (Opened(term=1, run="x", identity="i", host="h", pid=1), *records), Lineage())


def four(*more: Record, good: Iterable[int] = STEPS) -> Lineage:
    """Attempt 1 with commits at 10, 20, 30 and 40."""
    return lineage_of(began(1), *map(commit, STEPS), *verified(*good), *more)


def steps(retention: Retention) -> list[int]:
    return [int(path.rpartition("/s")[2][:9]) for path in retention.retire]


class TestWhatStays:
    def test_the_newest_verified_ones(self) -> None:
        chosen = choose_retired(four(), keep=2)
        assert steps(chosen) == [10, 20]
        assert chosen.why == "2 of 4 retired, 2 verified ones stay"
        assert chosen.stays == dict.fromkeys((directory(40), directory(30)), "among the newest 2 verified")

    def test_what_is_newer_than_the_newest_verified(self) -> None:
        chosen = choose_retired(four(good=[10, 20]), keep=1)
        assert steps(chosen) == [10]
        assert chosen.stays[directory(40)] == "newer than the newest verified"

    def test_everything_while_nothing_is_verified(self) -> None:
        chosen = choose_retired(four(began(2, (20, 1)), good=[]), keep=1)
        assert (chosen.retire, chosen.why) == ((), "nothing retired: none of 2 usable checkpoints is verified yet")
        assert len(chosen.stays) == 4

    def test_unverified_ones_between_verified_ones_do_not(self) -> None:
        """Commits may come faster than they can be read back: only the verified ones count, the rest would fill the disk."""
        assert steps(choose_retired(four(good=[10, 40]), keep=2)) == [20, 30]

    def test_the_newest_unverified_ones_while_too_few_are_verified(self) -> None:
        chosen = choose_retired(four(good=[40]), keep=3)
        assert steps(chosen) == [10]
        assert chosen.stays[directory(20)] == "only 1 of 3 wanted are verified"

    def test_pins(self) -> None:
        assert steps(choose_retired(four(pin(10)), keep=2)) == [20]
        assert steps(choose_retired(four(pin(10), pin(10, pinned=False)), keep=2)) == [10, 20]

    def test_one_per_so_many_steps(self) -> None:
        assert steps(choose_retired(four(), keep=1, every=20)) == [10, 30]
        assert steps(choose_retired(four(), keep=1, every=15)) == [10], "the first one at or after a multiple: 20 after 15, 30"

    def test_damaged_ones_do_not_count_and_stay_as_evidence_for_a_while(self) -> None:
        assert steps(choose_retired(four(damaged(40)), keep=2)) == [10]
        assert steps(choose_retired(four(damaged(20)), keep=2)) == [10, 20]
        chosen = choose_retired(four(damaged(20), good=[30, 40]), keep=3)
        assert chosen.stays[directory(20)] == "damaged: evidence until 3 newer ones are verified"

    def test_a_pinned_damaged_one(self) -> None:
        assert steps(choose_retired(four(damaged(20), pin(20)), keep=2)) == [10]

    def test_the_last_checkpoint_before_a_rewind(self) -> None:
        chosen = choose_retired(four(rewound(20)), keep=2)
        assert steps(chosen) == [30]
        assert chosen.stays[directory(40)] == "pinned: the last before a rewind"
        assert steps(choose_retired(four(rewound(20), pin(40, pinned=False)), keep=2)) == [30, 40]

    def test_what_a_run_was_rewound_to(self) -> None:
        assert choose_retired(four(rewound(10), good=[20]), keep=1).why.startswith("nothing retired: none of 1 usable")
        assert directory(20) in choose_retired(four(rewound(20), good=[10]), keep=1).stays

    def test_nothing_else_of_what_left_the_history(self) -> None:
        assert steps(choose_retired(four(began(2, (20, 1))), keep=2)) == [30, 40]
        assert steps(choose_retired(four(began(2, (20, 1)), pin(40)), keep=2)) == [30]

    def test_acknowledged_writes_where_nobody_reads_back(self) -> None:
        assert steps(choose_retired(four(good=[]), keep=2, trust_writes=True)) == [10, 20]

    def test_the_newest_that_was_read_back_even_there(self) -> None:
        chosen = choose_retired(four(good=[10]), keep=2, trust_writes=True)
        assert steps(chosen) == [20]
        assert chosen.stays[directory(10)] == "the newest that was read back"

    def test_the_best_evaluated_one_of_each_that_stays(self) -> None:
        """A run that is rewound to one of them has that one's best again."""
        best = {10: 10, 20: 10, 30: 30, 40: 30, 50: 30, 60: 60}
        lineage = lineage_of(began(1), *(commit(step, best_step=best[step]) for step in best), *verified(*best))
        assert steps(choose_retired(lineage, keep=1)) == [10, 20, 30, 40, 50], "60 is the best one itself"
        chosen = choose_retired(lineage, keep=2)
        assert steps(chosen) == [10, 20, 40]
        assert chosen.stays[directory(30)] == "the best evaluation, as of step 50"
        assert (
            directory(10)
            in choose_retired(lineage_of(began(1), *(commit(step, best_step=10) for step in best), *verified(*best)), keep=1).stays
        )

    def test_a_best_one_that_is_damaged_or_left_the_history_is_no_reason(self) -> None:
        commits = [commit(step, best_step=20) for step in STEPS[1:]]
        lineage = lineage_of(began(1), commit(10, best_step=10), *commits, *verified(*STEPS))
        assert lineage.best() == commits[0]
        assert fold(lineage, damaged(20)).best() == lineage.commits[0], "the best before it"
        back = fold(lineage, rewound(10))
        assert back.best() == back.commits[0], "as of step 10, step 10 was the best"
        assert directory(20) not in choose_retired(back, keep=1).stays

    def test_what_a_rewound_attempt_began_from_may_go(self) -> None:
        lineage = lineage_of(began(1), commit(10), commit(20), began(2, (20, 1)), commit(30, 2), rewound(10), *verified(10))
        chosen = choose_retired(lineage, keep=1)
        assert directory(20) in chosen.retire
        assert refusal(lineage, Retire(term=1, directories=chosen.retire)) == ""

    def test_fewer_than_one_cannot_be_kept(self) -> None:
        with pytest.raises(ValueError, match="keep = 0"):
            choose_retired(Lineage(), keep=0)


class TestRefusals:
    def test_the_log_itself_refuses_to_lose_the_last_verified_one(self) -> None:
        """Whoever chose on an older log than the one that it appends to."""
        retire = Retire(term=1, directories=(directory(10), directory(20)))
        assert refusal(four(good=[10, 20]), retire) == "it would retire the last verified checkpoint"
        assert refusal(four(damaged(40), good=[20, 40]), retire) == "it would retire the last verified checkpoint"
        assert not refusal(four(good=[]), retire)

    def test_the_log_refuses_to_lose_what_an_attempt_is_starting_from(self) -> None:
        lineage = four(pin(10), damaged(30), damaged(40), began(2, (20, 1)), good=[])
        retire = Retire(term=1, directories=(directory(20),))
        assert refusal(lineage, retire) == f"it would retire {directory(20)}, from which attempt 2 is starting"
        assert not refusal(fold(lineage, commit(30, 2)), retire)

    def test_the_log_refuses_to_lose_the_best_evaluated_one(self) -> None:
        lineage = lineage_of(began(1), *(commit(step, best_step=20) for step in STEPS), *verified(*STEPS))
        assert refusal(lineage, Retire(term=1, directories=(directory(20),))) == "it would retire the checkpoint with the best evaluation"
        assert not refusal(lineage, Retire(term=1, directories=(directory(10), directory(30))))


class TestGarbage:
    def test_what_older_attempts_left_uncommitted(self) -> None:
        found = [directory(10), directory(20), directory(30, 2), "data/other"]
        assert garbage(lineage_of(began(1), commit(10), began(2, (10, 1))), found) == (directory(20),)

    def test_what_the_newest_attempt_left_behind(self) -> None:
        lineage = lineage_of(began(1), commit(20))
        assert garbage(lineage, [directory(10), directory(20), directory(30)]) == (directory(10),)

    def test_all_that_a_rewound_attempt_left_uncommitted(self) -> None:
        lineage = lineage_of(began(1), commit(10), commit(30), rewound(10))
        assert garbage(lineage, map(directory, (10, 20, 30, 40))) == (directory(20), directory(40))

    def test_what_was_retired(self) -> None:
        lineage = four(Retire(term=1, directories=(directory(10),)))
        assert garbage(lineage, map(directory, STEPS)) == (directory(10),)

    def test_nothing_of_a_run_that_has_not_begun_or_of_an_attempt_that_the_log_does_not_know(self) -> None:
        assert garbage(Lineage(), [directory(10)]) == ()
        assert garbage(four(), [directory(10, 9)]) == ()


@dataclass
class History:
    """A random but sensible log, and the next records that could follow."""

    lineage: Lineage = field(default_factory=lineage_of)

    def play(self, data: st.DataObject) -> None:
        for kind in data.draw(st.lists(st.sampled_from("accccccvvvqpprw"), max_size=25), label="kinds"):
            self.add(self._record(kind, data))

    def add(self, record: Record | None) -> None:
        if record is not None:
            self.lineage = fold(self.lineage, record)

    def _record(self, kind: str, data: st.DataObject) -> Record | None:
        lineage, newest = self.lineage, self.lineage.newest_attempt()
        if kind == "a" or newest is None:
            usable = [None, *(c for c in lineage.commits if lineage.is_usable(c))]
            source = data.draw(st.sampled_from(usable), label="resumed from")
            return began((newest.attempt if newest else 0) + 1, (source.step, source.attempt) if source else None)
        if kind == "w":
            usable = [None, *(c for c in lineage.commits if lineage.is_usable(c))]
            target = data.draw(st.sampled_from(usable), label="rewound to")
            return Rewind(term=1, directory=target.directory if target else "", step=target.step if target else -1)
        if kind == "c":
            step = lineage.committed_step + data.draw(st.integers(1, 9), label="steps")
            before = lineage.commits[-1].best_step if lineage.commits else -1
            return commit(step, newest.attempt, step if data.draw(st.booleans(), label="is the best") else before)
        if not lineage.live:
            return None
        path = data.draw(st.sampled_from(lineage.live), label=kind).directory
        match kind:
            case "v":
                return Verified(term=1, directory=path)
            case "q":
                return Quarantine(term=1, directory=path, why="x")
            case "p":
                return Pin(term=1, directory=path)
            case _:
                return Retire(term=1, directories=(path,))


policies = st.fixed_dictionaries({"keep": st.integers(1, 4), "every": st.sampled_from([0, 0, 7, 20]), "trust_writes": st.booleans()})


def usable_verified(lineage: Lineage) -> set[str]:
    return {c.directory for c in lineage.commits if c.directory in lineage.verified - lineage.quarantined}


@given(data=st.data(), policy=policies)
def test_whatever_happened_retention_keeps_its_promises(data: st.DataObject, policy: dict[str, int]) -> None:
    history = History()
    history.play(data)
    before = history.lineage
    chosen = choose_retired(before, **policy)
    live = {c.directory for c in before.live}
    assert chosen.stays.keys() | set(chosen.retire) == live
    assert not chosen.stays.keys() & set(chosen.retire)
    assert not set(chosen.retire) & before.pinned, "pins survive"
    record = Retire(term=1, directories=chosen.retire)
    assert refusal(before, record) == "", "what it retires is never refused"
    after = fold(before, record)
    survivors = 1 if policy["trust_writes"] else policy["keep"]
    newest = sorted(usable_verified(before), key=lambda path: path.rpartition("/s")[2])[-survivors:]
    assert set(newest) <= usable_verified(after), "the newest verified ones survive"
    assert before.newest_committed() == after.newest_committed(), "nobody resumes from elsewhere"
    assert choose_retired(after, **policy).retire == (), "nothing more goes until something happens"
    bests = {path for path, why in chosen.stays.items() if why.startswith("the best")}
    for kept in after.commits:
        assert not after.is_usable(kept) or kept.directory in bests or after.best(kept) == before.best(kept), "nor their best ones"
    usable = [c for c in after.commits if c.directory not in after.pinned and after.is_usable(c) and c.directory not in bests]
    if usable_verified(before) and not policy["every"] and not policy["trust_writes"]:
        verified_steps = [c.step for c in after.commits if c.directory in usable_verified(after)]
        assert len([c for c in usable if c.step <= verified_steps[-1]]) <= policy["keep"], "and what stays is bounded"


@given(data=st.data())
def test_what_is_garbage_is_never_committed_afterwards(data: st.DataObject) -> None:
    history = History()
    history.play(data)
    everything = [directory(step, attempt) for attempt in range(1, 8) for step in range(120)]
    dead = set(garbage(history.lineage, everything))
    history.play(data)
    assert not dead & {c.directory for c in history.lineage.live}
    assert dead <= set(garbage(history.lineage, everything)), "also for a reader that has not read the newest records"
