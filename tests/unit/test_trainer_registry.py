"""The registry: every part back, or a refusal that names each difference, and nothing changed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.trainer.registry import PARTS, Part, Registry, StateMismatch

NAMES = ("progress", "spike", "scaler", "order")


class Box:
    """A value that a part captures and restores."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def set(self, value: Any) -> None:
        self.value = value


def part(name: str, box: Box, **options: Any) -> Part:
    return Part(name=name, capture=lambda: box.value, restore=box.set, **options)


def registry(parts: Sequence[Part], *, rank: int = 0, world_size: int = 1) -> Registry:
    made = Registry(rank=rank, world_size=world_size)
    made.add(*parts)
    return made


def states(*by_rank: dict[str, Any]) -> list[dict[str, Any]]:
    return [{PARTS: parts} for parts in by_rank]


def test_every_part_comes_back() -> None:
    first, second = Box({"step": 3}), Box([1.5, None])
    mine = registry([part("a", first), part("b", second)])
    saved = mine.state()
    first.value, second.value = None, None
    mine.restore([saved])
    assert (first.value, second.value) == ({"step": 3}, [1.5, None])


def test_parts_are_restored_in_the_order_in_which_they_were_added() -> None:
    order: list[str] = []
    parts = [Part(name=name, capture=lambda: 0, restore=lambda saved, name=name: order.append(name)) for name in ("b", "a", "c")]  # type: ignore[misc]
    registry(parts).restore(states({"a": 0, "b": 0, "c": 0}))
    assert order == ["b", "a", "c"]


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="a part named 'a' already"):
        registry([part("a", Box(0)), part("a", Box(1))])


def test_a_refusal_names_what_is_missing_what_is_extra_and_what_differs_and_how() -> None:
    boxes = [Box("mine") for _ in range(3)]
    mine = registry(
        [part("scaler", boxes[0]), part("spike", boxes[1]), part("rng.cuda", boxes[2], check=lambda saved: [f"{saved} devices, here 0"])]
    )
    with pytest.raises(StateMismatch) as caught:
        mine.restore(states({"rng.cuda": 8, "ema": 1, "queue": 2}))
    assert str(caught.value) == (
        "the checkpoint does not hold the state of this run: missing in it: scaler, spike; not known to this run: ema, queue; "
        "rng.cuda differs: 8 devices, here 0. Resume it with the version of keepstep, the script and the sections of run.toml that it was "
        "saved with; its tensors alone are had with `keepstep checkpoints export`"
    )
    assert (caught.value.missing, caught.value.extra) == (("scaler", "spike"), ("ema", "queue"))
    assert [box.value for box in boxes] == ["mine"] * 3


def test_a_part_of_another_shape_is_a_difference_like_any_other() -> None:
    def check(saved: Any) -> list[str]:
        return [] if saved["position"] == 3 else ["elsewhere"]

    with pytest.raises(StateMismatch, match=r"a differs: it holds what this version cannot read \(KeyError: 'position'\): \{\"turn\": 3\}"):
        registry([part("a", Box(0), check=check)]).restore(states({"a": {"turn": 3}}))


def test_a_state_without_parts_is_refused_as_a_whole() -> None:
    with pytest.raises(StateMismatch, match="missing in it: a, b"):
        registry([part("a", Box(0)), part("b", Box(0))]).restore([{"rng": {}, "step": 3}])


@given(here=st.sets(st.sampled_from(NAMES)), there=st.sets(st.sampled_from(NAMES)))
def test_all_parts_are_restored_or_none(here: set[str], there: set[str]) -> None:
    boxes = {name: Box("before") for name in here}
    mine = registry([part(name, box) for name, box in boxes.items()])
    saved = states(dict.fromkeys(there, "saved"))
    if here == there:
        mine.restore(saved)
    else:
        with pytest.raises(StateMismatch) as caught:
            mine.restore(saved)
        assert (set(caught.value.missing), set(caught.value.extra)) == (here - there, there - here)
    assert {box.value for box in boxes.values()} <= {"saved" if here == there else "before"}


class TestAtTheSameWorldSize:
    def test_a_rank_takes_its_own(self) -> None:
        boxes = [Box(None), Box(None)]
        for rank, box in enumerate(boxes):
            registry([part("loss", box), part("seed", Box(0), per_rank=True)], rank=rank, world_size=2).restore(
                states({"loss": "x", "seed": 1}, {"loss": "y", "seed": 2})
            )
        assert [box.value for box in boxes] == ["x", "y"]

    def test_what_other_ranks_had_saved_is_no_concern(self) -> None:
        box = Box(None)
        registry([part("a", box)], rank=1, world_size=2).restore(states({"b": 1}, {"a": 2}))
        assert box.value == 2


class TestAtAnotherWorldSize:
    def test_what_all_ranks_have_alike_is_taken_from_the_first(self) -> None:
        box = Box(None)
        registry([part("step", box)], rank=2, world_size=3).restore(states({"step": 7}, {"step": 7}))
        assert box.value == 7

    def test_ranks_that_disagree_are_named(self) -> None:
        box = Box("before")
        with pytest.raises(StateMismatch, match="step differs: rank 0 had saved 7, rank 1 8, so 3 ranks cannot go on from one of them"):
            registry([part("step", box)], world_size=3).restore(states({"step": 7}, {"step": 8}))
        assert box.value == "before"

    def test_a_part_per_rank_is_made_anew_from_those_of_all_ranks_and_the_log_says_so_once(self, caplog: pytest.LogCaptureFixture) -> None:
        seen: list[Any] = []

        def anew(saved: Sequence[Any]) -> str:
            seen.append(list(saved))
            return "streams follow from (seed, step, rank)"

        boxes = [Box("untouched"), Box("untouched")]
        parts = [part(name, box, per_rank=True, elsewhere=anew) for name, box in zip("ab", boxes, strict=True)]
        with caplog.at_level(logging.INFO, logger="keepstep.trainer"):
            registry(parts, world_size=3).restore(states({"a": 1, "b": 3}, {"a": 2, "b": 4}))
        assert seen == [[1, 2], [3, 4]]
        assert [box.value for box in boxes] == ["untouched", "untouched"]
        assert caplog.messages == ["saved by 2 ranks, resumed by 3: streams follow from (seed, step, rank)"]

    def test_a_part_per_rank_that_nobody_can_make_anew_is_refused(self) -> None:
        with pytest.raises(StateMismatch, match="loader differs: every rank has its own, so what 2 ranks had saved is nothing for 1"):
            registry([part("loader", Box(0), per_rank=True)]).restore(states({"loader": 1}, {"loader": 2}))

    def test_a_part_that_one_rank_lacks_is_missing(self) -> None:
        with pytest.raises(StateMismatch, match="missing in it: a"):
            registry([part("a", Box(0))], world_size=3).restore(states({"a": 1}, {}))
