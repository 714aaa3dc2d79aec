"""What is found in a step's figures, who is to blame, and how it is told: without ranks."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.storage.skips import ranges, union
from keepstep.trainer.autopsy import Autopsy, Sample, Witness, come_again, conclude, to_blame
from keepstep.trainer.config import SpikeSection
from keepstep.trainer.contract import BAD_STEP_KIND
from keepstep.trainer.data import Feed
from keepstep.trainer.guard import BadStep, advice, describe, find, rejected
from keepstep.trainer.order import Order
from keepstep.trainer.spikes import Finding, NonFinite, Spike, Window

LIMITS = SpikeSection(gradient_factor=10)
NAMES = ("tokens.weight", "blocks.0.mlp.up.weight", "norm.weight")
NAN_LOSS: Finding = NonFinite("loss", math.nan, (1,))
NAN_GRADIENT: Finding = NonFinite("gradient", math.inf, ())
SPIKE: Finding = Spike("loss", 5.0, 1.0, 3.0)
STEEP: Finding = Spike("gradient", 50.0, 1.0, 10.0)


def agreed(loss: float = 1.0, norm: float = 1.0, losses: tuple[float, ...] = (1, 1), squares: tuple[float, ...] = (1, 1)) -> Any:
    return SimpleNamespace(loss=loss, grad_norm=norm, losses=losses, gradient_squares=squares)


def sample(position: int, loss: float = 1.0, gradient: float = 1.0, rank: int = 0) -> Sample:
    return Sample(position, rank, loss, gradient)


def heard(*samples: Sample, module: str = "", order: int = 0, parameters: tuple[str, ...] = (), gradients: tuple[str, ...] = ()) -> Witness:
    return Witness(list(samples), module, order, list(parameters), list(gradients))


class TestFind:
    def test_a_healthy_step_is_not_found(self) -> None:
        assert find(Window(64, [(1.0, 1.0)] * 64), agreed(), LIMITS) is None

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_loss_that_is_not_finite_is_told_with_its_ranks_and_before_the_gradient(self, value: float) -> None:
        found = find(Window(64), agreed(math.nan, math.nan, (1.0, value, value), (math.nan,) * 3), LIMITS)
        assert isinstance(found, NonFinite)
        assert (found.what, found.ranks) == ("loss", (1, 2))
        assert str(found.value) == str(value)

    def test_a_gradient_that_is_not_finite_is_nobodys_in_particular(self) -> None:
        found = find(Window(64), agreed(1.0, math.nan, (1.0, 1.0), (math.inf, math.inf)), LIMITS)
        assert found == NonFinite("gradient", math.inf, ())

    def test_sums_that_are_finite_while_their_sum_is_not(self) -> None:
        found = find(Window(64), agreed(math.nan, 1.0, (1e308, 1e308)), LIMITS)
        assert isinstance(found, NonFinite)
        assert found.ranks == ()

    def test_a_spike_is_judged_by_the_window(self) -> None:
        window = Window(64, [(1.0, 1.0)] * 64)
        assert find(window, agreed(loss=9.0), LIMITS) == Spike("loss", 9.0, 1.0, 2.5)
        assert find(window, agreed(norm=11.0), LIMITS) == Spike("gradient", 11.0, 1.0, 10.0)


class TestBlame:
    @pytest.mark.parametrize(
        ("finding", "bad"),
        [
            (NAN_LOSS, sample(7, loss=math.nan)),
            (NAN_LOSS, sample(7, loss=math.inf)),
            (NAN_GRADIENT, sample(7, gradient=math.nan)),
            (SPIKE, sample(7, loss=3.1)),
            (SPIKE, sample(7, loss=math.nan)),
            (STEEP, sample(7, gradient=11)),
        ],
    )
    def test_the_one_that_shows_it_alone_is_to_blame(self, finding: Finding, bad: Sample) -> None:
        assert to_blame([sample(5), sample(6), bad, sample(8)], finding, LIMITS) == [bad]

    @pytest.mark.parametrize("finding", [NAN_LOSS, NAN_GRADIENT, SPIKE, STEEP])
    def test_where_none_or_each_shows_it_nobody_alone_is(self, finding: Finding) -> None:
        assert to_blame([sample(5), sample(6)], finding, LIMITS) == []
        assert to_blame([sample(i, loss=math.nan, gradient=math.nan) for i in range(3)], finding, LIMITS) == []

    def test_the_only_sample_of_a_step_is_to_blame(self) -> None:
        alone = sample(7, loss=math.nan, gradient=math.nan)
        assert to_blame([alone], NAN_LOSS, LIMITS) == to_blame([alone], NAN_GRADIENT, LIMITS) == [alone]

    def test_gradients_too_small_to_be_compared_blame_nobody(self) -> None:
        assert to_blame([sample(5, gradient=0), sample(6, gradient=0), sample(7, gradient=1e-30)], STEEP, LIMITS) == []

    @given(losses=st.lists(st.floats(0, 20, width=32), min_size=1, max_size=40), bound=st.floats(0, 20, width=32))
    def test_of_a_spike_each_one_beyond_the_bound_is(self, losses: list[float], bound: float) -> None:
        samples = [sample(i, loss=loss) for i, loss in enumerate(losses)]
        blamed = to_blame(samples, Spike("loss", 21.0, 0.0, bound), LIMITS)
        assert blamed in ([s for s in samples if s.loss >= bound], [])
        assert blamed or all(s.loss >= bound for s in samples) or all(s.loss < bound for s in samples)

    def test_the_first_module_of_all_ranks_counts_and_the_worst_sample_comes_first(self) -> None:
        said = [
            heard(sample(1, 9.0), sample(2, 1.0), module="norm", order=30),
            heard(sample(3, 4.0, rank=1), sample(4, math.inf, rank=1), module="blocks.0", order=12),
        ]
        found = conclude(said, SPIKE, LIMITS, NAMES)
        assert found.module == "blocks.0"
        assert [s.position for s in found.samples] == [4, 1, 3]
        assert found.positions == (1, 2, 3, 4)

    def test_where_no_activation_shows_it_the_last_parameter_of_the_forward_pass_does(self) -> None:
        said = [heard(sample(1), gradients=("tokens.weight",)), heard(sample(2), gradients=("blocks.0.mlp.up.weight",))]
        assert conclude(said, NAN_GRADIENT, LIMITS, NAMES).module == "blocks.0.mlp.up"

    def test_a_parameter_that_was_broken_before_leaves_nothing_to_skip(self) -> None:
        found = conclude([heard(sample(1, math.nan), sample(2), parameters=("norm.weight",))], NAN_LOSS, LIMITS, NAMES)
        assert (found.bad_parameter, found.skips("samples"), found.skips("batch")) == ("norm.weight", (), ())


class TestSkips:
    def autopsy(self, *blamed: int, positions: tuple[int, ...] = (4, 5, 6, 7, 9)) -> Autopsy:
        return Autopsy(samples=tuple(map(sample, blamed)), module="", positions=positions, bad_parameter="")

    def test_samples_or_the_batch_as_people_want_it(self) -> None:
        assert self.autopsy(9, 5, 6).skips("samples") == ("5:7", "9:10")
        assert self.autopsy(9, 5, 6).skips("batch") == ("4:8", "9:10")

    def test_the_batch_where_nobody_is_to_blame(self) -> None:
        assert self.autopsy().skips("samples") == ("4:8", "9:10")

    @given(st.sets(st.integers(0, 60), min_size=1), st.sampled_from(["samples", "batch"]))
    def test_they_cover_those_positions_and_no_others(self, positions: set[int], how: str) -> None:
        skips = self.autopsy(*positions, positions=tuple(sorted(positions))).skips(how)
        assert {p for first, last in ranges(skips) for p in range(first, last)} == positions


class TestSentence:
    @pytest.mark.parametrize(
        ("finding", "blamed", "module", "sentence"),
        [
            (NAN_LOSS, (9,), "blocks.0", "step 3: the loss of rank 1 is nan; first in blocks.0; samples 9:10 ('abc')"),
            (NAN_GRADIENT, (9,), "norm", "step 3: the gradient of rank 1 is inf; first in the backward pass of norm; samples 9:10 ('abc')"),
            (SPIKE, (5, 9), "", "step 3: the loss is 5, beyond 3 (median of the recent steps 1); samples 5:6, 9:10 of rank 1 ('abc')"),
            (
                SPIKE,
                (),
                "",
                "step 3: the loss is 5, beyond 3 (median of the recent steps 1); no sample alone is to blame, so all of them are: 4:7",
            ),
        ],
    )
    def test_says_what_where_and_who(self, finding: Finding, blamed: tuple[int, ...], module: str, sentence: str) -> None:
        autopsy = Autopsy(samples=tuple(map(sample, blamed)), module=module, positions=(4, 5, 6), bad_parameter="")
        skips = autopsy.skips("samples")
        assert describe(3, finding, autopsy, (1,) if blamed else (), skips, "'abc'") == sentence

    def test_many_ranges_are_counted(self) -> None:
        autopsy = Autopsy(samples=tuple(map(sample, range(0, 100, 2))), module="", positions=tuple(range(100)), bad_parameter="")
        sentence = describe(3, SPIKE, autopsy, tuple(range(9)), autopsy.skips("samples"), "''")
        assert sentence.endswith("samples 0:1, 2:3, 4:5 and 47 more of ranks 0, 1, 2 and 6 more ('')")

    def test_the_advice_is_a_line_of_run_toml(self) -> None:
        assert advice(("5:7", "9:10")) == '; to train without them, add [data] skip = ["5:7", "9:10"] to run.toml'
        assert advice(()) == ""

    def test_what_is_recorded_is_json_without_nan(self) -> None:
        import json

        autopsy = Autopsy(samples=(sample(9, math.nan),), module="norm", positions=(9,), bad_parameter="")
        line = rejected(3, NAN_LOSS, autopsy, (1,), ("9:10",), "step 3: ...")
        assert json.loads(json.dumps(line, allow_nan=False)) == {
            "step": 3,
            "what": "loss",
            "value": None,
            "median": None,
            "bound": None,
            "ranks": [1],
            "module": "norm",
            "samples": [{"position": 9, "rank": 0, "loss": None}],
            "skips": ["9:10"],
            "why": "step 3: ...",
        }

    def test_the_exception_carries_what_the_agent_reads(self) -> None:
        error = BadStep("step 3: ...", step=3, skips=("9:10",), ranks=(1,))
        assert isinstance(error, ArithmeticError)
        assert (error.kind, error.step, error.skips, error.ranks, str(error)) == (BAD_STEP_KIND, 3, ("9:10",), (1,), "step 3: ...")


class TestComeAgain:
    @given(
        seed=st.integers(0, 100),
        size=st.integers(3, 40),
        step=st.integers(1, 12),
        kind=st.sampled_from(["shuffled", "blocks"]),
        draw_skips=st.sampled_from([(), ((118, 125),), ((121, 122), (124, 130))]),
    )
    def test_a_sample_that_was_left_out_is_not_met_again_in_any_epoch(
        self, seed: int, size: int, step: int, kind: Any, draw_skips: tuple[tuple[int, int], ...]
    ) -> None:
        order = Order(seed=seed, sizes=(size,), kind=kind, block_samples=4)
        steps, feed = 30, Feed(order=order, samples_per_step=4, skips=draw_skips)
        blamed = list(range(*feed.positions(step)))[:2]
        bad = feed.samples(*(turn := feed.turns(step)[0], turn + 2)).tolist()
        again = come_again(feed, blamed, steps)
        mended = Feed(
            order=feed.order,
            samples_per_step=4,
            skips=ranges(union(f"{p}:{p + 1}" for p in (*blamed, *again, *(q for skip in draw_skips for q in range(*skip))))),
        )
        assert not {*bad} & {*mended.samples(mended.turns(step)[0], mended.turns(steps)[1]).tolist()}
        assert not {*again} & {*blamed}
        assert not again or max(again) < mended.end(steps) + 1

    def test_what_is_left_out_behind_the_end_already_moves_it_as_well(self) -> None:
        feed = Feed(order=Order(seed=0, sizes=(10,), kind="sequential"), samples_per_step=5, skips=((20, 23),))
        assert come_again(feed, [3], 4) == (13, 23)

    def test_a_small_source_that_repeats_within_a_step_is_counted_once(self) -> None:
        feed = Feed(order=Order(seed=0, sizes=(5,), kind="sequential"), samples_per_step=10)
        assert come_again(feed, [1, 6], 2) == (11, 16, 21)

    def test_it_is_said_how_often_they_would_have_come_again(self) -> None:
        autopsy = Autopsy(samples=(sample(9, math.nan),), module="norm", positions=(8, 9), bad_parameter="", later=(19, 29))
        assert (autopsy.here("samples"), autopsy.skips("samples"), autopsy.skips("batch")) == (
            ("9:10",),
            ("9:10", "19:20", "29:30"),
            ("8:10",),
        )
        sentence = describe(3, NAN_LOSS, autopsy, (1,), autopsy.here("samples"), "'x'")
        assert sentence == "step 3: the loss of rank 1 is nan; first in norm; samples 9:10 ('x'), which come again 2 times"
