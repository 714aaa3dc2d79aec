"""Trainings that really happened, for tests of the diagnosis: by the LM trainer, or by a script of a few lines around a small network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w
from trainer_ranks import train_ranks, write_log

from keepstep.storage.canonical import canonical_json
from keepstep.storage.layout import RUN_CONFIG_KEY, steps_key
from keepstep.storage.store import Store
from keepstep.trainer.columns import Course
from keepstep.trainer.course import read_course

SMALL: Mapping[str, Mapping[str, Any]] = {
    "data": {"tokenizer": "bytes", "held_out": 0.1},
    "model": {"layers": 2, "width": 32, "heads": 2, "context": 32, "dropout": 0.0},
    "optimizer": {"lr": 3e-3, "warmup_steps": 10},
    "train": {"batch_tokens": 512},
    "evaluate": {"interval": 20, "max_tokens": 2000},
    "trace": {"interval": 10},
    "checkpoint": {"interval": 10_000},
}


def trained(
    root: Path, text: Mapping[str, str], *, steps: int, stop_at: int = 0, may_fail: bool = False, **sections: Mapping[str, Any]
) -> Course:
    """One attempt of the LM trainer, on documents by name; sections come on top of `SMALL`. Stops at `stop_at` if that is not 0."""
    folder = root / "text"
    folder.mkdir(parents=True)
    for name, body in text.items():
        (folder / f"{name}.txt").write_text(body)
    own = {"run": {"root": str(root), "steps": steps, "seed": 1}, "data": {"source": str(folder)}}
    config = {name: {**SMALL.get(name, {}), **own.get(name, {}), **sections.get(name, {})} for name in {*SMALL, *own, *sections}}
    (root / RUN_CONFIG_KEY).write_text(tomli_w.dumps(config))
    try:
        train_ranks(root, config, world_size=1, stop_at=stop_at)
    except AssertionError:
        if not may_fail:
            raise
    write_log(root, 1, [])
    return read_course(Store.open(root))


def recorded(root: Path, records: Iterator[Mapping[str, Any]]) -> Course:
    """Of a script: what it wrote down of its steps, as keepstep's own trainer does."""
    root.mkdir(parents=True, exist_ok=True)
    store = Store.open(root)
    for record in records:
        store.append(steps_key(1), canonical_json({key: _plain(value) for key, value in record.items()}))
    write_log(root, 1, [])
    return read_course(store)


def script(
    model: Any,
    batches: Callable[[int], tuple[Any, Any]],
    *,
    steps: int,
    lr: float,
    loss: Callable[[Any, Any], Any],
    momentum: float = 0.0,
    sample_every: int = 5,
) -> Iterator[dict[str, Any]]:
    """SGD on a network; yields a record per step, with layers in sampled ones."""
    import torch

    from keepstep.trainer.traceback import activation_statistics

    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for step in range(1, steps + 1):
        inputs, targets = batches(step)
        with activation_statistics(model, every=True) as found:
            value = loss(model(inputs), targets)
            optimizer.zero_grad()
            value.backward()
        parameters = dict(model.named_parameters())
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters.values()))
        size = math.sqrt(sum(float(p.detach().square().sum()) for p in parameters.values()))
        record: dict[str, Any] = {
            "step": step,
            "loss": float(value.detach()),
            "grad_norm": norm,
            "param_norm": size,
            "lr": lr,
            "seconds": 0.01,
        }
        if step == 1 or step % sample_every == 0:
            record["layers"] = _layers(found(), parameters)
        yield record
        optimizer.step()


def _layers(found: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    modules = {name: {**one.to_json(), "order": order} for order, (name, one) in enumerate(found.items())}
    norms = {
        name: {"grad_norm": _plain(float(p.grad.norm())), "param_norm": _plain(float(p.detach().norm()))} for name, p in parameters.items()
    }
    return modules | norms


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
