"""Learning rate, clipping, and AdamW on shards."""

from __future__ import annotations

import math

import pytest
import torch

from keepstep.trainer.config import ModelSection, OptimizerSection
from keepstep.trainer.models import build_model, initial_value
from keepstep.trainer.optim import ShardOptimizer, changed_hyper_parameters, changes, clip_scale, learning_rate, schedule_of

CONFIG = OptimizerSection(lr=1.0, min_lr_ratio=0.1, warmup_steps=10)


def test_the_learning_rate_warms_up_and_follows_a_cosine() -> None:
    rates = [learning_rate(CONFIG, step, 110) for step in range(1, 111)]
    assert rates[:10] == [pytest.approx(step / 10) for step in range(1, 11)]
    assert rates[59] == pytest.approx(0.55)  # half-way down
    assert rates[-1] == pytest.approx(0.1)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_without_warm_up_the_first_step_is_near_the_peak() -> None:
    assert learning_rate(CONFIG.model_copy(update={"warmup_steps": 0}), 1, 1000) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("norm", "clip_norm", "scale"), [(0.5, 1.0, 1.0), (4.0, 1.0, 0.25), (4.0, 0.0, 1.0), (0.0, 1.0, 1.0)])
def test_gradients_are_scaled_down_to_the_clip_norm(norm: float, clip_norm: float, scale: float) -> None:
    assert clip_scale(norm, clip_norm) == scale


def model() -> torch.nn.Module:
    made = build_model(ModelSection(layers=1, width=16, heads=2, context=8, dropout=0.0), 20)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, 0, 1))
    return made


def test_updates_are_those_of_plain_adamw() -> None:
    mine, reference = model(), model()
    config = OptimizerSection(weight_decay=0.1, clip_norm=0.0)
    optimizer = ShardOptimizer(mine, config)
    decayed = [p for p in reference.parameters() if p.ndim > 1]
    exempt = [p for p in reference.parameters() if p.ndim <= 1]
    plain = torch.optim.AdamW(
        [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )
    ids = torch.arange(16).view(2, 8)
    for _ in range(3):
        for net in (mine, reference):
            net(ids).square().mean().backward()
        optimizer.take_gradients()
        optimizer.update(lr=0.01, scale=1.0)
        plain.step()
        plain.zero_grad()
    for (name, ours), theirs in zip(mine.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_gradient_square_is_that_of_the_global_norm() -> None:
    net = model()
    optimizer = ShardOptimizer(net, CONFIG)
    net(torch.arange(8).view(1, 8)).sum().backward()
    expected = float(torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None]))
    optimizer.take_gradients()
    assert math.sqrt(optimizer.gradient_square()) == pytest.approx(expected)


def test_state_exists_before_the_first_step() -> None:
    state = ShardOptimizer(model(), CONFIG).state()
    assert {key for entry in state.values() for key in entry} == {"step", "exp_avg", "exp_avg_sq"}


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


def test_a_changed_schedule_is_told_key_by_key() -> None:
    before, after = schedule_of(CONFIG, 100), schedule_of(CONFIG.model_copy(update={"lr": 0.5, "warmup_steps": 3}), 100)
    assert list(changes(before, after, "of the schedule")) == [
        "lr of the schedule was 1.0 and is 0.5 from here on",
        "warmup_steps of the schedule was 10 and is 3 from here on",
    ]
    assert list(changes(before, before, "of the schedule")) == []


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
