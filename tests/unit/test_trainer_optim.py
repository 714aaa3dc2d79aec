"""Clipping, and optimizers on shards beside those of torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from keepstep.trainer.config import ModelSection, OptimizerSection
from keepstep.trainer.models import build_model, initial_value
from keepstep.trainer.optim import ShardOptimizer, changed_hyper_parameters, clip_scale

CONFIG = OptimizerSection(lr=1.0)
# Our section -> the class of torch.optim and its arguments.
BESIDE: dict[str, tuple[dict[str, Any], Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": ({"kind": "adamw"}, torch.optim.AdamW, {"betas": (0.9, 0.95), "eps": 1e-8, "fused": True}),
    "adam": ({"kind": "adam", "beta2": 0.99}, torch.optim.Adam, {"betas": (0.9, 0.99), "eps": 1e-8, "fused": True}),
    "sgd": ({"kind": "sgd"}, torch.optim.SGD, {"fused": True}),
    "momentum": ({"kind": "sgd", "momentum": 0.9}, torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "nesterov": ({"kind": "sgd", "momentum": 0.9, "nesterov": True}, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "fused": True}),
    "rmsprop": ({"kind": "rmsprop", "beta2": 0.99}, torch.optim.RMSprop, {"alpha": 0.99, "eps": 1e-8}),
    "rmsprop, momentum": ({"kind": "rmsprop", "momentum": 0.5}, torch.optim.RMSprop, {"alpha": 0.95, "eps": 1e-8, "momentum": 0.5}),
    "adagrad": ({"kind": "adagrad"}, torch.optim.Adagrad, {"eps": 1e-8, "fused": True}),
}


@pytest.mark.parametrize(("norm", "clip_norm", "scale"), [(0.5, 1.0, 1.0), (4.0, 1.0, 0.25), (4.0, 0.0, 1.0), (0.0, 1.0, 1.0)])
def test_gradients_are_scaled_down_to_the_clip_norm(norm: float, clip_norm: float, scale: float) -> None:
    assert clip_scale(norm, clip_norm) == scale


def model() -> torch.nn.Module:
    made = build_model(ModelSection(layers=1, width=16, heads=2, context=8, dropout=0.0), 20)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(initial_value(made, name, parameter.shape, 0))
    return made


@pytest.mark.parametrize("name", BESIDE)
def test_updates_are_torchs(name: str) -> None:
    fields, make, arguments = BESIDE[name]
    mine, reference = model(), model()
    optimizer = ShardOptimizer(mine, OptimizerSection.model_validate({**fields, "weight_decay": 0.1}))
    decayed = [p for p in reference.parameters() if p.ndim > 1]
    exempt = [p for p in reference.parameters() if p.ndim <= 1]
    plain = make([{"params": decayed}, {"params": exempt, "weight_decay": 0.0}], lr=0.01, weight_decay=0.1, **arguments)
    ids = torch.arange(16).view(2, 8)
    for _ in range(3):
        for net in (mine, reference):
            net(ids).square().mean().backward()
        optimizer.take_gradients()
        optimizer.update(lr=0.01, scale=1.0)
        plain.step()
        plain.zero_grad()
    for (key, ours), theirs in zip(mine.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs), key


def test_l1_is_the_gradient_of_the_sum_of_magnitudes_of_matrices() -> None:
    mine, reference = model(), model()
    optimizer = ShardOptimizer(mine, OptimizerSection(kind="sgd", weight_decay=0.0, l1=0.5))
    ids = torch.arange(16).view(2, 8)
    mine(ids).square().mean().backward()
    (reference(ids).square().mean() + 0.5 * sum(p.abs().sum() for p in reference.parameters() if p.ndim > 1)).backward()
    optimizer.take_gradients()
    optimizer.update(lr=0.1, scale=1.0)
    for (key, ours), theirs in zip(mine.named_parameters(), reference.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad, msg=key)


def test_frozen_parameters_have_no_state_and_stay() -> None:
    net = model()
    net.get_parameter("tokens.weight").requires_grad_(False)
    before = net.get_parameter("tokens.weight").clone()
    optimizer = ShardOptimizer(net, CONFIG)
    net(torch.arange(8).view(1, 8)).sum().backward()
    optimizer.take_gradients()
    optimizer.update(lr=0.1, scale=1.0)
    assert "tokens.weight" not in optimizer.state()
    assert torch.equal(net.get_parameter("tokens.weight"), before)


def test_the_gradient_square_is_that_of_the_global_norm() -> None:
    net = model()
    optimizer = ShardOptimizer(net, CONFIG)
    net(torch.arange(8).view(1, 8)).sum().backward()
    expected = float(torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None]))
    optimizer.take_gradients()
    assert math.sqrt(optimizer.gradient_square()) == pytest.approx(expected)


@pytest.mark.parametrize("name", BESIDE)
def test_state_exists_before_the_first_step_and_is_all_there_ever_is(name: str) -> None:
    net = model()
    optimizer = ShardOptimizer(net, OptimizerSection.model_validate(BESIDE[name][0]))
    before = {key: set(entry) for key, entry in optimizer.state().items()}
    net(torch.arange(8).view(1, 8)).sum().backward()
    optimizer.take_gradients()
    optimizer.update(lr=0.1, scale=1.0)
    assert {key: set(entry) for key, entry in optimizer.state().items()} == before


def test_a_group_without_parameters_is_there_and_keeps_its_hyper_parameters() -> None:
    net = torch.nn.Linear(3, 2, bias=False)
    optimizer = ShardOptimizer(net, OptimizerSection(weight_decay=0.3))
    net(torch.ones(1, 3)).sum().backward()
    optimizer.take_gradients()
    optimizer.update(lr=0.25, scale=1.0)
    rest = {"lr": 0.25, "betas": (0.9, 0.95), "eps": 1e-8}
    assert optimizer.hyper_parameters() == {"decayed": rest | {"weight_decay": 0.3}, "exempt": rest | {"weight_decay": 0.0}}
    assert optimizer.group_names["exempt"] == []


def test_a_group_that_is_new_or_gone_is_told_key_by_key() -> None:
    assert list(changed_hyper_parameters({"old": {"lr": 1.0, "eps": 1e-8}}, {"new": {"lr": 1.0, "eps": 1e-6}})) == [
        "eps of the new parameters was None and is 1e-06 from here on",
        "eps of the old parameters was 1e-08 and is None from here on",
    ]


def test_discarded_gradients_leave_everything_as_it_was() -> None:
    net = model()
    optimizer = ShardOptimizer(net, CONFIG)
    before = {name: shard.detach().clone() for name, shard in optimizer.shards.items()}
    net(torch.arange(8).view(1, 8)).sum().backward()
    optimizer.take_gradients()
    optimizer.discard_gradients()
    assert optimizer.gradient_square() == 0
    assert all(torch.equal(shard, before[name]) for name, shard in optimizer.shards.items())
    assert all(float(state["step"]) == 0 for state in optimizer.state().values())


def test_changed_hyper_parameters_are_named_and_the_rate_is_not() -> None:
    before = {"decayed": {"lr": 1.0, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}}
    after = {"decayed": {"lr": 0.5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.2}}
    assert list(changed_hyper_parameters(before, after)) == ["weight_decay of the decayed parameters was 0.1 and is 0.2 from here on"]
