"""When a loss or a gradient counts as a spike: never in a training that goes its way, always when it is ten times the usual."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from keepstep.trainer.config import SpikeSection
from keepstep.trainer.spikes import NonFinite, Spike, Window, find_loss_spike

LIMITS = SpikeSection()
GRADIENTS = SpikeSection(gradient_factor=10)

# [loss, gradient norm] of every step of two real trainings: examples/quickstart.toml with 300 steps, and one as noisy as they get, two
# samples of 32 bytes a step at a learning rate of 1e-2.
CURVES: Mapping[str, list[list[float]]] = json.loads(Path(__file__).with_name("loss_curves.json").read_text())


def found_in(losses: list[float], limits: SpikeSection = LIMITS) -> list[tuple[int, Spike]]:
    """(step, spike) of a whole curve; what was a spike does not enter the window."""
    window, found = Window(limits.window), []
    for step, loss in enumerate(losses, start=1):
        if spike := window.spike(loss, 1.0, limits):
            found.append((step, spike))
        else:
            window.add(loss, 1.0)
    return found


@given(start=st.floats(0.1, 20), falls=st.lists(st.floats(0, 2), max_size=300))
def test_a_falling_loss_is_never_a_spike(start: float, falls: list[float]) -> None:
    losses = [start]
    for fall in falls:
        losses.append(losses[-1] * math.exp(-fall))
    assert found_in(losses) == []


@given(level=st.floats(0.01, 20), share=st.floats(0, 0.6), seed=st.integers(0, 1 << 32), falls=st.floats(0, 0.05))
def test_noise_around_a_falling_loss_is_no_spike(level: float, share: float, seed: int, falls: float) -> None:
    """Uniform noise of up to 60 % of the loss, on a level that may fall: small batches of text that differs."""
    chance = random.Random(seed)
    losses = [level * math.exp(-falls * i) * (1 + chance.uniform(-share, share)) for i in range(200)]
    assert found_in(losses) == []


@given(seed=st.integers(0, 1 << 32), sigma=st.floats(0, 1))
def test_normal_noise_is_no_spike(seed: int, sigma: float) -> None:
    chance = random.Random(seed)
    assert found_in([3 + chance.gauss(0, sigma) for _ in range(300)]) == []


@given(level=st.floats(0.2, 20), share=st.floats(0, 0.2), seed=st.integers(0, 1 << 32))
def test_ten_times_the_usual_always_is_one(level: float, share: float, seed: int) -> None:
    chance = random.Random(seed)
    losses = [level * (1 + chance.uniform(-share, share)) for _ in range(LIMITS.window)]
    ((step, spike),) = found_in([*losses, 10 * level, level])
    assert (step, spike.what, spike.value) == (LIMITS.window + 1, "loss", 10 * level)
    assert min(losses) <= spike.median <= max(losses) <= spike.bound < 10 * level


@given(losses=st.lists(st.floats(0.01, 20), min_size=32, max_size=64), loss=st.floats(0, 400), scale=st.sampled_from([0.25, 2.0, 8.0]))
def test_what_is_a_spike_does_not_depend_on_the_unit_where_only_the_spread_counts(losses: list[float], loss: float, scale: float) -> None:
    limits = SpikeSection(nats=0)
    found = find_loss_spike(losses, loss, limits)
    scaled = find_loss_spike([scale * value for value in losses], scale * loss, limits)
    assert (scaled is None) == (found is None)  # powers of two: no rounding
    assert scaled is None or found is None or scaled.bound == scale * found.bound


@given(losses=st.lists(st.floats(0.01, 20), min_size=32, max_size=64), loss=st.floats(0, 60), other=st.randoms(use_true_random=False))
def test_the_verdict_is_that_of_the_definition_in_any_order_of_the_window(losses: list[float], loss: float, other: random.Random) -> None:
    middle = sorted(losses)[len(losses) // 2] if len(losses) % 2 else sum(sorted(losses)[len(losses) // 2 - 1 : len(losses) // 2 + 1]) / 2
    deviations = sorted(abs(value - middle) for value in losses)
    mad = deviations[len(losses) // 2] if len(losses) % 2 else sum(deviations[len(losses) // 2 - 1 : len(losses) // 2 + 1]) / 2
    bound = max(middle + max(1.5, 12 * 1.4826 * mad), *losses)
    assume(not math.isclose(loss, bound, rel_tol=1e-9))
    shuffled = other.sample(losses, len(losses))
    assert (find_loss_spike(losses, loss, LIMITS) is not None) == (loss > bound) == (find_loss_spike(shuffled, loss, LIMITS) is not None)


@pytest.mark.parametrize("curve", CURVES)
def test_a_real_training_holds_none(curve: str) -> None:
    """By default. A gradient alone says little: the noisy one has a gradient of 53 times the usual, and goes on as if nothing had been."""
    window = Window(LIMITS.window)
    for loss, norm in CURVES[curve]:
        assert window.spike(loss, norm, LIMITS) is None
        window.add(loss, norm)


@pytest.mark.parametrize("curve", CURVES)
def test_ten_times_the_loss_shows_at_every_step_of_a_real_training(curve: str) -> None:
    window = Window(LIMITS.window)
    for step, (loss, norm) in enumerate(CURVES[curve], start=1):
        assert (window.spike(10 * loss, norm, LIMITS) is not None) == (step > LIMITS.window // 2)
        window.add(loss, norm)


def test_nothing_is_judged_before_half_a_window_was_seen() -> None:
    half = LIMITS.window // 2
    assert found_in([1.0] * (half - 1) + [100.0]) == []
    assert len(found_in([1.0] * half + [100.0])) == 1


def test_what_the_window_held_before_is_no_spike_again() -> None:
    """Batches of two kinds: the rare kind is 3 nats dearer, and its first one came before anything was judged."""
    assert found_in([1.0] * 20 + [4.0] + [1.0] * 30 + [4.0] + [1.0] * 5 + [3.9]) == []
    assert len(found_in([1.0] * 20 + [4.0] + [1.0] * 30 + [4.1])) == 1


def test_zero_switches_off() -> None:
    assert found_in([1.0] * 64 + [1e9], SpikeSection(sigmas=0)) == []
    window = Window(64, [(1.0, 1.0)] * 64)
    assert window.spike(1.0, 1e9, LIMITS) is None


def test_a_gradient_beyond_its_factor_is_one() -> None:
    window = Window(64, [(1.0, 2.0)] * 64)
    assert window.spike(1.0, 20.0, GRADIENTS) is None
    assert window.spike(1.0, 20.1, GRADIENTS) == Spike("gradient", 20.1, 2.0, 20.0)
    assert Window(64, [(1.0, 0.0)] * 64).spike(1.0, 1.0, GRADIENTS) is None, "nothing is so many times zero"


@settings(max_examples=30)
@given(
    steps=st.lists(st.tuples(st.floats(0, 1e30), st.floats(0, 1e30)), max_size=70),
    cut=st.integers(0, 70),
    more=st.lists(st.floats(0, 50), max_size=20),
)
def test_a_window_goes_through_a_checkpoint_to_the_bit(steps: list[tuple[float, float]], cut: int, more: list[float]) -> None:
    straight, saved = Window(64, steps), Window.from_json(64, Window(64, steps[:cut]).to_json())
    for step in steps[cut:]:
        saved.add(*step)
    assert saved.to_json() == straight.to_json() == Window.from_json(64, straight.to_json()).to_json()
    assert [saved.spike(loss, 1.0, LIMITS) for loss in more] == [straight.spike(loss, 1.0, LIMITS) for loss in more]


def test_a_shorter_window_takes_the_newest_steps() -> None:
    window = Window.from_json(8, Window(64, [(float(i), 0.5) for i in range(30)]).to_json())
    assert window.to_json() == [[float(i).hex(), (0.5).hex()] for i in range(22, 30)]


def test_not_finite_is_no_spike_but_a_finding_of_its_own() -> None:
    assert NonFinite("loss", math.inf, (0,)) != Spike("loss", math.inf, 0, 0)
