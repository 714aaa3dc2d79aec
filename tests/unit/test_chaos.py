"""Chaos, the pure parts: plans are checked and drawn, and code decides whether what was said about a fault is right."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.orchestrator import faultplan, faultverdict
from keepstep.orchestrator.errors import InputError
from keepstep.orchestrator.faultkinds import KINDS, AtStep, Fault, expected
from keepstep.orchestrator.faultverdict import Episode, History
from keepstep.orchestrator.sections import ClusterSection, RunConfig
from keepstep.storage.faults import ACTIONS as FAULT_POINT_ACTIONS

CONFIG = RunConfig(cluster=ClusterSection(nodes=2, ranks_per_node=2, spares=1))


def problems(text: str, config: RunConfig = CONFIG) -> list[str]:
    """What is wrong with a plan, without the file's name."""
    with pytest.raises(InputError) as found:
        faultplan.draw(faultplan.parse(text, "plan.toml"), config, "plan.toml")
    return [problem.removeprefix("plan.toml: ") for problem in found.value.problems]


def one_fault(lines: str) -> str:
    return f'run = "run.toml"\n[[faults]]\n{lines}\n'


def drawn(seed: int, weights: str = "kill-rank = 3\nkill-node = 1", count: int = 12) -> tuple[Fault, ...]:
    text = f'seed = {seed}\nrun = "run.toml"\n[draw]\ncount = {count}\n[draw.weights]\n{weights}\n'
    return faultplan.draw(faultplan.parse(text, "plan.toml"), CONFIG, "plan.toml")


class TestPlans:
    @pytest.mark.parametrize(
        ("lines", "problem"),
        [
            ('fault = "kill-rnak"\nat_step = 5', 'faults[0].fault: "kill-rnak" is not a fault; did you mean kill-rank?'),
            ('fault = "kill-rank"\nat_stpe = 5', "faults[0].at_stpe is not a key; did you mean at_step?"),
            ('fault = "kill-rank"\nat_step = 0', "faults[0].at_step = 0 must be greater than or equal to 1"),
            ('fault = "kill-rank"', "faults[0] needs either at_step or after_s"),
            ('fault = "kill-rank"\nat_step = 5\nafter_s = 2', "faults[0] needs either at_step or after_s"),
            ("at_step = 5", "faults[0].fault is missing: What is done; one of the known kinds."),
            ('fault = "stop-node"\nat_step = 5', "faults[0].lasting_s is missing: stop-node has to end"),
            ('fault = "kill-rank"\nat_step = 5\nlasting_s = 2', "faults[0].lasting_s = 2 must go: kill-rank happens in an instant"),
            ('fault = "cut"\nat_step = 5\nlasting_s = 9', 'faults[0].fault: "cut" needs hosts with a network of their own'),
            ('fault = "kill-rank"\nat_step = 999', "faults[0].at_step = 999 must be below run.steps = "),
            ('fault = "kill-rank"\nat_step = 5\nrank = 4', "faults[0].rank = 4 must be one of the 4 ranks, counted from 0"),
            ('fault = "kill-node"\nat_step = 5\nnode = "node7"', 'faults[0].node: "node7" is not a node; did you mean '),
        ],
    )
    def test_a_wrong_key_is_named_with_its_remedy(self, lines: str, problem: str) -> None:
        assert problems(one_fault(lines))[0].startswith(problem)

    def test_a_plan_that_breaks_nothing_is_refused(self) -> None:
        assert problems('run = "run.toml"') == ["there is nothing to break: give [[faults]], or [draw] with count and weights"]

    def test_unknown_keys_outside_the_faults_are_refused_too(self) -> None:
        assert problems('run = "run.toml"\nsede = 1') == ["sede is not a key; did you mean seed?"]

    def test_a_script_has_no_fault_points(self) -> None:
        script = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"script": "mine.py"})})
        text = one_fault('fault = "raise-rank"\nat_step = 5')
        assert problems(text, script) == ["raise-rank needs keepstep's own trainer: mine.py has no fault points"]

    def test_every_action_of_a_kind_is_one_of_the_fault_points(self) -> None:
        assert {kind.action for kind in KINDS.values() if kind.action} <= FAULT_POINT_ACTIONS.keys()

    def test_the_same_seed_draws_the_same_plan_everywhere(self) -> None:
        first, *_ = drawn(7)
        assert (str(first), str(first.moment)) == FIRST_OF_SEED_7
        assert drawn(7) == drawn(7) != drawn(8)

    @given(st.integers(0, 1000))
    def test_what_is_drawn_is_spread_over_the_run_and_hits_ranks_that_exist(self, seed: int) -> None:
        steps = [fault.moment.step for fault in drawn(seed) if isinstance(fault.moment, AtStep)]
        assert steps == sorted(steps)
        assert 0.1 * CONFIG.run.steps < steps[0] < steps[-1] < 0.9 * CONFIG.run.steps
        assert {fault.rank for fault in drawn(seed)} <= {0, 1, 2, 3}

    def test_weights_say_how_often(self) -> None:
        kinds = [fault.kind.name for seed in range(40) for fault in drawn(seed)]
        assert 0.6 < kinds.count("kill-rank") / len(kinds) < 0.9

    def test_what_must_end_gets_a_duration_when_it_is_drawn(self) -> None:
        assert all(fault.lasting_s and 1 <= fault.lasting_s <= 10 for fault in drawn(1, "stop-node = 1\nstore-away = 1"))


FIRST_OF_SEED_7 = ("kill-rank 2", "step 39")


def episode(name: str = "kill-rank", *, at_s: float = 10.0, attempt: int = 1, lasting_s: float | None = None) -> Episode:
    fault = Fault(kind=KINDS[name], moment=AtStep(5), rank=2, lasting_s=lasting_s)
    wanted = expected(fault, lease_s=5)
    return Episode(fault=fault, expected=wanted, node="node1#aa", rank=2, pids=(7,), attempt=attempt, step=5, at_s=at_s)


def event(kind: str, at_s: float, **facts: Any) -> dict[str, Any]:
    return {"kind": kind, "at_s": at_s, "why": "", "attempt": 1, "node": "", "rank": -1, "step": -1, "cause": "", **facts}


def failure(at_s: float, cause: str = "signal", why: str = "rank 2 on node1#aa was killed by SIGKILL", **facts: Any) -> dict[str, Any]:
    return event("failure", at_s, **({"cause": cause, "why": why, "node": "node1#aa", "rank": 2} | facts))


def recovery(at_s: float, *said: dict[str, Any]) -> list[dict[str, Any]]:
    """Noticed 0.1 s after `at_s`, training again after 1 s."""
    return [event("draining", at_s + 0.1), *said, event("training", at_s + 1.0, attempt=2), event("progress", at_s + 1.2, step=4)]


class TestVerdicts:
    def test_the_right_culprit_is_right_and_timed_from_the_fault(self) -> None:
        (judged,) = faultverdict.judge([episode()], recovery(10.0, failure(10.2)))
        assert judged.wrong == ""
        assert (judged.noticed_s, judged.stepped_s) == (pytest.approx(0.1), pytest.approx(1.0))
        assert judged.said == "rank 2 on node1#aa was killed by SIGKILL"

    @pytest.mark.parametrize(
        ("said", "wrong"),
        [
            (failure(10.2, rank=1), "rank 2 was hit, not 1"),
            (failure(10.2, node="node0#bb"), "node1#aa was hit, not node0#bb"),
            (failure(10.2, cause="stall"), "the cause should have been signal, not stall"),
            (failure(10.2, why="rank 2 died"), "the sentence should name SIGKILL"),
            (event("moved", 10.2), "nobody noticed it"),
        ],
    )
    def test_a_wrong_culprit_is_wrong(self, said: dict[str, Any], wrong: str) -> None:
        (judged,) = faultverdict.judge([episode()], recovery(10.0, said))
        assert judged.wrong == wrong

    def test_a_further_failure_is_a_false_alarm_unless_it_follows_from_the_fault(self) -> None:
        further = failure(11.5, cause="persister", why="the persister is gone")
        damaged = failure(11.5, cause="damaged-checkpoint", rank=0, node="node0#bb")
        judged = faultverdict.judge([episode()], recovery(10.0, failure(10.2), further))
        assert judged[0].wrong == "a failure that nobody inflicted: the persister is gone"
        assert faultverdict.false_alarms(judged, [failure(3.0, why="too early"), further]) == ["too early", "the persister is gone"]
        lost = failure(10.2, cause="lost", why="lost node1#aa", rank=-1)
        (read,) = faultverdict.judge([episode("damage-checkpoint")], recovery(10.0, lost, damaged))
        assert read.wrong == ""

    def test_what_happens_belongs_to_the_fault_before_it(self) -> None:
        events = [*recovery(10.0, failure(10.2)), *recovery(20.0, failure(20.3))]
        first, second = faultverdict.judge([episode(), episode(at_s=20.0, attempt=2)], events)
        assert (first.wrong, second.wrong) == ("", "")
        assert second.stepped_s == pytest.approx(1.0)

    def test_a_short_stop_may_pass_unnoticed_and_a_long_one_may_not(self) -> None:
        steps_on = [event("progress", 10.1, step=6), event("progress", 13.0, step=7)]
        (short,) = faultverdict.judge([episode("stop-rank", lasting_s=2)], steps_on)
        (endless,) = faultverdict.judge([episode("stop-rank")], steps_on)
        assert (short.wrong, short.stepped_s) == ("", pytest.approx(3.0)), "the step at 10.1 was finished before the stop took hold"
        assert endless.wrong == "nobody noticed it"

    def test_a_killed_coordinator_must_be_succeeded_and_may_cost_no_failure(self) -> None:
        succeeded = [event("adopted", 11.0), event("progress", 11.1, step=9)]
        (right,) = faultverdict.judge([episode("kill-coordinator")], succeeded)
        (wrong,) = faultverdict.judge([episode("kill-coordinator")], [*succeeded, failure(12.0, why="rank 2 died")])
        assert (right.wrong, right.stepped_s) == ("", pytest.approx(1.1))
        assert wrong.wrong == "a failure that nobody inflicted: rank 2 died"

    def test_a_fault_is_over_when_it_has_ended_and_all_ranks_step(self) -> None:
        frozen, events = episode("stop-node", lasting_s=20), recovery(10.0, failure(15.0, cause="lost"))
        assert not faultverdict.is_over(frozen, events, now=29.0)
        assert faultverdict.is_over(frozen, events, now=31.0)
        assert not faultverdict.is_over(episode(), events[:2], now=31.0), "nobody trains yet"

    def test_steps_are_charged_to_the_fault_that_ended_their_attempt(self) -> None:
        episodes = [episode(), episode("kill-coordinator", at_s=20, attempt=2), episode(at_s=30, attempt=2)]
        assert faultverdict.redone(episodes, {1: 4, 2: 3, 3: 2}) == (4, 0, 5)

    def test_histories_are_compared_to_the_bit(self) -> None:
        def history(*losses: str, state: str = "s", sizes: frozenset[int] = frozenset({4})) -> History:
            return History(state_sha256=state, losses=losses, world_sizes=sizes)

        undisturbed = history("0x1p+0", "0x1p+1")
        assert faultverdict.difference(undisturbed, undisturbed) == ""
        assert "differ from step 2 on (1 of 2 steps)" in faultverdict.difference(history("0x1p+0", "0x1p+2"), undisturbed)
        assert "within rounding" in faultverdict.difference(history("0x1p+2", "0x1p+1", sizes=frozenset({2, 4})), undisturbed)
        assert faultverdict.difference(history("0x1p+0"), undisturbed) == "the history has 1 steps, not 2"
        assert "final state is not" in faultverdict.difference(history("0x1p+0", "0x1p+1", state="t"), undisturbed)
