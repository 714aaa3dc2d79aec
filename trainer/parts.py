"""The parts of a training run: what must survive a restart beside the tensors, in the order in which it is put back.

Whoever adds state to a run adds a part here; test_trainer_state_mutants.py then asks for a mutant that shows that it matters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import torch

from . import rng
from .best import Best
from .data import skips_before
from .optim import changed_hyper_parameters
from .registry import Part, Registry
from .schedule import changes, schedule_of
from .spikes import Window

if TYPE_CHECKING:
    from .run import Run

log = logging.getLogger("keepstep.trainer")

BY_STEP: Final = "by step"  # a loader whose index is the step: its workers have nothing that a restart could lose, see loader.py


def registry_of(run: Run) -> Registry:
    """Every part of `run`."""
    registry = Registry(rank=run.world.rank, world_size=run.world.size, tensor_parallel=run.world.tensor_size)
    registry.add(
        _progress(run),
        _position(run),
        _order(run),
        _skips(run),
        _loader(),
        _optimizer(run),
        _schedule(run),
        run.scaler.part(),
        _spikes(run),
        _best(run),
        threads(),
        run.trace.part(),
        *_streams(run),
    )
    return registry


def _progress(run: Run) -> Part:
    def check(saved: dict[str, Any]) -> Iterable[str]:
        if type(saved["step"]) is not int or saved["step"] < 0:
            yield f"step {saved['step']!r} is none"
        if saved["loss_hex"] != "":
            float.fromhex(saved["loss_hex"])

    def restore(saved: dict[str, Any]) -> None:
        run.step, run.loss_hex = saved["step"], saved["loss_hex"]

    return Part(name="progress", capture=lambda: {"step": run.step, "loss_hex": run.loss_hex}, restore=restore, check=check)


def _position(run: Run) -> Part:
    """Of the canonical order: a function of the step, so there is nothing to put back; another one would repeat or leave out samples."""

    def check(saved: dict[str, Any]) -> Iterable[str]:
        if saved["position"] != (here := run.feed.end(saved["step"])):
            where = f"step {saved['step']} stood at position {saved['position']} of the samples' order"
            yield f"{where}, with this batch and these skips it stands at {here}"

    return Part(
        name="position", capture=lambda: {"step": run.step, "position": run.feed.end(run.step)}, restore=lambda saved: None, check=check
    )


def _order(run: Run) -> Part:
    """What decides which sample stands at a position: in another order the samples to come are not those that are left."""

    def capture() -> dict[str, Any]:
        fields = {**asdict(run.feed.order), "samples_per_step": run.feed.samples_per_step, "context": run.config.model.context}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def check(saved: dict[str, Any]) -> Iterable[str]:
        now = capture()
        for name in sorted(saved.keys() | now.keys()):
            if saved.get(name) != now.get(name):
                yield f"{name} was {saved.get(name)} and is {now.get(name)} now"

    return Part(name="order", capture=capture, restore=lambda saved: None, check=check)


def _skips(run: Run) -> Part:
    """Positions that are left out. Later ones may come and go; those before the checkpoint have decided what it was trained on."""

    def capture() -> dict[str, Any]:
        return {"position": run.feed.end(run.step), "skips": [list(skip) for skip in run.feed.skips]}

    def check(saved: dict[str, Any]) -> Iterable[str]:
        position = saved["position"]
        then, now = (skips_before(skips, position) for skips in (((first, last) for first, last in saved["skips"]), run.feed.skips))
        if then != now:
            told, asked = (", ".join(f"{first}:{last}" for first, last in skips) or "nothing" for skips in (then, now))
            yield f"up to its position {position} it had left out {told}, and this run leaves out {asked}: go back to a commit before that"

    return Part(name="skips", capture=capture, restore=lambda saved: None, check=check)


def _loader() -> Part:
    def check(saved: Any) -> Iterable[str]:
        if saved != BY_STEP:
            yield f"its loader had a state of its own ({saved!r}), this one reads by step and has none"

    return Part(name="loader", capture=lambda: BY_STEP, restore=lambda saved: None, check=check)


def _optimizer(run: Run) -> Part:
    """Hyper-parameters of every group, also of one without parameters. Moments are tensors. run.toml wins, and what it changes is told."""

    def capture() -> dict[str, Any]:
        return run.engine.optimizer.hyper_parameters()

    def check(saved: dict[str, Any]) -> Iterable[str]:
        list(changed_hyper_parameters(saved, capture()))  # raises where it cannot be compared
        return ()

    def restore(saved: dict[str, Any]) -> None:
        for sentence in changed_hyper_parameters(saved, capture()):
            log.warning("%s", sentence)

    return Part(name="optimizer", capture=capture, restore=restore, check=check)


def _schedule(run: Run) -> Part:
    """What the learning rate follows beside the step. run.toml wins, and what it changes is told."""

    def capture() -> dict[str, Any]:
        return schedule_of(run.config.optimizer, run.config.run.steps)

    def check(saved: dict[str, Any]) -> Iterable[str]:
        list(changes(saved, capture(), ""))  # raises where it cannot be compared
        return ()

    def restore(saved: dict[str, Any]) -> None:
        for sentence in changes(saved, capture(), "of the schedule"):
            log.warning("%s", sentence)

    return Part(name="schedule", capture=capture, restore=restore, check=check)


def _spikes(run: Run) -> Part:
    """The recent losses and gradient norms: without them a spike soon after a restart would pass, and a run that was never stopped would
    have refused it."""

    def capture() -> list[list[str]]:
        return run.window.to_json()

    def check(saved: list[list[str]]) -> Iterable[str]:
        if not isinstance(saved, list):
            yield f"the recent steps are {saved!r}"
        Window.from_json(len(saved), saved)

    def restore(saved: list[list[str]]) -> None:
        run.window = Window.from_json(run.config.train.spike.window, saved)

    return Part(name="spike", capture=capture, restore=restore, check=check)


def _best(run: Run) -> Part:
    """What the evaluations have come to: without it a training that gets no better would go on for longer after each restart."""

    def capture() -> dict[str, Any]:
        return run.best.to_json()

    def check(saved: dict[str, Any]) -> Iterable[str]:
        Best.from_json(saved)  # raises where it cannot be read
        return ()

    def restore(saved: dict[str, Any]) -> None:
        run.best = Best.from_json(saved)

    return Part(name="best", capture=capture, restore=restore, check=check)


def threads() -> Part:
    """Of PyTorch: how many a sum is split over decides its last bits, and nodes have different numbers of cores."""

    def restore(saved: int) -> None:
        if saved != torch.get_num_threads():
            log.info("computing with %d threads as before; this node would take %d", saved, torch.get_num_threads())
            torch.set_num_threads(saved)

    def check(saved: Any) -> Iterable[str]:
        if type(saved) is not int or saved < 1:
            yield f"{saved!r} threads cannot compute"

    def as_rank_0(saved: Sequence[int]) -> str:
        restore(saved[0])
        return ""

    return Part(
        name="threads",
        capture=torch.get_num_threads,
        restore=restore,
        check=check,
        per_rank=True,
        elsewhere=as_rank_0,
        check_elsewhere=check,
    )


def _streams(run: Run) -> list[Part]:
    """With exact reduction a stream is one of (step, logical rank) while a step computes, and the same on all ranks in between."""

    if run.config.cluster.exact_reduction:
        return rng.derived_parts(lambda: rng.seed_everything(run.config.run.seed, run.step))  # as exact.py leaves them after a step

    def derive() -> str:
        rng.seed_everything(run.config.run.seed, run.step, run.world.data_rank)
        return "random streams follow from (seed, step, rank)"

    return rng.parts(derive)
