"""The rules of the diagnosis as functions: what noise must not trigger, and what must be found wherever it stands."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepstep.trainer.columns import Course, Evaluation, Floats, Incident, LayerSamples, Steps, no_steps
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.diagnosis import diagnose
from keepstep.trainer.diagnosis_layers import _since, kinds_by_depth
from keepstep.trainer.diagnosis_loss import hump, spikes
from keepstep.trainer.findings import Severity, fill, noise, number, running_median, running_noise

CURVE = st.builds(
    lambda seed, length, start, sigma: falling(length, start, sigma, seed),
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(40, 400),
    start=st.floats(4.0, 11.0),
    sigma=st.floats(0.005, 0.1),
)


def falling(length: int, start: float, sigma: float, seed: int) -> Floats:
    """A loss that falls like a power of the step, with the noise of batches."""
    clean = 1.5 + (start - 1.5) * np.arange(1, length + 1) ** -0.3
    curve: Floats = clean + np.random.default_rng(seed).normal(0, sigma, length)
    return curve


def course(loss: Floats, **columns: Floats) -> Course:
    """A training with this curve whose other numbers are those of a good one."""
    count = len(loss)
    step = np.arange(1, count + 1)
    defaults = {
        "grad_norm": np.full(count, 0.5),
        "param_norm": np.full(count, 10.0),
        "update_ratio": np.full(count, 2e-3),
        "lr": np.full(count, 1e-3),
        "tokens": np.full(count, 4096.0),
        "seconds": np.full(count, 0.1),
    }
    steps: Steps = replace(
        no_steps(),
        step=step,
        attempt=np.ones(count, dtype=np.int64),
        provisional=np.zeros(count, dtype=np.bool_),
        loss=loss,
        first_position=(step - 1) * 8,
        last_position=step * 8,
        batch=step + 1000,
        **(defaults | columns),
    )
    config = TrainerConfig.model_validate({"run": {"steps": count}})
    return Course(run="test", root="ROOT", config=config, steps=steps, commits=tuple(range(20, count, 20)))


def names(of: Course) -> set[str]:
    return {finding.name for finding in diagnose(of)}


@settings(max_examples=60, deadline=None)
@given(loss=CURVE)
def test_noise_around_a_falling_loss_is_nothing(loss: Floats) -> None:
    assert names(course(loss)) <= {"plateau"}  # a curve of a few hundred steps may really rest within its noise


@settings(max_examples=60, deadline=None)
@given(loss=CURVE, data=st.data())
def test_a_spike_is_found_wherever_it_stands(loss: Floats, data: st.DataObject) -> None:
    at = data.draw(st.integers(20, len(loss) - 5))
    loss[at] += 2.0 + loss[at]
    assert at in {spike.peak for spike in spikes(loss)}
    (finding,) = [finding for finding in diagnose(course(loss)) if finding.name == "loss-spike"]
    assert finding.since <= at + 1
    back = max((commit for commit in range(20, len(loss), 20) if commit < at + 1), default=0)
    assert f"keepstep rewind ROOT --to {back} --skip {at * 8}:{at * 8 + 8}" in finding.remedy
    assert finding.severity is Severity.WARNING


def test_a_spike_that_does_not_end_is_critical() -> None:
    loss = falling(100, 6.0, 0.02, 0)
    loss[96:] += 3.0
    (finding,) = [finding for finding in diagnose(course(loss)) if finding.name == "loss-spike"]
    assert finding.severity is Severity.CRITICAL
    assert finding.since == 97


def test_a_loss_that_climbs_with_small_updates_is_no_matter_of_the_learning_rate() -> None:
    loss = np.concatenate([falling(60, 6.0, 0.02, 0), np.linspace(2.8, 5.0, 60)])
    assert "learning-rate-too-high" in names(course(loss, update_ratio=np.full(120, 0.02)))
    assert "learning-rate-too-high" not in names(course(loss, update_ratio=np.full(120, 1e-4)))


def test_a_hump_needs_a_training_that_is_seen_from_its_begin() -> None:
    loss = np.concatenate([np.full(5, 5.0), np.full(20, 8.0), np.linspace(8.0, 3.0, 60)])
    whole = course(loss)
    assert hump(whole) is not None
    assert hump(whole.within(3, 80)) is None


def test_a_loss_that_rests_because_the_schedule_has_cooled_down_is_no_plateau() -> None:
    loss = np.concatenate([np.linspace(6, 3, 100), np.full(100, 3.0)])
    assert "plateau" in names(course(loss))
    assert "plateau" not in names(course(loss, lr=np.concatenate([np.full(100, 1e-3), np.full(100, 1e-4)])))


def test_over_fitting_needs_a_training_loss_that_falls() -> None:
    """Held-out text that gets worse together with the training loss is another illness."""
    evaluations = tuple(Evaluation(step=step, attempt=1, nats=nats, perplexity=1.0) for step, nats in ((50, 3.0), (100, 3.3)))
    assert "over-fitting" in names(replace(course(np.linspace(5.0, 2.0, 100)), evaluations=evaluations))
    assert "over-fitting" not in names(replace(course(np.linspace(2.0, 2.05, 100)), evaluations=evaluations))


def test_a_gap_to_held_out_text_without_repetition_is_no_over_fitting() -> None:
    gap = replace(course(np.linspace(5.0, 2.0, 100)), evaluations=(Evaluation(step=100, attempt=1, nats=3.0, perplexity=20.0),))
    assert "over-fitting" not in names(replace(gap, epoch_samples=100_000))
    assert "over-fitting" in names(replace(gap, epoch_samples=100))


def test_an_unfinished_training_is_not_under_fitted_yet() -> None:
    early = replace(course(np.full(40, 6.0)), unigram_nats=6.0)
    (finding,) = diagnose(early)
    assert (finding.name, finding.severity) == ("under-fitting", Severity.WARNING)
    (falling_still,) = diagnose(replace(early, steps=replace(early.steps, loss=np.linspace(9.0, 6.0, 40))))
    assert falling_still.severity is Severity.NOTE
    assert falling_still.remedy.startswith("more run.steps")
    longer = TrainerConfig.model_validate({"run": {"steps": 200}})
    assert "under-fitting" not in names(replace(early, config=longer))


def test_two_equal_digests_among_very_many_are_chance() -> None:
    often = course(falling(300, 6.0, 0.02, 0))
    batch = often.steps.batch.copy()
    batch[200] = batch[100]
    assert "data-repetition" not in names(replace(often, steps=replace(often.steps, batch=batch)))
    batch[201:210] = batch[101:110]
    (finding,) = diagnose(replace(often, steps=replace(often.steps, batch=batch)))
    assert (finding.name, finding.since) == ("data-repetition", 201)
    assert "10 of 300 steps" in finding.evidence


def test_skipped_samples_were_not_seen() -> None:
    """8 samples a step; step 31 begins behind a skip of a million."""
    well = course(falling(60, 6.0, 0.02, 0))
    last = well.steps.last_position + np.where(well.steps.step >= 31, 1_000_000, 0)
    first = well.steps.first_position + np.where(well.steps.step > 31, 1_000_000, 0)
    skipped = replace(well, steps=replace(well.steps, first_position=first, last_position=last))
    assert replace(skipped, epoch_samples=480).epochs == 1
    (often,) = diagnose(replace(skipped, epoch_samples=48, config=TrainerConfig.model_validate({"run": {"steps": 100}})))
    assert (often.name, often.since) == ("data-repetition", 25)
    assert "seen 10.0 times" in often.evidence
    assert often.remedy.endswith("an end here: run.steps = 60")


def test_a_later_bad_step_names_its_own_samples() -> None:
    first, second = (
        Incident(kind="rejected", step=31, attempt=n, why="the loss is nan", cause="non-finite", skips=(own,))
        for n, own in ((1, "240:248"), (2, "250:252"))
    )
    back = [
        Incident(kind="rewind", step=20, attempt=n, why="", cause="bad-step", skips=s)
        for n, s in ((1, ("240:248",)), (2, ("240:248", "250:252")))
    ]
    found = diagnose(replace(course(falling(60, 6.0, 0.02, 0)), incidents=(first, back[0], second, back[1])))
    assert [finding.remedy.split("leaves out ")[1] for finding in found] == [
        "240:248: look at those samples",
        "250:252: look at those samples",
    ]


def test_a_refused_step_that_the_run_has_left_behind_is_a_warning() -> None:
    bad = Incident(
        kind="rejected", step=31, attempt=1, why="step 31: the loss is nan", module="blocks.0", cause="non-finite", skips=("240:248",)
    )
    gone = Incident(kind="rewind", step=20, attempt=1, why="step 31 was bad", cause="bad-step", skips=("240:248",))
    well = course(falling(60, 6.0, 0.02, 0))
    (open_,) = diagnose(replace(well, incidents=(bad,)))
    (left,) = diagnose(replace(well, incidents=(bad, gone)))
    assert (open_.name, open_.severity, open_.since, open_.layers) == ("non-finite", Severity.CRITICAL, 31, ("blocks.0",))
    assert "keepstep rewind ROOT --to 20 --skip 240:248" in open_.remedy
    assert left.severity is Severity.WARNING
    assert "went back to step 20 by itself and leaves out 240:248" in left.remedy


def test_an_overflow_under_the_scale_of_fp16_is_nothing() -> None:
    well = course(falling(60, 6.0, 0.02, 0))
    norm = well.steps.grad_norm.copy()
    norm[9] = np.nan
    layers = LayerSamples(step=np.array([10, 20]), names=("a.weight",), values={"grad_nonfinite": np.array([[0.5], [0.0]])})
    overflowed = replace(well, steps=replace(well.steps, grad_norm=norm), layers=layers)
    assert names(overflowed) == {"non-finite"}
    assert names(replace(overflowed, config=TrainerConfig.model_validate({"train": {"precision": "fp16"}}))) == set()


def test_the_most_severe_comes_first_and_a_cause_hides_its_consequence() -> None:
    loss = np.concatenate([falling(60, 6.0, 0.02, 0), np.full(100, 9.0)])
    found = diagnose(course(loss, update_ratio=np.full(160, 0.05)))
    assert found[0].name == "learning-rate-too-high"
    assert not {"plateau", "loss-spike"} & {finding.name for finding in found}


@pytest.mark.slow
def test_the_diagnosis_of_a_long_training_is_vectorised() -> None:
    """A Python loop over steps, or a quadratic rule, would show: the rules see each column as a whole."""
    import sys

    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        diagnose(course(falling(20_000, 9.0, 0.05, 0)))
    finally:
        sys.setprofile(None)
    assert calls < 20_000


def test_an_empty_course_and_a_single_step_have_nothing_to_say() -> None:
    assert diagnose(Course()) == ()
    assert diagnose(course(np.array([5.0]))) == ()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(np.nan)), max_size=60), st.integers(1, 20))
def test_running_statistics_are_those_of_the_windows(values: list[float], width: int) -> None:
    array = np.array(values)
    filled = fill(array)
    expected = [np.median(filled[max(0, i - width + 1) : i + 1]) for i in range(len(filled))]
    np.testing.assert_array_equal(running_median(array, width), np.array(expected))
    assert not np.isnan(filled).any() or np.isnan(array).all()
    noises = [noise(filled[max(0, i - width - 1) : i + 1]) for i in range(len(filled))]
    np.testing.assert_allclose(running_noise(array, width + 2), np.array(noises))


@given(st.lists(st.booleans(), max_size=12))
def test_an_illness_counts_from_where_it_holds_to_the_end(is_ill: list[bool]) -> None:
    since = _since(np.array(is_ill, dtype=np.bool_))
    if since is None:
        assert is_ill[-2:].count(True) < 2
    else:
        assert all(is_ill[since:])
        assert since == 0 or not is_ill[since - 1]


def test_layers_of_a_kind_are_those_whose_names_differ_in_one_number() -> None:
    known = ("tokens.weight", "blocks.10.up.weight", "blocks.2.up.weight", "blocks.0.up.weight", "blocks.0.w1.bias", "0.weight", "2.weight")
    assert dict(kinds_by_depth(known)) == {"blocks.*.up.weight": [3, 2, 1]}
    assert dict(kinds_by_depth((*known, "4.weight"))) == {"blocks.*.up.weight": [3, 2, 1], "*.weight": [5, 6, 7]}


@pytest.mark.parametrize(("value", "text"), [(0.1, "0.1"), (1e-3, "0.001"), (3.0, "3"), (12345.6, "1.23e+04"), (np.nan, "nan"), (0.0, "0")])
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text
