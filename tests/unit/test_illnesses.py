"""Each rule of the diagnosis against a training that really has its illness, and all of them against trainings that are well."""

from __future__ import annotations

import pydoc_data.topics
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patients import recorded, script, trained

from keepstep.trainer.columns import Course
from keepstep.trainer.diagnosis import RULES, Rule, diagnose
from keepstep.trainer.findings import Finding, Severity

pytestmark = pytest.mark.slow


def prose(count: int) -> dict[str, str]:
    """English documents."""
    return {f"{i:03}": body for i, (_, body) in enumerate(sorted(pydoc_data.topics.topics.items())[:count])}


def letters(alphabet: str, count: int, seed: int) -> str:
    chance = random.Random(seed)
    return "".join(chance.choice(alphabet) for _ in range(count))


def words(count: int, seed: int) -> str:
    """Some thousand letters of a simple language."""
    chance = random.Random(seed)
    known = ("the", "of", "and", "to", "in", "is", "you", "that", "it", "was", "for", "on", "are", "with", "they", "this", "have", "from")
    return " ".join(chance.choice(known) for _ in range(count // 4))


def walk(count: int, seed: int) -> str:
    """A Markov chain: ln 2 nats per letter, and nobody learns more of it than that."""
    chance, at, out = random.Random(seed), "a", []
    for _ in range(count):
        at = chance.choice({"a": "bc", "b": "ca", "c": "ad", "d": "ab"}[at])
        out.append(at)
    return "".join(out)


def found(course: Course, name: str) -> Finding:
    (finding,) = [finding for finding in diagnose(course) if finding.name == name]
    assert course.steps.step[0] <= finding.since <= course.steps.step[-1] + 1
    assert finding.evidence
    assert finding.remedy
    return finding


def names(course: Course) -> set[str]:
    return {finding.name for finding in diagnose(course)}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Course]:
    root = tmp_path_factory.mktemp("healthy")
    quickstart = {"layers": 4, "width": 64, "heads": 4, "context": 64, "dropout": 0.1}
    return {
        "small": trained(root / "small", {str(i): words(5000, i) for i in range(8)}, steps=120),
        "quickstart": trained(
            root / "quickstart",
            prose(40),
            steps=200,
            stop_at=45,
            data={"tokenizer": "bpe", "vocabulary": 1024},
            model=quickstart,
            optimizer={"warmup_steps": 20, "lr": 1e-3},  # at 3e-3 so narrow a model really overshoots for single steps
            train={"batch_tokens": 1024},
        ),
        "network": recorded(root / "network", residual_network()),
    }


@pytest.fixture(scope="module")
def memorised(tmp_path_factory: pytest.TempPathFactory) -> Course:
    """Some 30 samples of text without sense, again and again."""
    text = {str(i): letters("etaoin shrdlu", 500, i) for i in range(3)}
    return trained(
        tmp_path_factory.mktemp("memorised"), text, steps=170, data={"held_out": 0.3}, model={"width": 64}, optimizer={"lr": 5e-3}
    )


class TestHealthy:
    @pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
    @pytest.mark.parametrize("name", ["small", "quickstart", "network"])
    def test_no_rule_speaks(self, healthy: dict[str, Course], name: str, rule: Rule) -> None:
        assert list(rule(healthy[name])) == []

    def test_what_the_rules_look_at_was_recorded(self, healthy: dict[str, Course]) -> None:
        course = healthy["small"]
        for column in ("loss", "grad_norm", "param_norm", "lr", "tokens", "seconds"):
            assert np.isfinite(getattr(course.steps, column)).all(), column
        assert np.isfinite(course.steps.update_ratio[:-1]).all()  # the last update is told by the next step's record
        assert (course.steps.batch != 0).all()
        assert [evaluation.step for evaluation in course.evaluations] == [20, 40, 60, 80, 100, 120]
        assert course.epochs > 1
        for statistic in ("grad_norm", "param_norm", "dead", "nonfinite"):
            assert course.layers.named(statistic)[0], statistic


class TestLearningRate:
    def test_too_high(self, tmp_path: Path) -> None:
        finding = found(trained(tmp_path, prose(20), steps=40, optimizer={"lr": 1.0, "warmup_steps": 5}), "learning-rate-too-high")
        assert finding.severity >= Severity.WARNING  # critical unless it has come down again since
        assert finding.since < 15
        assert "-o optimizer.lr=0.1" in finding.remedy

    def test_too_low(self, tmp_path: Path) -> None:
        course = trained(tmp_path, prose(20), steps=70, optimizer={"lr": 1e-6, "warmup_steps": 5}, train={"batch_tokens": 256})
        assert found(course, "learning-rate-too-low").since == 5
        assert not names(course) & {"plateau", "under-fitting"}  # they follow from it


class TestFit:
    def test_over_fitting_names_the_step_with_the_best_model(self, memorised: Course) -> None:
        finding = found(memorised, "over-fitting")
        assert finding.since == min(memorised.evaluations, key=lambda evaluation: evaluation.nats).step
        assert finding.since < 120

    def test_over_fitting_shows_in_a_single_evaluation_too(self, memorised: Course) -> None:
        finding = found(replace(memorised, evaluations=memorised.evaluations[-1:]), "over-fitting")
        assert finding.since == 170

    def test_text_that_was_seen_too_often(self, memorised: Course) -> None:
        finding = found(memorised, "data-repetition")
        assert memorised.epochs > 50
        assert finding.since == -(-4 * memorised.epoch_samples // 16)  # a step takes 16 samples

    def test_under_fitting(self, tmp_path: Path) -> None:
        course = trained(tmp_path, prose(20), steps=60, model={"layers": 1, "width": 8, "heads": 1}, train={"batch_tokens": 256})
        assert "frequencies of tokens alone" in found(course, "under-fitting").evidence

    def test_plateau(self, tmp_path: Path) -> None:
        text = {str(i): walk(6000, i) for i in range(8)}
        course = trained(tmp_path, text, steps=200, model={"width": 48}, optimizer={"min_lr_ratio": 1.0, "lr": 5e-3})
        finding = found(course, "plateau")
        assert finding.severity is Severity.NOTE
        assert finding.since > 100

    def test_repeated_batches(self, tmp_path: Path) -> None:
        text = {"0": "a text that is one sample long, not more", "1": "held-out text that nobody trains on, about as long"}
        course = trained(tmp_path, text, steps=20, data={"held_out": 0.4}, train={"batch_tokens": 32})
        by_epochs, by_batches = (finding for finding in diagnose(course) if finding.name == "data-repetition")
        assert by_epochs.since == 2 or by_batches.since == 2
        assert {by_epochs.since, by_batches.since} == {2, 5}


class TestSpikes:
    def test_a_spike_names_its_samples(self, tmp_path: Path) -> None:
        text = {str(i): "ab" * 1000 for i in range(8)} | {f"z{i}": letters("QWXZJKVP0123456789", 70, i) for i in range(4)}
        course = trained(tmp_path, text, steps=100, train={"batch_tokens": 128}, optimizer={"warmup_steps": 5})
        finding = found(course, "loss-spike")
        (first, last) = (int(number) for number in re.findall(r"--skip (\d+):(\d+) ", finding.remedy)[0])
        entry = int(np.flatnonzero(course.steps.first_position == first)[0])
        assert course.steps.last_position[entry] == last
        assert course.steps.loss[entry] > 1.0
        assert np.median(course.steps.loss[entry - 10 : entry]) < 0.5

    def test_numbers_that_are_not_finite_name_the_module(self, tmp_path: Path) -> None:
        course = trained(tmp_path, prose(20), steps=40, may_fail=True, optimizer={"lr": 1e25, "warmup_steps": 5})
        finding = found(course, "non-finite")
        assert finding.since == 2
        assert finding.layers == ("blocks.0.attention_norm",)
        assert finding.severity is Severity.CRITICAL

    def test_a_script_that_goes_on_without_numbers_is_noticed_and_its_module_named(self, tmp_path: Path) -> None:
        finding = found(recorded(tmp_path, poisoned_network()), "non-finite")
        assert (finding.since, finding.layers) == (15, ("2",))


class TestGradients:
    def test_vanishing(self, tmp_path: Path) -> None:
        finding = found(recorded(tmp_path, sigmoids()), "vanishing-gradients")
        assert {"0.weight", "2.weight"} <= set(finding.layers)
        assert "14.weight" not in finding.layers
        assert finding.since == 1

    def test_exploding_towards_the_input(self, tmp_path: Path) -> None:
        finding = found(recorded(tmp_path, large_weights()), "exploding-gradients")
        assert "0.bias" in finding.layers
        assert "14.bias" not in finding.layers

    def test_exploding_over_time(self, tmp_path: Path) -> None:
        """Gradient descent with a step too long for the curvature."""
        finding = found(recorded(tmp_path, overshooting()), "exploding-gradients")
        assert finding.since > 10
        assert finding.layers == ()

    def test_dead_units(self, tmp_path: Path) -> None:
        finding = found(recorded(tmp_path, dying_units()), "dead-units")
        assert finding.layers == ("1",)


# Networks. Torch is imported by those who need it.


def regression(step: int, shift: float = 0.0) -> tuple[Any, Any]:
    """(64, 16) inputs and (64, 1) targets."""
    import torch

    generator = torch.Generator().manual_seed(step % 8)
    x = torch.randn(64, 16, generator=generator)
    return x, torch.sin(x[:, :1]) + 0.5 * x[:, 1:2] + shift


def positive(step: int) -> tuple[Any, Any]:
    """Inputs of one sign and targets far off: one long step turns a unit off for all inputs."""
    x, y = regression(step, shift=-20.0)
    return x.abs(), y


def stack(depth: int, activation: str, scale: float = 1.0) -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(16, 16), getattr(nn, activation)())]
    model = nn.Sequential(*layers, nn.Linear(16, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def mse() -> Any:
    import torch

    return torch.nn.functional.mse_loss


def residual_network() -> Iterator[dict[str, Any]]:
    import torch
    from torch import nn

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.activation, self.down = nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            added: torch.Tensor = self.down(self.activation(self.up(x)))
            return x + added

    torch.manual_seed(0)
    yield from script(nn.Sequential(*(Residual() for _ in range(6)), nn.Linear(16, 1)), regression, steps=100, lr=0.02, loss=mse())


def sigmoids() -> Iterator[dict[str, Any]]:
    yield from script(stack(8, "Sigmoid"), regression, steps=30, lr=0.1, loss=mse())


def large_weights() -> Iterator[dict[str, Any]]:
    yield from script(stack(8, "ReLU", scale=12.0), regression, steps=30, lr=1e-30, loss=mse())


def overshooting() -> Iterator[dict[str, Any]]:
    import torch

    torch.manual_seed(0)
    yield from script(torch.nn.Linear(16, 1), regression, steps=80, lr=0.85, loss=mse())


def dying_units() -> Iterator[dict[str, Any]]:
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
    yield from script(model, positive, steps=40, lr=0.03, loss=mse())


def poisoned_network() -> Iterator[dict[str, Any]]:
    """A weight in the middle is no number from step 15 on."""
    import torch

    model = stack(3, "ReLU")
    for record in script(model, regression, steps=20, lr=0.01, loss=mse()):
        yield record
        if record["step"] == 14:
            with torch.no_grad():
                model[3 - 1].bias[0] = torch.inf
