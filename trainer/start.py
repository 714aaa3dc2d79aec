"""The initial values of a run: random ones, or those that train.start names, read straight into the shards of every rank.

What names and shapes there are is compared before a value is read and before anything is written below the root. Tensors of files may
have half precision, which is widened, and GPT-2's matrices are turned; both go through copies, of 256 MiB at a time.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from keepstep.storage.errors import DamagedCheckpoint
from keepstep.storage.manifest import Manifest, TensorEntry
from keepstep.storage.store import Store
from keepstep.storage.verify import CheckpointReader

from .config import TrainerConfig
from .matching import Differences, Kind
from .models import LanguageModel, is_lora
from .models.names import FOREIGN_KINDS, differences, foreign_name, is_transposed
from .models.patterns import chosen, listed
from .origin import PART, START_KEY, Origin, locate, other_vocabulary, recall
from .parallel import World, initialise, put
from .restore import restore
from .state import placed_like

log = logging.getLogger("keepstep.trainer")

_COPIES_BYTES: Final = 256 << 20
_WIDENED: Final = frozenset({"float16", "bfloat16"})  # each of their values is one of float32
_FORMER: Final = re.compile(r"(\.attn\.(masked_)?bias|\.rotary_emb\.inv_freq)$")  # buffers, which older versions of transformers saved

Alive = Callable[[], None]


class StartMismatch(ValueError):
    """What train.start names is sound, but it is not of this model; the message says what differs, and what to do."""


class StartChanged(RuntimeError):
    """The bytes that a run began with are no more what they were."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Where one of our parameters is to be had."""

    entry: TensorEntry
    is_transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.entry.global_shape
        return shape[::-1] if self.is_transposed else shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """By our names: what is read, and what begins with random values."""

    origin: Origin
    found: Mapping[str, Found]
    random: frozenset[str]


def begin(
    config: TrainerConfig, store: Store, world: World, model: LanguageModel, parameters: Mapping[str, Tensor], alive: Alive = lambda: None
) -> None:
    """Collective. Gives every parameter its initial value; the same at any world size, and in any attempt.

    Args:
        store: of the root. It keeps what train.start meant when the run began.
        parameters: those of `model` by name, as a checkpoint has them.
        alive: called before what may take long, and while it does.

    Raises:
        StartMismatch: it is of another model. Nothing was written.
        ValueError: it is not there, or none.
        StartChanged: its bytes are no more what they were.
    """
    if not config.train.start:
        initialise(model, seed=config.run.seed)
        return
    alive()  # rank 0 may read long, and all wait for it
    if world.rank == 0 and recall(store, config.train.start) is None:
        origin = locate(config.train.start)
        plan_for(config, origin, model, parameters)
        store.put_new(START_KEY, origin.hashed(alive).body())  # if another attempt was faster, then that is what the run begins with
    dist.barrier()
    decided = recall(store, config.train.start)
    assert decided is not None
    plan = plan_for(config, decided, model, parameters)
    initialise(model, seed=config.run.seed, only=plan.random)
    try:
        _read(plan, parameters, decided.reader(alive))
    except DamagedCheckpoint as error:
        raise StartChanged(f"{decided.name} is no more what this run began with ({START_KEY} in its root): {error}") from error
    random = f"; with random values: {listed(sorted(plan.random))}" if plan.random else ""
    log.info("rank %d: begins with %d tensors of %s%s", world.rank, len(plan.found), decided.name, random)


def plan_for(config: TrainerConfig, origin: Origin, model: LanguageModel, parameters: Mapping[str, Tensor]) -> Plan:
    """Which of its tensors go where.

    Raises:
        StartMismatch: names, shapes or types differ that train.start_without does not name.
        ValueError: a pattern of that matches nothing.
    """
    is_foreign = _is_foreign(config, origin, parameters)
    if is_foreign and origin.settings is not None and config.model.kind in FOREIGN_KINDS:
        _check_settings(config, origin)
    found = dict(_found(config.model.kind if is_foreign else "", origin, parameters))
    used = {match.entry.name for match in found.values()}
    extra = [
        name for name, entry in origin.tensors.items() if entry.name not in used and not (is_foreign and _is_idle(name, model, parameters))
    ]
    told = _compared(parameters, found, extra)
    names = {*parameters, *origin.tensors}
    without = chosen(sorted(names), config.train.start_without, "train.start_without") if config.train.start_without else frozenset()
    lora = frozenset(name for name in told.missing if is_lora(name))
    if (wrong := told.without(without | lora)).names():
        raise StartMismatch(f"{origin.name} is of another model: {_sentence(config, origin, model, wrong)}")
    random = (told.names() - set(extra)) | {name for name in without if name in parameters}
    return Plan(origin=origin, found={name: match for name, match in found.items() if name not in random}, random=frozenset(random))


def _is_foreign(config: TrainerConfig, origin: Origin, parameters: Mapping[str, Tensor]) -> bool:
    """Whether names are those of transformers: always for its models, for ours where none of our names is there."""
    if origin.is_run:
        return False
    has_ours = any(name.startswith("blocks.") for name in origin.tensors)
    return config.model.kind == "hf" or (config.model.kind in FOREIGN_KINDS and not has_ours)


def _check_settings(config: TrainerConfig, origin: Origin) -> None:
    assert origin.settings is not None
    if told := list(differences(config.model, origin.settings, is_classifier=config.train.objective == "classes")):
        raise StartMismatch(
            f'{origin.name} is another model by its config.json: {"; ".join(told)}. Set [model] so, or use model.kind = "hf"'
        )


def _found(kind: str, origin: Origin, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Found]]:
    """Args: kind: whose names transformers has others for; "" and "hf": they are called the same there."""
    for name in parameters:
        is_ours = kind in FOREIGN_KINDS and not is_lora(name)
        theirs = foreign_name(kind, name) if is_ours else name
        short = theirs.partition(".")[2]  # files of a model without its output layer leave out the first part of their names
        entry = origin.tensors.get(theirs) or (origin.tensors.get(short) if kind else None)
        if entry is not None:
            yield name, Found(entry=entry, is_transposed=is_ours and is_transposed(kind, name))


def _is_idle(name: str, model: LanguageModel, parameters: Mapping[str, Tensor]) -> bool:
    """Of a file of transformers: a buffer, or an output layer that is the embedding once more."""
    is_output = name in {model.output_name, "lm_head.weight"} and model.output_name not in parameters
    return is_output or _FORMER.search(name) is not None


def _compared(parameters: Mapping[str, Tensor], found: Mapping[str, Found], extra: Sequence[str]) -> Differences:
    here: dict[str, Kind] = {name: (str(each.dtype).removeprefix("torch."), tuple(each.shape)) for name, each in parameters.items()}
    there: dict[str, Kind] = {name: (match.entry.dtype, match.shape) for name, match in found.items()}
    both = sorted(found)
    return Differences(
        missing=tuple(sorted(here.keys() - there.keys())),
        extra=tuple(sorted(extra)),
        reshaped={name: (there[name][1], here[name][1]) for name in both if there[name][1] != here[name][1]},
        recast={name: (there[name][0], here[name][0]) for name in both if there[name][0] not in {here[name][0], *_WIDENED}},
    )


def _sentence(config: TrainerConfig, origin: Origin, model: LanguageModel, wrong: Differences) -> str:
    """What differs, what is probably meant first, with its remedy."""
    rows = {name: shapes for name, shapes in wrong.reshaped.items() if shapes[0][1:] == shapes[1][1:] and len(shapes[0]) == 2}
    output = model.output_name
    if config.train.objective == "classes" and output in wrong.names() and wrong.names() <= {output, *wrong.extra}:
        return f'its output layer is not one of these classes: set train.start_without = ["{output}"], and it begins with random values'
    if rows and wrong.names() == rows.keys():
        name, ((there, *_), (here, *_)) = next(iter(rows.items()))
        if "positions" not in name:
            return other_vocabulary(origin, there, here, list(rows))
    told = "; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in wrong.groups().items())
    adapted = any(map(is_lora, wrong.extra))
    merged = " (it is adapted with LoRA: export it with --merge and begin with that file)" if adapted else ""
    return f"{told}{merged}; what may differ is named in train.start_without"


def _read(plan: Plan, parameters: Mapping[str, Tensor], reader: CheckpointReader) -> None:
    """Straight into the tensors, as far as they are what is there, the others through copies."""
    direct, copied = dict[str, Tensor](), list[str]()
    for name, match in plan.found.items():
        if match.is_transposed or match.entry.dtype in _WIDENED:
            copied.append(name)
        else:
            direct[name] = parameters[name]
    _restore(plan, direct, reader)
    for names in _batches(plan, copied):
        twins = {name: _twin(parameters[name], plan.found[name]) for name in names}
        _restore(plan, twins, reader)
        for name, twin in twins.items():
            _take(parameters[name], twin.T if plan.found[name].is_transposed else twin)


def _restore(plan: Plan, tensors: Mapping[str, Tensor], reader: CheckpointReader) -> None:
    if tensors:
        ours = {plan.found[name].entry.name: name for name in tensors}
        restore(_renamed(plan.origin.manifest, ours), reader, {"model": dict(tensors)})


def _renamed(manifest: Manifest, ours: Mapping[str, str]) -> Manifest:
    """With these tensors alone, by our names."""
    ranks = (
        replace(rank, tensors=tuple(replace(entry, name=PART + ours[entry.name]) for entry in rank.tensors if entry.name in ours))
        for rank in manifest.ranks
    )
    return replace(manifest, ranks=tuple(ranks))


def _batches(plan: Plan, names: Sequence[str]) -> Iterator[list[str]]:
    batch, num_bytes = list[str](), 0
    for name in names:
        size = 4 * math.prod(plan.found[name].shape)
        if batch and num_bytes + size > _COPIES_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(name)
        num_bytes += size
    if batch:
        yield batch


def _twin(parameter: Tensor, match: Found) -> Tensor:
    """To read into: cut like the parameter where its rows are rows there, too; else whole."""
    dtype = getattr(torch, match.entry.dtype)
    if isinstance(parameter, DTensor) and not match.is_transposed:
        twin = placed_like(parameter, torch.empty_like(parameter.to_local(), dtype=dtype))
        assert isinstance(twin, DTensor)
        return twin
    return torch.empty(match.entry.global_shape, dtype=dtype)


def _take(parameter: Tensor, value: Tensor) -> None:
    """Widened to the parameter's own dtype."""
    if isinstance(value, DTensor):
        assert isinstance(parameter, DTensor)
        with torch.no_grad():
            parameter.to_local().copy_(value.to_local())
    else:
        put(parameter, value)
