"""What rank 0 makes of the lengths of its steps, beside saves and without."""

from __future__ import annotations

import mmap

import pytest

from keepstep.trainer.contract import PROGRESS_BYTES, Pacing, Phase, Progress, Request, SaveCosts, read_marks
from keepstep.trainer.costs import Costs


class Training:
    """Steps and saves in virtual time."""

    def __init__(self) -> None:
        self.costs = Costs()
        self.now = 100.0
        self.known: SaveCosts | None = None

    def steps(self, *seconds: float, writing: bool = False) -> Training:
        for each in seconds:
            self.now += each
            self.known = self.costs.stepped(each, self.now, writing=writing) or self.known
        return self

    def save(self, stall_s: float) -> Training:
        self.now += stall_s
        self.costs.saved(self.now, stall_s)
        return self


def test_the_drag_is_what_disturbed_steps_take_longer_together() -> None:
    training = Training().steps(0.5, 0.5, 0.5, 0.5).save(0.125).steps(0.75, 0.625, writing=True).steps(0.5)
    assert training.known == SaveCosts(step_s=0.5, stall_s=0.125, drag_s=0.375, persist_s=1.875)
    assert training.known.cost_s == 0.5


def test_nothing_is_known_before_a_save_was_written_and_a_few_steps_were_not_disturbed() -> None:
    training = Training().steps(9.0).save(0.125).steps(0.5, writing=True)
    assert training.known is None
    assert training.steps(0.5).known is None
    assert training.steps(0.5, 0.5).known is None
    assert training.steps(0.5).known == SaveCosts(step_s=0.5, stall_s=0.125, drag_s=0.0, persist_s=1.0)


def test_one_save_that_the_machine_held_up_is_nobodys_cost() -> None:
    training = Training().steps(*[0.5] * 8)
    for stall_s, beside_s in [(0.125, 0.625), (4.0, 30.0), (0.125, 0.625)]:
        training.save(stall_s).steps(beside_s)
    assert training.known == SaveCosts(step_s=0.5, stall_s=0.125, drag_s=0.125, persist_s=0.625)


def test_faster_steps_beside_a_save_are_no_gain() -> None:
    training = Training().steps(*[0.5] * 4).save(0.125).steps(0.25)
    assert training.known
    assert training.known.drag_s == 0.0


@pytest.fixture
def page() -> mmap.mmap:
    return mmap.mmap(-1, PROGRESS_BYTES)


def test_an_empty_page_says_nothing(page: mmap.mmap) -> None:
    assert (Pacing.read(page), SaveCosts.read(page)) == (Pacing(), None)


def test_the_page_keeps_its_parts_apart(page: mmap.mmap) -> None:
    costs = SaveCosts(step_s=0.125, stall_s=0.25, drag_s=0.5, persist_s=1.0)
    first = Progress(Phase.STEP, Request.SAVE, 7, beats=8, at=9.0)
    page[: len(first.to_bytes())] = first.to_bytes()
    Pacing(84, soon=False).write(page)
    costs.write(page)
    assert (Progress.read(page), Pacing.read(page), SaveCosts.read(page)) == (first, Pacing(84, soon=False), costs)
    assert not any(read_marks(page))
