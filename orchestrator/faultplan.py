"""PLAN.toml of `keepstep chaos`: checked like run.toml, and drawn from its seed. Pure.

The same text gives the same faults on every machine and under every Python: what is drawn comes from SHA-256, not from a library's
random numbers.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from .errors import InputError
from .faultkinds import KINDS, After, AtStep, Fault, Kind
from .relations import nearest
from .rules import shown
from .sections import RunConfig

FIRST, LAST = 0.15, 0.85  # of the run's steps: between them what is drawn is spread


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class FaultEntry(_Part):
    """One [[faults]] of the file."""

    fault: str
    """What is done; one of the known kinds."""
    at_step: int | None = Field(None, ge=1)
    """When all ranks have finished this step for the first time."""
    after_s: float | None = Field(None, gt=0)
    """Or so long after all ranks began to train."""
    rank: int | Literal["random"] = "random"
    """The rank that is hit, or whose node is."""
    node: str = ""
    """The node that is hit, by name ("node1"), instead of a rank's."""
    lasting_s: float | None = Field(None, gt=0)
    """How long it goes on."""


class DrawEntry(_Part):
    """[draw]: faults from weights."""

    count: int = Field(ge=1)
    """So many faults, spread over the run."""
    weights: Mapping[str, Annotated[float, Field(gt=0)]]
    """Fault -> how likely it is beside the others."""
    lasting_s: tuple[float, float] = (1.0, 10.0)
    """Shortest and longest time that a drawn fault goes on, where it has to end."""


class PlanFile(_Part):
    """A whole PLAN.toml."""

    seed: int = 0
    """Of everything that is drawn."""
    run: str
    """Path of the run.toml, from the plan's own folder."""
    overrides: tuple[str, ...] = ()
    """On top of it, each "section.key=value"."""
    hosts: Literal["processes", "namespaces"] = "processes"
    """What a node is: processes of this machine, or a host in network namespaces (needs root)."""
    faults: tuple[FaultEntry, ...] = ()
    draw: DrawEntry | None = None


def parse(text: str, name: str) -> PlanFile:
    """`name` is what messages call the file. Raises InputError with every problem that it finds."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{name}: not TOML: {error}") from None
    try:
        plan = PlanFile.model_validate(tables)
    except ValidationError as error:
        raise InputError(*(f"{name}: {_problem(found)}" for found in error.errors())) from None
    if problems := [*_wrong_kinds(plan), *_wrong_moments(plan), *_wrong_durations(plan)]:
        raise InputError(*(f"{name}: {problem}" for problem in problems))
    return plan


def _problem(error: ErrorDetails) -> str:
    key = _path(error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{key} is not a key; {nearest(str(error['loc'][-1]), _model_at(error['loc']).model_fields)}"
    if error["type"] == "missing":
        return f"{key} is missing: {_model_at(error['loc']).model_fields[str(error['loc'][-1])].description}"
    return f"{shown(key, error['input'])} must {error['msg'].partition(' should ')[2] or error['msg']}"


def _path(loc: Sequence[int | str]) -> str:
    """("faults", 2, "at_step") -> "faults[2].at_step"."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _model_at(loc: Sequence[int | str]) -> type[_Part]:
    parts: Mapping[int | str, type[_Part]] = {"faults": FaultEntry, "draw": DrawEntry}
    return parts.get(loc[0], PlanFile) if len(loc) > 1 else PlanFile


def _wrong_kinds(plan: PlanFile) -> Iterator[str]:
    named = [(f"faults[{i}].fault", entry.fault) for i, entry in enumerate(plan.faults)]
    named += [("draw.weights", kind) for kind in (plan.draw.weights if plan.draw else ())]
    for key, name in named:
        if name not in KINDS:
            yield f'{key}: "{name}" is not a fault; {nearest(name, KINDS)}'
        elif KINDS[name].needs_hosts and plan.hosts != "namespaces":
            yield f'{key}: "{name}" needs hosts with a network of their own: set hosts = "namespaces", as root'
    if not named:
        yield "there is nothing to break: give [[faults]], or [draw] with count and weights"


def _wrong_moments(plan: PlanFile) -> Iterator[str]:
    for i, entry in enumerate(plan.faults):
        if (entry.at_step is None) == (entry.after_s is None):
            yield f"faults[{i}] needs either at_step or after_s"


def _wrong_durations(plan: PlanFile) -> Iterator[str]:
    for i, entry in enumerate(plan.faults):
        lasts = KINDS[entry.fault].lasts if entry.fault in KINDS else "may"
        if lasts == "must" and entry.lasting_s is None:
            yield f"faults[{i}].lasting_s is missing: {entry.fault} has to end"
        if lasts == "no" and entry.lasting_s is not None:
            yield f"{shown(f'faults[{i}].lasting_s', entry.lasting_s)} must go: {entry.fault} happens in an instant"
    if plan.draw and not 0 < plan.draw.lasting_s[0] <= plan.draw.lasting_s[1]:
        yield f"{shown('draw.lasting_s', plan.draw.lasting_s)} must be two positive numbers, the smaller first"


def draw(plan: PlanFile, config: RunConfig, name: str) -> tuple[Fault, ...]:
    """The plan's faults for this run. Raises InputError where the two do not fit."""
    if problems := list(_misfits(plan, config)):
        raise InputError(*(f"{name}: {problem}" for problem in problems))
    listed = tuple(_listed(plan, entry, i, config) for i, entry in enumerate(plan.faults))
    drawn = tuple(_drawn(plan, plan.draw, i, config) for i in range(plan.draw.count)) if plan.draw else ()
    return (*listed, *drawn)


def _misfits(plan: PlanFile, config: RunConfig) -> Iterator[str]:
    for i, entry in enumerate(plan.faults):
        if entry.at_step is not None and entry.at_step >= config.run.steps:
            yield f"{shown(f'faults[{i}].at_step', entry.at_step)} must be below {shown('run.steps', config.run.steps)}"
        if entry.rank != "random" and not 0 <= entry.rank < world_size(config):
            yield f"{shown(f'faults[{i}].rank', entry.rank)} must be one of the {world_size(config)} ranks, counted from 0"
        if entry.node and entry.node not in node_names(config):
            yield f'faults[{i}].node: "{entry.node}" is not a node; {nearest(entry.node, node_names(config))}'
    for kind in _used(plan):
        if kind.action and config.train.script:
            yield f"{kind.name} needs keepstep's own trainer: {config.train.script} has no fault points"


def _used(plan: PlanFile) -> list[Kind]:
    names = [entry.fault for entry in plan.faults] + list(plan.draw.weights if plan.draw else ())
    return [KINDS[name] for name in dict.fromkeys(names)]


def world_size(config: RunConfig) -> int:
    return config.cluster.nodes * max(1, config.cluster.ranks_per_node)


def node_names(config: RunConfig) -> tuple[str, ...]:
    """Of the nodes that `keepstep run` and `chaos` simulate, spares included."""
    return tuple(f"node{i}" for i in range(config.cluster.nodes + config.cluster.spares))


def _listed(plan: PlanFile, entry: FaultEntry, index: int, config: RunConfig) -> Fault:
    rank = entry.rank if entry.rank != "random" else int(_lot(plan.seed, index, "listed rank") * world_size(config))
    moment = AtStep(entry.at_step) if entry.at_step is not None else After(entry.after_s or 0.0)
    return Fault(kind=KINDS[entry.fault], moment=moment, rank=rank, node=entry.node, lasting_s=entry.lasting_s)


def _drawn(plan: PlanFile, draw: DrawEntry, index: int, config: RunConfig) -> Fault:
    """The run's middle is cut into as many parts as there are faults; each part gets one."""
    kind = KINDS[_choice(draw.weights, _lot(plan.seed, index, "kind"))]
    share = FIRST + (LAST - FIRST) * (index + _lot(plan.seed, index, "step")) / draw.count
    rank = int(_lot(plan.seed, index, "rank") * world_size(config))
    shortest, longest = draw.lasting_s
    lasting_s = round(shortest + (longest - shortest) * _lot(plan.seed, index, "lasting"), 1) if kind.lasts == "must" else None
    return Fault(kind=kind, moment=AtStep(max(1, int(share * config.run.steps))), rank=rank, lasting_s=lasting_s)


def _choice(weights: Mapping[str, float], lot: float) -> str:
    """`lot` in [0, 1) falls on one of the names, in proportion to their weights."""
    sums = list(accumulate(weights.values()))
    return next(name for name, upper in zip(weights, sums, strict=True) if lot * sums[-1] < upper)


def _lot(seed: int, index: int, what: str) -> float:
    """In [0, 1), the same everywhere."""
    digest = hashlib.sha256(f"{seed} {index} {what}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)


def table(faults: Sequence[Fault]) -> Iterator[Mapping[str, Any]]:
    """The drawn plan as rows: number, moment, fault, what that is."""
    for number, fault in enumerate(faults, start=1):
        yield {"number": number, "moment": str(fault.moment), "fault": str(fault), "about": fault.kind.about}
