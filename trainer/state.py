"""What the state of a training run is, by name, and its digests.

    model.<parameter>                        sharded tensors, in the parameter's own dtype
    optimizer.<parameter>.exp_avg[_sq]       sharded like the parameter
    optimizer.<parameter>.step               updates so far, replicated
    ....rank-<rank>.<name>                   a script's tensors of one rank, see `of_rank`
    RankState.parts                          per rank, JSON: random streams, position, the last loss, ... Never under shared keys

All that is no tensor is a part of the registry (registry.py, parts.py); nothing else is state.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from keepstep.storage.canonical import canonical_json, sha256_hex

from .optim import ShardOptimizer
from .parallel import placed
from .portions import Portion, whole
from .registry import TENSOR_PARALLEL

_OWNED: Final = re.compile(r"(?:^|\.)rank-(\d{5})\.")
NestedTensors = dict[str, dict[str, Any]]  # {"model": {name: tensor}, "optimizer": {name: {key: tensor}}}


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """What a rank keeps beside its tensors; the JSON under "state" of its rank index."""

    parts: Mapping[str, Any]  # see registry.py
    best_step: int = -1  # whose checkpoint is to stay, see manifest.BEST_STEP; -1: none
    result: Mapping[str, Any] | None = None  # rank 0, final checkpoint: what result.json says
    tensor_parallel: int = 1  # ranks that computed the same samples together: their streams are alike

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        if self.tensor_parallel == 1:
            del fields[TENSOR_PARALLEL]
        return fields


def tensors_of(model: nn.Module, optimizer: ShardOptimizer) -> NestedTensors:
    """Every tensor of the state, sharing memory with model and optimizer: writing into one changes the training.

    The optimizer's moments are plain shards; here they carry the placement of their parameter.
    """
    parameters = placed(model)
    moments = {
        name: {key: placed_like(parameters[name], value) for key, value in state.items()} for name, state in optimizer.state().items()
    }
    return {"model": parameters, "optimizer": moments}


def placed_like(parameter: Tensor | Portion, value: Tensor) -> Tensor | Portion:
    """A shard as the part of the whole that it is: a DTensor or Portion where `parameter` is one and has this shape; shares memory."""
    if isinstance(parameter, Portion) and value.ndim == parameter.ndim:
        held = placed_like(parameter.held, value)
        assert isinstance(held, Tensor)
        return parameter.like(held)
    if not isinstance(parameter, DTensor) or value.ndim != parameter.ndim:
        return value
    return DTensor.from_local(
        value.detach(), parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def of_rank(rank: int, tensors: NestedTensors | Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors that belong to one rank alone, under a key that holds the rank: one that several ranks used would keep any one's values.

    They load at the world size that saved them only.
    """
    return {f"rank-{rank:05d}": dict(tensors)}


def owner_of(name: str) -> int | None:
    """The rank that a tensor of this name belongs to; None: to all."""
    found = _OWNED.search(name) if "rank-" in name else None
    return int(found[1]) if found else None


def flatten(tensors: NestedTensors) -> dict[str, Tensor]:
    """{"model.blocks.0.norm.weight": tensor, ...}, as torch.distributed.checkpoint names them."""
    flat: dict[str, Tensor] = {}
    for name, value in tensors.items():
        flat |= {f"{name}.{key}": t for key, t in flatten(value).items()} if isinstance(value, dict) else {name: value}
    return flat


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...


def digest(tensors: NestedTensors, alive: Callable[[], None] = lambda: None) -> dict[str, str]:
    """Collective. {"model": SHA-256, "optimizer": SHA-256} over the unsharded tensors in name order: name, dtype, shape, bytes.

    One tensor at a time is whole in memory. Equal at any world size when the values are. `alive` is called before each.
    """
    return {part: _digest_part(flatten(values), alive) for part, values in tensors.items()}


def _digest_part(flat: Mapping[str, Tensor], alive: Callable[[], None]) -> str:
    sha = hashlib.sha256()
    for name in sorted(flat):
        alive()
        hash_tensor(sha, name, whole(flat[name]))
    return sha.hexdigest()


def hash_tensor(sha: _Hash, name: str, tensor: Tensor) -> None:
    """Feeds one unsharded CPU tensor."""
    sha.update(canonical_json([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]))
    sha.update(byte_view(tensor.contiguous()))


def byte_view(tensor: Tensor) -> memoryview:
    """The raw bytes of a contiguous CPU tensor, writable; also of dtypes that NumPy does not know."""
    import torch

    assert tensor.is_contiguous()
    if not tensor.numel():
        return memoryview(bytearray())
    plain = tensor.detach() if tensor.requires_grad else tensor
    if plain.dtype is torch.float32:  # nearly all there is; half as many calls
        return plain.numpy().data.cast("B")
    return plain.reshape(-1).view(torch.uint8).numpy().data


def state_digest(tensors: Mapping[str, str], rng: Sequence[str], *, step: int, position: int) -> str:
    """SHA-256 over the tensors' digests, the random streams of every rank (once, if all have the same), step and data position."""
    return sha256_hex(canonical_json({"tensors": dict(tensors), "rng": list(rng), "step": step, "position": position}))
