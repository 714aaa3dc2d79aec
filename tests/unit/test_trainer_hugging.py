"""Models of Hugging Face transformers: built from a folder's config.json, equal to transformers' own, and spread over ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign import FOREIGN, foreign_folder, reference
from torch import Tensor
from trainer_ranks import run_ranks

from keepstep.trainer.config import LoraSection, ModelSection, OptimizerSection, TrainSection
from keepstep.trainer.models import LanguageModel, Memory, build_model, initial_value, is_lora, merge
from keepstep.trainer.models.lora import linear_layers
from keepstep.trainer.tracer import traced

V, T = 60, 12


@pytest.fixture(scope="module", params=FOREIGN)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign_folder(request.param, tmp_path_factory.mktemp(request.param), vocabulary=V)


def section(folder: Path, **fields: Any) -> ModelSection:
    return ModelSection(kind="hf", folder=str(folder), **{"context": T, **fields})


def made(folder: Path, *, train: TrainSection | None = None, outputs: int = 0) -> LanguageModel:
    """With the values of the folder's weights, where it has them."""
    model = build_model(section(folder), V, outputs=outputs, train=train)
    theirs = dict(reference(folder).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_known = name in theirs and theirs[name].shape == parameter.shape
            parameter.copy_(theirs[name] if is_known else initial_value(model, name, parameter.shape, 0))
    return model.eval()


def some_ids(*shape: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.slow
class TestEach:
    def test_parameters_have_transformers_names_and_shapes(self, folder: Path) -> None:
        theirs = {name: parameter.shape for name, parameter in reference(folder).named_parameters()}
        assert {name: parameter.shape for name, parameter in made(folder).named_parameters()} == theirs
        assert len(made(folder).blocks) == 2

    @torch.no_grad()
    def test_logits_are_those_of_transformers(self, folder: Path) -> None:
        ids = some_ids(3, T)
        assert torch.equal(made(folder)(ids), reference(folder)(ids).logits)

    @torch.no_grad()
    def test_buffers_are_those_of_transformers(self, folder: Path) -> None:
        theirs = dict(reference(folder).named_buffers())
        ours = dict(made(folder).named_buffers())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    @torch.no_grad()
    def test_tokens_one_after_the_other_give_what_all_at_once_give(self, folder: Path) -> None:
        model, ids, memory = made(folder), some_ids(2, T), Memory()
        parts = [model(part, memory) for part in ids.split([5, 1, 6], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=1e-5, rtol=1e-5)
        assert memory.length == T

    @torch.no_grad()
    def test_padding_is_seen_by_no_position_before_it(self, folder: Path) -> None:
        model, ids = made(folder), some_ids(2, T)
        padded = torch.cat([ids[:, :8], torch.full((2, 4), -100)], dim=1)
        torch.testing.assert_close(model(padded)[:, :8], model(ids)[:, :8])

    def test_initial_values_follow_from_seed_and_name_alone_and_norms_begin_as_there(self, folder: Path) -> None:
        model = made(folder)
        untrained = dict(type(reference(folder))(reference(folder).config).named_parameters())
        for name, parameter in model.named_parameters():
            value = initial_value(model, name, parameter.shape, 1)
            assert torch.equal(value, initial_value(model, name, parameter.shape, 1))
            if parameter.ndim == 1:
                assert torch.equal(value, untrained[name]), name
            else:
                assert float(value.std()) == pytest.approx(0.02, rel=0.2)
                assert not torch.equal(value, initial_value(model, name, parameter.shape, 2))

    def test_building_one_draws_no_random_number(self, folder: Path) -> None:
        before = torch.get_rng_state()
        build_model(section(folder), V)
        assert torch.equal(torch.get_rng_state(), before)

    @torch.no_grad()
    def test_adapted_it_begins_as_the_model_and_merged_it_stays_what_it_is(self, folder: Path) -> None:
        names = tuple(linear_layers(made(folder)))
        model, ids = made(folder, train=TrainSection(lora=LoraSection(rank=2, layers=names))), some_ids(2, T)
        assert torch.equal(model(ids), made(folder)(ids))
        for name, parameter in model.named_parameters():
            if is_lora(name):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        expected = model(ids)
        assert not torch.allclose(expected, made(folder)(ids), atol=1e-3)
        merge(model)
        torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)

    def test_classes_have_an_output_layer_of_their_own(self, folder: Path) -> None:
        model = made(folder, outputs=3)
        assert model(some_ids(2, T)).shape == (2, T, 3)
        assert model.get_parameter(model.output_name).shape[0] == 3

    @torch.no_grad()
    def test_a_cast_leaves_the_buffers_as_they_are(self, folder: Path) -> None:
        before = {name: buffer.clone() for name, buffer in made(folder).named_buffers()}
        cast = made(folder).to(torch.bfloat16)
        assert {parameter.dtype for parameter in cast.parameters()} == {torch.bfloat16}
        assert all(torch.equal(buffer, before[name]) for name, buffer in cast.named_buffers())

    def test_what_is_traced_of_a_pass_has_a_row_for_each_sample(self, folder: Path) -> None:
        model, ids = made(folder), some_ids(3, T)
        with traced(model) as found:
            torch.autograd.backward(F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        assert found.module == ""
        assert found.magnitudes_B is not None
        assert found.bad_B is not None
        assert found.magnitudes_B.shape == found.bad_B.shape == (3,)

    def test_one_step_on_two_ranks_is_that_of_transformers_on_one(self, folder: Path, tmp_path: Path) -> None:
        run_ranks(2, _one_step, str(folder), str(tmp_path))
        model = reference(folder)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ids = some_ids(4, T)
        F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        after = torch.load(tmp_path / "after.pt")
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(after[name], parameter.detach(), atol=1e-5, rtol=1e-4)


def _one_step(rank: int, world_size: int, folder: str, out: str) -> None:
    from keepstep.trainer.attach import Attached
    from keepstep.trainer.optim import ShardOptimizer
    from keepstep.trainer.parallel import join, put, shard, whole

    world = join(Attached(None))
    model = build_model(section(Path(folder)), V)
    shard(model, world, precision="fp32", reshard=True)
    for name, value in reference(Path(folder)).named_parameters():
        put(model.get_parameter(name), value.detach())
    optimizer = ShardOptimizer(model, OptimizerSection(kind="sgd", lr=0.1, weight_decay=0.0))
    ids = some_ids(4, T)
    mine = ids[2 * rank : 2 * rank + 2]
    model.train()
    loss = F.cross_entropy(model(mine)[:, :-1].flatten(0, 1), mine[:, 1:].flatten(), reduction="sum") / (4 * (T - 1))
    torch.autograd.backward(loss)
    optimizer.take_gradients()
    optimizer.update(lr=0.1, scale=1.0)
    after = {name: whole(parameter) for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save(after, Path(out, "after.pt"))


class TestRefusals:
    def test_a_folder_without_a_config(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r'model.folder = ".*" holds no config.json: name the local folder of a model'):
            build_model(section(tmp_path), V)

    def test_a_config_of_no_causal_model(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
        with pytest.raises(ValueError, match=r"transformers cannot build a causal model from the config.json of model.folder"):
            build_model(section(tmp_path), V)

    def test_a_tokenizer_with_more_tokens_than_the_model(self, tmp_path: Path) -> None:
        folder = foreign_folder("llama", tmp_path, vocabulary=V)
        with pytest.raises(ValueError, match=rf"has {V} tokens, and the data's tokenizer {V + 1}: use the model's own"):
            build_model(section(folder), V + 1)
        assert build_model(section(folder), V - 1)(some_ids(1, 2)).shape == (1, 2, V)

    def test_a_context_that_is_longer_than_the_models(self, tmp_path: Path) -> None:
        folder = foreign_folder("gpt2", tmp_path, vocabulary=V)
        with pytest.raises(ValueError, match=r"has 16 positions: model.context = 17 must not be more"):
            build_model(section(folder, context=17), V)

    def test_the_default_layers_of_an_adaptation_are_none_of_its_own(self, tmp_path: Path) -> None:
        folder = foreign_folder("gpt2", tmp_path, vocabulary=V)
        with pytest.raises(ValueError, match=r"matches no linear layer; they are transformer.h.0.attn.c_attn, "):
            build_model(section(folder), V, train=TrainSection(lora=LoraSection(rank=2)))
