"""The inside of a step: figures that are right over micro-batches and ranks, and a training that does not notice that it is looked at."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from test_trainer_exactness import losses_in, result_of
from torch import nn
from trainer_ranks import TINY, commit, run_ranks, train_ranks

from keepstep.storage.canonical import canonical_json
from keepstep.trainer.config import ModelSection, TraceSection
from keepstep.trainer.models import Gpt, build_model
from keepstep.trainer.parallel import initialise
from keepstep.trainer.steptrace import StepTrace
from keepstep.trainer.traceback import Statistics, activation_statistics, known, tensor_statistics, watched

VALUES = st.floats(-100, 100, width=32) | st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf])
ARRAYS = arrays(np.float32, array_shapes(min_dims=1, max_dims=3, max_side=5), elements=VALUES)


def expected(values: np.ndarray[Any, Any]) -> Statistics:
    """The same from numpy, in float64."""
    wide = values.astype(np.float64)
    mean, rms = wide.mean(), math.sqrt((wide**2).mean())
    return Statistics(
        count=values.size,
        nonfinite=int((~np.isfinite(wide)).sum()),
        zeros=int((wide == 0).sum()),
        minimum=known(wide.min()),
        maximum=known(wide.max()),
        mean=pytest.approx(mean, rel=1e-4, abs=1e-5) if math.isfinite(mean) else None,
        rms=pytest.approx(rms, rel=1e-4, abs=1e-12) if math.isfinite(rms) else None,
    )


@given(ARRAYS)
def test_statistics_are_those_that_numpy_finds(values: np.ndarray[Any, Any]) -> None:
    with np.errstate(all="ignore"):
        assert tensor_statistics(torch.from_numpy(values)) == expected(values)


@given(ARRAYS)
def test_statistics_are_json_whatever_the_numbers_are(values: np.ndarray[Any, Any]) -> None:
    figures = tensor_statistics(torch.from_numpy(values), units=True).to_json()
    assert set(figures) == {"min", "max", "mean", "rms", "zeros", "nonfinite", "dead"}
    canonical_json(figures)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_any_dtype_will_do(dtype: torch.dtype) -> None:
    found = tensor_statistics(torch.tensor([[0, 1], [1, 1]]).to(dtype))
    assert (found.count, found.zeros, found.minimum, found.maximum, found.mean) == (4, 1, 0.0, 1.0, 0.75)


def test_nothing_is_known_of_no_element() -> None:
    assert tensor_statistics(torch.empty(0, 3)) == Statistics(
        count=0, nonfinite=0, zeros=0, minimum=None, maximum=None, mean=None, rms=None
    )


class Echo(nn.Module):
    """Gives what it gets."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@given(st.lists(arrays(np.float32, st.tuples(st.integers(1, 4), st.just(3)), elements=VALUES), min_size=1, max_size=5), st.data())
def test_calls_add_up_to_the_statistics_of_all_elements_but_for_those_that_do_not_count(parts: list[Any], data: Any) -> None:
    counts = data.draw(st.lists(st.booleans(), min_size=len(parts), max_size=len(parts)).filter(any))
    model = Echo()
    with activation_statistics(model) as found:
        for part in parts:
            model(torch.from_numpy(part))
    rows = found.rows(counts)
    whole = np.concatenate([part for part, is_counted in zip(parts, counts, strict=True) if is_counted])
    with np.errstate(all="ignore"):
        assert Statistics.of(rows["logits"].tolist()) == expected(whole)


def test_an_engine_may_pass_over_what_does_not_count() -> None:
    model = Echo()
    with activation_statistics(model) as found:
        model(torch.ones(2, 3))
        model(torch.full((1, 3), 4.0))
    assert Statistics.of(found.rows([True, False, True])["logits"].tolist()).mean == 2.0


def tiny_gpt() -> Gpt:
    model = build_model(ModelSection(layers=2, width=16, heads=2, context=8, dropout=0.2), 257)
    initialise(model, seed=1)
    return model


def ids() -> torch.Tensor:
    return torch.arange(24).view(3, 8) * 5


def test_the_modules_that_are_looked_at() -> None:
    block = ["attention", "mlp.activation", "mlp"]
    blocks = [name for i in range(2) for name in (*(f"blocks.{i}.{part}" for part in block), f"blocks.{i}")]
    model = tiny_gpt()
    with activation_statistics(model) as found:
        model(ids())
    assert list(found()) == ["tokens", "positions", *blocks, "norm", "logits"], "in the order in which they come to an end"
    assert set(found()) == set(watched(model))
    with activation_statistics(model, every=True) as found:
        model(ids())
    assert set(found()) == {name or "logits" for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}


def one_step(model: Gpt, seed: int = 0) -> list[bytes]:
    """Logits, gradients and the random stream afterwards, as bytes."""
    torch.manual_seed(seed)
    model.zero_grad()
    logits = model(ids())
    logits.square().mean().backward()
    return [tensor.detach().numpy().tobytes() for tensor in (logits, *(p.grad for p in model.parameters()), torch.get_rng_state())]


def test_looking_changes_no_bit_and_leaves_nothing_behind() -> None:
    model = tiny_gpt()
    alone = one_step(model)
    with activation_statistics(model, every=True, gradients=True) as found:
        assert one_step(model) == alone
    num_found = {name: statistics.count for name, statistics in found().items()}
    assert one_step(model) == alone
    assert {name: statistics.count for name, statistics in found().items()} == num_found
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_are_gone_after_an_error() -> None:
    model = tiny_gpt()
    with pytest.raises(IndexError), activation_statistics(model):
        model(ids() + 1000)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_gradient_of_an_activation_is_the_one_that_autograd_finds() -> None:
    model = tiny_gpt().eval()
    with activation_statistics(model, gradients=True) as found:
        logits = model(ids())
        logits.retain_grad()
        logits.square().mean().backward()
    assert logits.grad is not None
    assert found()["logits:grad"] == tensor_statistics(logits.grad)
    assert list(found())[-1] == "tokens:grad", "backwards"


def test_units_that_are_zero_for_every_sample_are_dead() -> None:
    model = tiny_gpt().eval()
    with torch.no_grad():
        model.blocks[1].mlp.up.weight.zero_()  # type: ignore[union-attr, operator]
        model.blocks[1].mlp.up.weight[:32] = model.blocks[0].mlp.up.weight[:32]  # type: ignore[union-attr, index]
    with activation_statistics(model) as found:
        model(ids())
    dead = {name: statistics.to_json()["dead"] for name, statistics in found().items() if statistics.units}
    assert dead == {"blocks.0.mlp.activation": 0.0, "blocks.1.mlp.activation": 0.5}


def test_a_module_that_overflows_is_named_and_its_figures_stay_json() -> None:
    model = tiny_gpt().eval()
    with torch.no_grad():
        model.blocks[1].mlp.out.weight.fill_(math.inf)  # type: ignore[union-attr, operator]
    with activation_statistics(model) as found:
        model(ids())
    layers = {name: statistics.to_json() for name, statistics in found().items()}
    canonical_json(layers)
    assert next(name for name, figures in layers.items() if figures["nonfinite"]) == "blocks.1.mlp"
    assert (layers["blocks.1.mlp"]["max"], layers["blocks.1.mlp"]["rms"]) == (None, None)
    assert layers["blocks.0.mlp"]["max"] is not None


# Real ranks

STEPS = 8
WORLD = 2


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """5 samples a step, at most 2 at once: rank 1 goes along in a second micro-batch that does not count."""
    text = tmp_path_factory.mktemp("text")
    for i in range(8):
        (text / f"{i}.txt").write_text(f"Chapter {i}. " + "The sky above the port was the color of television. " * 30)
    return TINY | {
        "data": TINY["data"] | {"source": str(text)},
        "train": {"batch_tokens": 80, "micro_batch_samples": 2},
        "checkpoint": {"interval": 2},
        "run": {"seed": 3, "steps": STEPS},
    }


def trained(config: dict[str, Any], root: Path, *, world_size: int = WORLD, dropout: float = 0.1, **trace: Any) -> dict[str, Any]:
    root.mkdir(exist_ok=True)
    mine = config | {"run": config["run"] | {"root": str(root)}, "trace": trace, "model": TINY["model"] | {"dropout": dropout}}
    train_ranks(root, mine, world_size=world_size)
    return mine


def records(root: Path) -> dict[int, dict[str, Any]]:
    lines = map(json.loads, (root / "records.jsonl").read_text().splitlines())
    return {record["step"]: record for record in lines if "step" in record}


@pytest.fixture(scope="module")
def sampled(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run in which every step is looked into."""
    root = tmp_path_factory.mktemp("every")
    return root, trained(config, root, interval=1)


@pytest.mark.slow
@pytest.mark.parametrize("trace", [{"interval": 0, "updates": False}, {"interval": 7}], ids=["never", "at an interval"])
def test_a_training_has_the_same_bits_however_often_it_is_looked_into(
    sampled: tuple[Path, dict[str, Any]], config: dict[str, Any], tmp_path: Path, trace: dict[str, Any]
) -> None:
    trained(config, tmp_path, **trace)
    assert losses_in(tmp_path) == losses_in(sampled[0])
    assert result_of(tmp_path, 1, STEPS)["state_sha256"] == result_of(sampled[0], 1, STEPS)["state_sha256"]
    there = [step for step, record in records(tmp_path).items() if "layers" in record]
    assert there == ([1, 7] if trace["interval"] else [])


@pytest.mark.slow
def test_exact_reduction_is_looked_into_as_well_and_does_not_notice_either(config: dict[str, Any], tmp_path: Path) -> None:
    exact = config | {"cluster": {"exact_reduction": True, "logical_ranks": 3}}
    for name, interval in (("never", 0), ("often", 2)):
        trained(exact, tmp_path / name, interval=interval)
    assert losses_in(tmp_path / "often") == losses_in(tmp_path / "never")
    layers = records(tmp_path / "often")[2]["layers"]
    assert layers["logits"]["order"] == max(figures.get("order", 0) for figures in layers.values())
    assert layers["tokens.weight"]["grad_norm"] > 0
    assert layers["tokens.weight"]["update_ratio"] > 0


@pytest.mark.slow
def test_the_first_record_after_a_restart_is_the_one_of_a_run_that_never_stopped(
    sampled: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root, mine = sampled
    before = records(root)
    assert before[1]["update_ratio_before"] is None, "there was none"
    assert all(0 < before[step]["update_ratio_before"] < 1 for step in range(2, STEPS + 1))
    (folder,) = root.glob("data/a000001/s000000004-*")
    resume = commit(root, str(folder.relative_to(root)))
    for attempt, world_size in ((2, WORLD), (3, 1)):
        (root / "records.jsonl").rename(tmp_path / f"{attempt}.jsonl")
        train_ranks(root, mine, world_size=world_size, attempt=attempt, resume=resume)
        again = records(root)[5]
        if world_size == WORLD:
            assert again["layers"] == before[5]["layers"]
            assert again["update_ratio_before"] == before[5]["update_ratio_before"]
        assert again["update_ratio_before"] == pytest.approx(before[5]["update_ratio_before"])
    (tmp_path / "2.jsonl").rename(root / "records.jsonl")


@pytest.mark.slow
def test_the_figures_of_the_layers_do_not_depend_on_how_many_ranks_there_are(config: dict[str, Any], tmp_path: Path) -> None:
    for world_size in (1, 2, 3):
        trained(config, tmp_path / str(world_size), world_size=world_size, dropout=0.0, interval=1)
    alone, *spread = (records(tmp_path / str(world_size)) for world_size in (1, 2, 3))
    for step, of in itertools.product((1, 2, 3), spread):
        assert of[step]["layers"].keys() == alone[step]["layers"].keys()
        for name, figures in alone[step]["layers"].items():
            assert of[step]["layers"][name] == pytest.approx(figures, rel=2e-3, abs=1e-6), (step, name)
        assert of[step]["param_norm"] == pytest.approx(alone[step]["param_norm"], rel=1e-5)
        assert of[step + 1]["update_ratio_before"] == pytest.approx(alone[step + 1]["update_ratio_before"], rel=1e-3)


def compares(rank: int, world_size: int, root: str, config: dict[str, Any]) -> None:
    """Each record with what one finds who puts the whole parameters together."""
    import trainer_ranks

    from keepstep.trainer import loop
    from keepstep.trainer.parallel import whole
    from keepstep.trainer.state import placed_like

    advance, gradients = loop.advance, dict[str, torch.Tensor]()
    seen: dict[int, dict[str, Any]] = {}

    def watching(run: Any, parts: Any) -> Any:
        parameters = run.engine.optimizer.parameters
        before = {name: whole(p).clone() for name, p in parameters.items()}
        take = run.engine.optimizer.update

        def taking(**options: Any) -> None:
            gradients.update({n: whole(placed_like(parameters[n], s.grad)).clone() for n, s in run.engine.optimizer.shards.items()})
            take(**options)

        run.engine.optimizer.update = taking
        agreed = advance(run, parts)
        run.engine.optimizer.update = take
        after = {name: whole(p) for name, p in parameters.items()}
        seen[run.step] = {"before": before, "after": after, "gradients": dict(gradients)}
        return agreed

    loop.advance = watching
    trainer_ranks._train(rank, world_size, root, config, 1, None, 0, "")
    if rank == 0:
        for step, record in records(Path(root)).items():
            check(record, seen[step], seen.get(step - 1))


def check(record: dict[str, Any], seen: dict[str, Any], last: dict[str, Any] | None) -> None:
    before, gradients = seen["before"], seen["gradients"]
    updates = {name: after - before[name] for name, after in seen["after"].items()}
    assert record["param_norm"] == pytest.approx(norm(*before.values()), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(norm(*gradients.values()), rel=1e-5)
    if last:
        of_last = norm(*(after - last["before"][name] for name, after in last["after"].items())) / norm(*last["before"].values())
        assert record["update_ratio_before"] == pytest.approx(of_last, rel=1e-4)
    for name, gradient in gradients.items():
        figures = record["layers"][name]
        rows = {"grad_zero_rows": (gradient == 0).flatten(1).all(1).double().mean().item()} if gradient.ndim > 1 else {}
        assert figures == pytest.approx(
            {
                "param_norm": norm(before[name]),
                "grad_norm": norm(gradient),
                "update_ratio": norm(updates[name]) / norm(before[name]),
                "grad_zeros": (gradient == 0).double().mean().item(),
                "grad_nonfinite": 0.0,
                **rows,
            },
            rel=1e-4,
        ), name


def norm(*tensors: torch.Tensor) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


@pytest.mark.slow
def test_norms_are_those_of_the_whole_parameters_gradients_and_updates(config: dict[str, Any], tmp_path: Path) -> None:
    mine = config | {"run": config["run"] | {"root": str(tmp_path), "steps": 3}, "trace": {"interval": 1}}
    run_ranks(WORLD, compares, str(tmp_path), mine)
    assert sorted(records(tmp_path)) == [1, 2, 3]


def replicated(rank: int, world_size: int) -> None:
    """A parameter cut over the ranks, one that they all hold, a plain one, and one whose gradient overflowed."""
    from types import SimpleNamespace

    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from keepstep.trainer.attach import Attached
    from keepstep.trainer.optim import local
    from keepstep.trainer.parallel import counted_in, join

    world = join(Attached(None))
    value = torch.full((3, 2), 2.0)
    parameters = {
        "cut": nn.Parameter(distribute_tensor(value, world.mesh, [Shard(0)])),
        "alike": nn.Parameter(distribute_tensor(value, world.mesh, [Replicate()])),
        "plain": nn.Parameter(value.clone()),
        "overflowed": nn.Parameter(value.clone()),
    }
    shards = {name: nn.Parameter(local(parameter)) for name, parameter in parameters.items()}
    for shard in shards.values():
        shard.grad = torch.ones_like(shard)
    shards["overflowed"].grad = torch.full_like(value, math.inf)
    model = SimpleNamespace(named_parameters=parameters.items, named_modules={}.items)
    optimizer = SimpleNamespace(parameters=parameters, shards=shards, counted=counted_in(model, world))  # type: ignore[arg-type]
    trace = StepTrace(TraceSection(interval=1), optimizer, world)  # type: ignore[arg-type]
    squares = world.gather([trace.parameter_square()]).sum().item()
    assert squares == pytest.approx(4 * 6 * 4.0)
    with trace.activations(1, Echo(), []):
        pass
    with trace.update(1, math.sqrt(squares)), torch.no_grad():
        for shard in shards.values():
            shard.add_(1)
    assert world.gather([trace.ratio_square()]).sum().item() == pytest.approx(24 / squares)
    layers = trace.layers(1, 0.5)
    assert layers is not None
    canonical_json(layers)
    finite = {"param_norm": math.sqrt(24), "grad_norm": math.sqrt(6) / 2, "update_ratio": 0.5}
    finite |= {"grad_zeros": 0, "grad_nonfinite": 0, "grad_zero_rows": 0}
    for name in ("cut", "alike", "plain"):
        assert layers[name] == pytest.approx(finite, rel=1e-5), name
    assert layers["overflowed"].pop("grad_norm") is None
    del finite["grad_norm"]
    assert layers["overflowed"] == pytest.approx(finite | {"grad_nonfinite": 1}, rel=1e-5)
    assert layers["logits"]["max"] is None, "the model was not called"


@pytest.mark.slow
def test_what_ranks_hold_alike_counts_once() -> None:
    run_ranks(3, replicated)


def trace_alone(rank: int, gather: Callable[[list[float]], torch.Tensor], config: TraceSection, *, holds: bool = True) -> StepTrace:
    linear = nn.Linear(2, 2)
    shards = dict(linear.named_parameters()) if holds else {name: torch.empty(0) for name, _ in linear.named_parameters()}
    counted = frozenset(shards if rank == 0 else ())
    optimizer = SimpleNamespace(parameters=dict(linear.named_parameters()), shards=shards, counted=counted)
    world = SimpleNamespace(rank=rank, size=2, device=torch.device("cpu"), gather=gather)
    return StepTrace(config, optimizer, world)  # type: ignore[arg-type]


def alone(row: list[float]) -> torch.Tensor:
    return torch.tensor([row], dtype=torch.float64)


@pytest.mark.parametrize("updates", [False, True])
def test_a_saved_update_is_told_once(updates: bool) -> None:
    """Where updates are not measured, nothing is known after it; where a rank holds no rows of any parameter, its part is 0."""
    trace = trace_alone(0, alone, TraceSection(updates=updates), holds=False)
    trace.part().restore(0.25)
    assert trace.ratio_square() == 0.25
    for step in (1, 2):
        with trace.update(step, 3.0):
            pass
        assert known(trace.ratio_square()) == (0.0 if updates else None)


def test_the_order_of_the_layers_is_known_where_rank_0_computes_nothing() -> None:
    model, rows = Gpt(ModelSection(layers=1, width=8, heads=2, context=4), 16), list[list[float]]()

    def gather(row: list[float]) -> torch.Tensor:
        rows.insert(0, row)
        return torch.tensor(rows, dtype=torch.float64)

    found = []
    for rank in (1, 0):
        trace = trace_alone(rank, gather, TraceSection(interval=1))
        with trace.activations(1, model, [SimpleNamespace(counts=1)] * rank):  # type: ignore[list-item]
            if rank == 1:
                model(torch.zeros(1, 4, dtype=torch.long))
        with trace.update(1, trace.parameter_square()):
            pass
        found.append(trace.layers(1, 1.0))
    orders = [{name: figures["order"] for name, figures in (layers or {}).items() if "order" in figures} for layers in found]
    assert orders[0] == orders[1]
    assert sorted(orders[1].values()) == list(range(len(watched(model))))
