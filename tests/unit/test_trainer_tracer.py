"""Which module is named when a value is not finite: the one that made it, forward or backward, and the sample that it was made of."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from keepstep.trainer.autopsy import sample_nll
from keepstep.trainer.config import ModelSection
from keepstep.trainer.models import Gpt, build_model, initial_value
from keepstep.trainer.poison import WAYS, _plant
from keepstep.trainer.samples import IGNORED
from keepstep.trainer.tracer import Traced, traced

MODEL = ModelSection(layers=2, width=16, heads=2, context=8)
IDS_BT = torch.arange(4 * 9).view(4, 9)
BAD = 2  # the sample that is spoilt


@pytest.fixture
def model() -> Gpt:
    model = build_model(MODEL, 64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(model, name, parameter.shape, 0))
    return model.eval()


def a_pass(model: nn.Module, *, backward: bool = False) -> tuple[Traced, Tensor]:
    with traced(model) as found, torch.set_grad_enabled(backward):
        nll_B = sample_nll(model(IDS_BT[:, :-1]), IDS_BT[:, 1:])
        if backward:
            torch.autograd.backward(nll_B.sum())
    return found, nll_B.detach()


MODULES = [name for name, _ in build_model(MODEL, 64).named_modules() if name not in ("positions", "blocks")]


@pytest.mark.parametrize("module", MODULES)
def test_the_module_whose_output_is_not_finite_first_is_named(model: Gpt, module: str) -> None:
    _plant(model, IDS_BT[BAD, :-1], module, WAYS["output"])
    found, nll_B = a_pass(model)
    assert found.module == (module or "model")
    assert torch.isfinite(nll_B).tolist() == [i != BAD for i in range(4)]


@pytest.mark.parametrize("module", MODULES)
def test_the_module_whose_gradient_is_not_finite_first_is_named(model: Gpt, module: str) -> None:
    _plant(model, IDS_BT[BAD, :-1], module, WAYS["gradient"])
    found, nll_B = a_pass(model, backward=True)
    assert torch.isfinite(nll_B).all()
    assert found.module == (module or "model")
    assert found.is_bad_weight
    assert found.bad_B is not None
    assert found.bad_B.tolist() == [i == BAD and module != "tokens" for i in range(4)], "an embedding's input has no gradient"


def test_a_functional_call_is_told_of_the_module_that_makes_it(model: Gpt) -> None:
    """Queries and keys that are too large: they are finite, their products are not. Some CPUs' flash kernel makes noughts of those."""
    width = model.config.width
    with torch.no_grad():
        model.blocks[1].attention.qkv.weight[: 2 * width] *= 1e25
    with sdpa_kernel(SDPBackend.MATH):
        found, _ = a_pass(model)
    assert found.module == "blocks.1.attention"


def test_a_healthy_pass_blames_nobody_and_leaves_no_hook(model: Gpt) -> None:
    expected = sample_nll(model(IDS_BT[:, :-1]), IDS_BT[:, 1:])
    found, nll_B = a_pass(model, backward=True)
    assert (found.module, found.is_bad_weight) == ("", False)
    assert torch.equal(nll_B, expected.detach())
    assert found.bad_B is not None
    assert not found.bad_B.any()
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    for parameter in model.parameters():
        assert not parameter._backward_hooks
        parameter.grad = None


def test_a_samples_magnitude_is_the_norm_of_its_own_gradient(model: Gpt) -> None:
    found, _ = a_pass(model, backward=True)
    assert found.magnitudes_B is not None
    for i in range(4):
        x_BTC = model.tokens(IDS_BT[i : i + 1, :-1]).detach().requires_grad_()
        hidden = x_BTC + model.positions(torch.arange(8))
        for block in model.blocks:
            hidden = block(hidden)
        nll = sample_nll(nn.functional.linear(model.norm(hidden), model.tokens.weight), IDS_BT[i : i + 1, 1:])
        nll.sum().backward()
        assert x_BTC.grad is not None
        assert math.isclose(float(found.magnitudes_B[i]), float(x_BTC.grad.norm()), rel_tol=1e-4)


def test_the_loss_of_a_sample_is_its_own_and_padding_does_not_count(model: Gpt) -> None:
    logits_BTV = model(IDS_BT[:, :-1])
    targets_BT = IDS_BT[:, 1:].clone()
    whole = sample_nll(logits_BTV, targets_BT)
    assert torch.allclose(whole.sum(), nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum"))
    targets_BT[1, 3:] = -100
    part = sample_nll(logits_BTV, targets_BT)
    assert part[1] < whole[1]
    assert torch.equal(part[[0, 2, 3]], whole[[0, 2, 3]])


def test_a_padded_sample_is_planted_as_the_model_sees_it() -> None:
    """data.pack = "documents": its row ends with IGNORED, which the model is given as it is."""

    class Padded(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids.clamp(min=0))

    model = nn.Sequential(Padded(4, 2), nn.Linear(2, 2))
    _plant(model, torch.tensor([1, 2, IGNORED, IGNORED]), "1", WAYS["output"])
    rows = torch.tensor([[1, 2, IGNORED, IGNORED], [1, 2, 0, IGNORED]])
    assert model(rows).isnan().all((1, 2)).tolist() == [True, False]
