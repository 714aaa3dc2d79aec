"""A mutant per piece of state: a run that forgets to put it back must end otherwise than one that was never stopped.

One rank in this process, which between two attempts is made as strange as a new process on another node: other random streams, another
number of threads. The step that trains draws, beside dropout, from every generator that a run keeps, as a user's code may.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import _random as dtensor
from trainer_ranks import TINY, FolderStaging, commit, spec_of

from keepstep.trainer import loop, rng
from keepstep.trainer import run as run_module
from keepstep.trainer.attach import Attached
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.contract import Resume
from keepstep.trainer.loop import train
from keepstep.trainer.optim import local
from keepstep.trainer.parallel import join
from keepstep.trainer.parts import registry_of
from keepstep.trainer.registry import PARTS, Registry, StateMismatch
from keepstep.trainer.restore import Resumed
from keepstep.trainer.run import Run, open_run
from keepstep.trainer.state import NestedTensors, flatten

pytestmark = pytest.mark.slow
README = Path(__file__).resolve().parents[2] / "trainer" / "README.md"
STEPS, STOP = 6, 2
Mutate = Callable[[Run, Registry], Registry]

# How each part shows that it matters.
BITS: Final = "without it the run ends with other losses, tensors, streams or records"
REFUSES: Final = "it changes nothing; without it a checkpoint of another training would be loaded"
TELLS: Final = "run.toml wins over it; without it nobody would hear what has changed"
SHOWN: Final = {
    "progress": BITS,
    "threads": BITS,
    "scaler": BITS,
    "spike": BITS,
    "best": BITS,
    "traceback": BITS,
    "rng.python": BITS,
    "rng.numpy": BITS,
    "rng.torch": BITS,
    "rng.cuda": BITS,
    "rng.dtensor": BITS,
    "position": REFUSES,
    "order": REFUSES,
    "skips": REFUSES,
    "loader": REFUSES,
    "optimizer": TELLS,
    "schedule": TELLS,
}


def those(how: str) -> list[str]:
    return [name for name, shown in SHOWN.items() if shown == how]


class Devices:
    """A CUDA device as far as random streams go, and DTensor's tracker over them, on a machine that has none."""

    def __init__(self) -> None:
        self.generators = [torch.Generator() for _ in range(1)]
        self.distribute_region_enabled = True

    def track(self, mesh: Any, run_state_sync: bool = True) -> Devices:
        """Like making an OffsetBasedRNGTracker: unless told otherwise, all ranks get the stream of rank 0."""
        if run_state_sync:
            for generator in self.generators:
                generator.manual_seed(0)
        return self

    def state(self) -> torch.Tensor:
        return self.generators[0].get_state()

    def set_state(self, state: torch.Tensor, device: int) -> None:
        self.generators[device].set_state(state)

    def draw(self) -> float:
        """As a random operation on a DTensor does."""
        if dtensor._rng_tracker is None:
            dtensor._rng_tracker = dtensor.OffsetBasedRNGTracker(None)  # type: ignore[arg-type]
        return sum(float(torch.rand((), generator=generator)) for generator in self.generators)


@pytest.fixture(scope="module")
def devices() -> Iterator[Devices]:
    made, rate, threads = Devices(), loop.learning_rate, torch.get_num_threads()

    def drawn(*arguments: Any) -> float:
        return rate(*arguments) * (1 + random.random() + float(np.random.rand()) + made.draw())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rng, "_cuda_state", made.state)
        patch.setattr(rng, "init_device_mesh", lambda *arguments: None)
        patch.setattr(torch.cuda, "set_rng_state", made.set_state)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(dtensor, "OffsetBasedRNGTracker", made.track)
        patch.setattr(loop, "learning_rate", drawn)
        yield made
    torch.set_num_threads(threads)
    dtensor._rng_tracker = None


@dataclass(frozen=True)
class Ending:
    """Everything that a restart must not change."""

    records: dict[int, dict[str, Any]]  # by step, without times
    parts: dict[str, Any]  # of the final checkpoint
    result: dict[str, Any]

    def since(self, step: int) -> Ending:
        return replace(self, records={n: record for n, record in self.records.items() if n > step})


class Lab:
    """Attempts of one run, one after the other."""

    def __init__(self, root: Path, config: dict[str, Any], devices: Devices) -> None:
        self.root, self.devices = root, devices
        self.config = config | {"run": config["run"] | {"root": str(root)}}
        self.attempts = itertools.count(1)
        self.straight = self.attempt()  # never stopped

    def attempt(self, resume: Resume | None = None, mutate: Mutate = lambda run, registry: registry, **overrides: dict[str, Any]) -> Ending:
        """In as good as a new process, whose node would compute with two threads."""
        rng.seed_everything(99, number := next(self.attempts))
        for generator in self.devices.generators:
            generator.manual_seed(99 + number)
        dtensor._rng_tracker = None
        torch.set_num_threads(1 if resume is None else 2)
        staging = FolderStaging(self.root, attempt=number, rank=0, world_size=1)
        me = Attached(spec_of(self.root, 0, number, resume))
        me.__dict__["staging"] = staging
        config = TrainerConfig.model_validate({name: {**section, **overrides.get(name, {})} for name, section in self.config.items()})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module, "registry_of", lambda run: mutate(run, registry_of(run)))
            try:
                run = open_run(config, me, join(me))
                run.scaler.growth_steps = 3
                train(run)
            finally:
                dist.destroy_process_group()
        (folder,) = self.root.glob(f"data/a{number:06d}/s{STEPS:09d}-*")
        state = json.loads((folder / "rank-00000.json").read_text())["state"]
        return Ending(records=steps_in(staging), parts=state[PARTS], result=state["result"])

    def resume(self) -> Resume:
        (folder,) = self.root.glob(f"data/a000001/s{STOP:09d}-*")
        return commit(self.root, str(folder.relative_to(self.root)))


def steps_in(staging: FolderStaging) -> dict[int, dict[str, Any]]:
    timed = ("seconds", "tokens_per_s", "trained_s")
    records = (record for record in staging.records if "step" in record)
    return {record["step"]: {key: value for key, value in record.items() if key not in timed} for record in records}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, devices: Devices) -> Lab:
    tmp_path = tmp_path_factory.mktemp("lab")
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / f"text/{i}.txt").write_text(f"Chapter {i}. " + "It was a bright cold day in April, and the clocks were striking. " * 20)
    own = {
        "data": {"source": str(tmp_path / "text")},
        "train": {"precision": "fp16", "spike": {"window": 8}},
        "checkpoint": {"interval": STOP},
        "run": {"seed": 3, "steps": STEPS},
        "trace": {"interval": 2},
        "evaluate": {"interval": STOP, "patience": 9, "min_delta": 5.0},
    }
    return Lab(tmp_path, {name: TINY.get(name, {}) | own.get(name, {}) for name in TINY | own}, devices)


@pytest.fixture
def straight(lab: Lab) -> Ending:
    return lab.straight


def but(name: str, **changes: Any) -> Mutate:
    """Every part as it is, but this one with `changes`."""

    def mutate(run: Run, registry: Registry) -> Registry:
        mutant = Registry(rank=registry.rank, world_size=registry.world_size)
        mutant.add(*(replace(part, **changes) if part.name == name else part for part in registry.parts))
        return mutant

    return mutate


def without(name: str) -> Mutate:
    """A version of keepstep that does not know this part."""

    def mutate(run: Run, registry: Registry) -> Registry:
        mutant = Registry(rank=registry.rank, world_size=registry.world_size)
        mutant.add(*(part for part in registry.parts if part.name != name))
        return mutant

    return mutate


def test_every_part_has_a_mutant(straight: Ending) -> None:
    assert set(straight.parts) == set(SHOWN), "say in SHOWN how leaving out the new part shows"


def test_the_readme_has_a_word_for_every_part() -> None:
    section = README.read_text().partition("## What survives a restart")[2].partition("\n## ")[0]
    assert {name for name in SHOWN if f"`{name}`" not in section} == set()


def test_a_resumed_run_equals_one_that_was_never_stopped(lab: Lab, straight: Ending) -> None:
    assert lab.attempt(lab.resume()) == straight.since(STOP)


@pytest.mark.parametrize("name", SHOWN)
def test_a_run_that_lacks_a_part_does_not_load(lab: Lab, name: str) -> None:
    with pytest.raises(StateMismatch, match=f"not known to this run: {name}\\."):
        lab.attempt(lab.resume(), without(name))


@pytest.mark.parametrize("name", those(BITS))
def test_a_part_that_is_not_put_back_shows(lab: Lab, straight: Ending, name: str) -> None:
    mutant = lab.attempt(lab.resume(), but(name, restore=lambda saved: None))
    assert mutant != straight.since(STOP)


@pytest.mark.parametrize("kind", ["model", "optimizer"])
def test_tensors_that_are_not_put_back_show(lab: Lab, straight: Ending, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_module.resume

    def partly(me: Attached, tensors: NestedTensors, registry: Registry) -> Resumed:
        for tensor in flatten({kind: tensors[kind]}).values():
            local(tensor).zero_()
        return whole(me, {name: values for name, values in tensors.items() if name != kind}, registry)

    monkeypatch.setattr(run_module, "resume", partly)
    assert lab.attempt(lab.resume()) != straight.since(STOP)


# What another training's checkpoint could hold there.
FOREIGN: Final[dict[str, Callable[[Any], Any]]] = {
    "position": lambda saved: saved | {"position": saved["position"] + 1},
    "order": lambda saved: saved | {"seed": saved["seed"] + 1},
    "skips": lambda saved: saved | {"position": 100, "skips": [[0, 1]]},
    "loader": lambda saved: {"batches": 7},
}


@pytest.mark.parametrize("name", those(REFUSES))
def test_a_part_that_only_guards_refuses_and_nothing_else_does(lab: Lab, name: str) -> None:
    def foreign(run: Run, registry: Registry) -> Registry:
        state = registry.state()
        registry.check([state])
        state[PARTS][name] = FOREIGN[name](state[PARTS][name])
        with pytest.raises(StateMismatch) as caught:
            registry.check([state])
        assert set(caught.value.different) == {name}
        but(name, check=lambda saved: ())(run, registry).check([state])  # the mutant lets it pass
        raise Seen

    with pytest.raises(Seen):
        lab.attempt(lab.resume(), foreign)


# What no version can have meant; a restore would fail half-way, or much later.
BROKEN: Final[dict[str, tuple[Any, ...]]] = {
    "progress": (None, {}, {"step": "3", "loss_hex": ""}, {"step": 2, "loss_hex": None}, {"step": 2, "loss_hex": "x"}),
    "scaler": ({"scale": 2.0}, {"scale": 3.0, "applied": 0}, {"scale": "2", "applied": 0}, {"scale": 2.0, "applied": None}, 7),
    "spike": ({}, [["0x0p+0"]], [[1.0, 2.0]], None),
    "best": (
        None,
        {},
        {"step": 2, "nats": "x", "worse": 0, "seen": 2},
        {"step": 3, "nats": "0x1p+0", "worse": 0, "seen": 2},
        {"step": 2, "nats": "0x1p+0", "worse": True, "seen": 2},
    ),
    "threads": (0, "1", None, True),
    "traceback": (-1.0, "1", [], math.inf),
    "optimizer": (7, {"decayed": 3}),
    "schedule": (7, None),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BROKEN.items() for value in values])
def test_a_malformed_value_is_refused_before_anything_changes_at_any_world_size(lab: Lab, name: str, value: Any) -> None:
    def broken(run: Run, registry: Registry) -> Registry:
        good, before = registry.state(), registry.state()
        bad = {PARTS: good[PARTS] | {name: value}}
        elsewhere = Registry(rank=0, world_size=3)
        elsewhere.add(*registry.parts)
        elsewhere.check([good, good])
        last_rank = [good, bad] if name == "traceback" else [bad, bad]
        for mine, states in ((registry, [bad]), (elsewhere, last_rank)):
            with pytest.raises(StateMismatch) as caught:
                mine.restore(states)
            assert set(caught.value.different) == {name}
        assert registry.state() == before
        raise Seen

    with pytest.raises(Seen):
        lab.attempt(lab.resume(), broken)


class Seen(Exception):
    """The test is over before the attempt begins to train."""


CHANGED: Final = {
    "optimizer": ({"optimizer": {"weight_decay": 0.7}}, "weight_decay of the decayed parameters was 0.1 and is 0.7 from here on"),
    "schedule": ({"optimizer": {"lr": 0.001}}, "lr of the schedule was 0.003 and is 0.001 from here on"),
}


@pytest.mark.parametrize("name", those(TELLS))
def test_a_part_that_run_toml_wins_over_tells_what_has_changed(lab: Lab, name: str, caplog: pytest.LogCaptureFixture) -> None:
    overrides, sentence = CHANGED[name]
    for mutate, told in ((but(name), [sentence]), (but(name, restore=lambda saved: None), [])):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="keepstep.trainer"):
            lab.attempt(lab.resume(), mutate, **overrides)
        assert caplog.messages == told
