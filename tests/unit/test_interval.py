"""How often to save: what the interval follows from, in which direction, and within which bounds."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from keepstep.orchestrator.interval import MAX_S, MIN_S, PRIOR_S, Exposure, History, Interval, Pace, best_seconds, decide
from keepstep.trainer.contract import SaveCosts

SECONDS = st.floats(0, 1e7)
COSTS = st.builds(SaveCosts, step_s=st.floats(1e-4, 1e4), stall_s=st.floats(0, 1e4), drag_s=st.floats(0, 1e4), persist_s=st.floats(0, 1e4))
EXPOSURES = st.builds(Exposure, st.lists(SECONDS, max_size=16).map(tuple), SECONDS)
HISTORIES = st.builds(History, process=EXPOSURES, node=EXPOSURES)
SIZES = st.integers(1, 100_000)
SHARES = st.floats(1e-3, 0.999)
TOY = SaveCosts(step_s=0.25, stall_s=0.05, drag_s=0.01, persist_s=0.5)
HOUR = 3600.0


def decided(costs: SaveCosts, history: History, *, ranks: int = 4, nodes: int = 2, share: float = 0.05) -> Interval:
    return decide(costs, history, ranks=ranks, nodes=nodes, max_share=share)


class TestBounds:
    @given(COSTS, HISTORIES, SIZES, SIZES, SHARES)
    def test_it_is_a_whole_number_of_steps_and_a_sentence(
        self, costs: SaveCosts, history: History, ranks: int, nodes: int, share: float
    ) -> None:
        found = decided(costs, history, ranks=ranks, nodes=nodes, share=share)
        assert found.steps >= 1
        assert math.isfinite(found.seconds)
        assert "nan" not in found.why

    @given(COSTS, HISTORIES, SHARES)
    def test_it_is_never_shorter_than_a_save_takes_nor_than_saves_may_cost(self, costs: SaveCosts, history: History, share: float) -> None:
        seconds = decided(costs, history, share=share).seconds * (1 + 1e-9)
        assert seconds >= max(costs.persist_s, MIN_S)
        assert costs.cost_s <= share * (seconds + costs.cost_s) * (1 + 1e-9)

    @given(COSTS, HISTORIES)
    def test_it_is_longer_than_the_longest_only_where_it_must(self, costs: SaveCosts, history: History) -> None:
        must_s = max(MAX_S, costs.persist_s, costs.cost_s * 19)
        assert decided(costs, history).seconds <= must_s + costs.step_s * (1 + 1e-9)


class TestDirections:
    @given(COSTS, st.floats(0, 1e4), HISTORIES)
    def test_costlier_saves_are_rarer(self, costs: SaveCosts, more_s: float, history: History) -> None:
        assert decided(replace(costs, stall_s=costs.stall_s + more_s), history).steps >= decided(costs, history).steps
        assert decided(replace(costs, drag_s=costs.drag_s + more_s), history).steps >= decided(costs, history).steps

    @given(COSTS, HISTORIES, st.sampled_from(["process", "node"]))
    def test_a_failure_makes_it_shorter(self, costs: SaveCosts, history: History, kind: str) -> None:
        assert decided(costs, history.failed(kind)).steps <= decided(costs, history).steps  # type: ignore[arg-type]

    @given(COSTS, HISTORIES, SECONDS)
    def test_quiet_time_makes_it_longer(self, costs: SaveCosts, history: History, quiet_s: float) -> None:
        assert decided(costs, history.lived(quiet_s, ranks=4, nodes=2)).steps >= decided(costs, history).steps

    @given(COSTS, HISTORIES, SIZES, SIZES)
    def test_more_nodes_and_ranks_fail_more_often(self, costs: SaveCosts, history: History, more_ranks: int, more_nodes: int) -> None:
        large = decided(costs, history, ranks=4 + more_ranks, nodes=2 + more_nodes)
        assert large.steps <= decided(costs, history).steps


class TestTheEstimate:
    def test_before_anything_happened_a_failure_is_expected_within_minutes(self) -> None:
        assert History().mtbf_s(ranks=4, nodes=2) == 2 * PRIOR_S

    def test_with_time_the_run_speaks_for_itself(self) -> None:
        history = History().lived(100 * HOUR, ranks=4, nodes=2)
        assert history.mtbf_s(ranks=4, nodes=2) == pytest.approx(200 * HOUR, rel=0.001)
        for _ in range(9):
            history = history.lived(100 * HOUR, ranks=4, nodes=2).failed("process")
        assert history.mtbf_s(ranks=4, nodes=2) == pytest.approx(1000 / 9.5 * HOUR, rel=0.001)

    def test_failures_of_nodes_come_with_nodes_and_those_of_processes_with_ranks(self) -> None:
        quiet = History().lived(1000 * HOUR, ranks=8, nodes=2)
        of_nodes = quiet.failed("node").failed("node").failed("node").failed("node")
        usual = of_nodes.mtbf_s(ranks=8, nodes=2)
        assert usual / of_nodes.mtbf_s(ranks=8, nodes=4) == pytest.approx(8.75 / 4.5, rel=0.001)
        assert usual / of_nodes.mtbf_s(ranks=16, nodes=2) == pytest.approx(4.75 / 4.5, rel=0.001)

    def test_what_is_long_past_does_not_count(self) -> None:
        history = History().lived(1000 * HOUR, ranks=4, nodes=2)
        for _ in range(17):
            history = history.lived(60.0, ranks=4, nodes=2).failed("process")
        assert history.mtbf_s(ranks=4, nodes=2) < 70.0

    @given(st.floats(1e-3, 1e3), st.floats(1, 1e6))
    def test_no_other_interval_loses_less(self, cost_s: float, mtbf_s: float) -> None:
        """Against Daly's complete model, with failures at any moment and a restart that costs nothing."""
        assume(cost_s < mtbf_s / 10)
        best_s = best_seconds(cost_s, mtbf_s)

        def wall_s(interval_s: float) -> float:
            return mtbf_s * math.expm1((interval_s + cost_s) / mtbf_s) / interval_s

        assert wall_s(best_s) <= min(wall_s(best_s * factor) for factor in (0.5, 0.8, 1.25, 2)) * (1 + 1e-9)


class TestTheSentence:
    def test_it_has_the_numbers(self) -> None:
        history = History().lived(1440.0, ranks=4, nodes=2).failed("process").failed("node")
        found = decided(TOY, history)
        assert found.why == f"checkpoint every {found.steps} steps ({found.seconds:.1f} s): a save costs 0.06 s, 2 failures in 0.4 h"

    def test_one_and_none(self) -> None:
        assert decided(TOY, History()).why.endswith(": a save costs 0.06 s, no failures in 0 h")
        one = decided(replace(TOY, step_s=1000.0), History().lived(HOUR, ranks=4, nodes=2).failed("node"))
        assert one.why == "checkpoint every step (1000.0 s): a save costs 0.06 s, 1 failure in 1 h"

    def test_small_changes_are_no_news(self) -> None:
        assert not decided(TOY, History()).is_news(decided(TOY, History()).steps)
        assert replace(decided(TOY, History()), steps=2).is_news(1)
        assert not replace(decided(TOY, History()), steps=125).is_news(100)
        assert replace(decided(TOY, History()), steps=79).is_news(100)


class TestPace:
    @pytest.mark.parametrize(("gained", "soon"), [(0, True), (83, True), (84, False), (900, False)])
    def test_an_attempt_that_failed_early_is_followed_by_one_that_saves_at_once(self, gained: int, soon: bool) -> None:
        pace = Pace(steps=84, soon=False, age_s=10.0).ended("process", ranks=4, nodes=2, gained=gained)
        assert (pace.soon, pace.age_s, pace.history.process) == (soon, 0.0, Exposure((40.0,), 0.0))

    def test_an_attempt_that_left_in_order_changes_nothing_but_the_time(self) -> None:
        pace = Pace(steps=84, soon=False, age_s=10.0).ended(None, ranks=4, nodes=2, gained=0)
        assert (pace.soon, pace.history) == (False, History().lived(10.0, ranks=4, nodes=2))

    @given(HISTORIES, st.none() | COSTS, st.booleans())
    def test_a_successor_knows_it(self, history: History, costs: SaveCosts | None, soon: bool) -> None:
        rounded = [Exposure(tuple(round(gap, 1) for gap in each.gaps), round(each.since, 1)) for each in (history.process, history.node)]
        known = Pace(history=History(process=rounded[0], node=rounded[1]), costs=costs, soon=soon)
        kept = json.loads(json.dumps(replace(known, age_s=5.0, steps=7).kept()))
        assert Pace.restored(kept) == known

    def test_nothing_is_kept_of_nothing(self) -> None:
        assert Pace().kept() == {}
        assert Pace.restored({}) == Pace()
