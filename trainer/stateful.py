"""Parts for training scripts: any object with `state_dict` and `load_state_dict` (a loader, a sampler, a scheduler), and the groups of any
torch optimizer. What is large belongs among the tensors of a checkpoint; what is small is written as JSON that comes back to the bit.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from .registry import Json, Part

MAX_BYTES: Final = 1 << 20  # of one tensor or array inside a state: every rank's state is merged into one manifest


class Stateful(Protocol):
    """torch.distributed.checkpoint.stateful.Stateful, and what torchdata's loaders and torch's schedulers are."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def stateful(name: str, it: Stateful, *, per_rank: bool = False, elsewhere: Callable[[Sequence[Any]], str] | None = None) -> Part:
    """A part out of a Stateful; TypeError at a save when its state holds what JSON cannot, see `to_json`.

    Args:
        per_rank: every rank has its own, as a loader has that reads its rank's share. Else all ranks have the same.
        elsewhere: per rank, and there is another number of ranks: brings `it` to where it should be, given the states of all old ranks in
            rank order, and says how, for the log. Without it such a checkpoint is refused.
    """

    def moved(saved: Sequence[Json]) -> str:
        assert elsewhere is not None
        return elsewhere([from_json(state) for state in saved])

    def restore(saved: Json) -> None:
        it.load_state_dict(from_json(saved))

    return Part(
        name=name,
        capture=lambda: to_json(it.state_dict(), name),
        restore=restore,
        check=_readable,
        per_rank=per_rank,
        elsewhere=moved if elsewhere else None,
        check_elsewhere=_readable,
    )


def param_groups(optimizer: torch.optim.Optimizer, *, name: str = "optimizer") -> Part:
    """The hyper-parameters of every group of a torch optimizer, in their order, also of a group that has no parameter (which
    torch.distributed.checkpoint loses). Its moments are tensors: give them to `Checkpointer.save` under the parameters' names."""

    def capture() -> Json:
        return [to_json({key: value for key, value in group.items() if key != "params"}, name) for group in optimizer.param_groups]

    def check(saved: Sequence[Json]) -> Iterable[str]:
        if len(saved) != len(optimizer.param_groups):
            yield f"it had {len(saved)} groups of parameters, here are {len(optimizer.param_groups)}"
        for group in saved:
            dict.keys(from_json(group))

    def restore(saved: Sequence[Json]) -> None:
        for group, hyper_parameters in zip(optimizer.param_groups, saved, strict=True):
            group.update(from_json(hyper_parameters))

    return Part(name=name, capture=capture, restore=restore, check=check)


def _readable(saved: Json) -> Iterable[str]:
    try:
        from_json(saved)
    except RuntimeError as error:  # torch's, of a tensor whose bytes and shape do not agree
        yield f"it holds what cannot be read: {error}"


def to_json(value: Any, where: str) -> Json:
    """JSON from which `from_json` makes the same value again, bit by bit, types included.

    Plain values, lists, tuples, dictionaries, Counters, bytes, NumPy arrays and scalars, torch tensors (which come back on the CPU). What
    JSON has no word for becomes {"$kind": ...}. Raises TypeError, which names the place below `where`, for anything else, also for
    subclasses (their type would be lost; an OrderedDict alone comes back as a dict, in its order), and for what is large.
    """
    match value:
        case None | bool():
            return value
        case str() | int() if type(value) in (str, int):
            return value
        case float() if type(value) is float:
            return value if math.isfinite(value) else {"$float": str(value)}
        case list() if type(value) is list:
            return [to_json(each, f"{where}[{i}]") for i, each in enumerate(value)]
        case tuple() if type(value) is tuple:
            return {"$tuple": to_json(list(value), where)}
        case Counter() if type(value) is Counter:  # milestones of torch's MultiStepLR
            return {"$counter": to_json(dict(value), where)}
        case dict() if type(value) in (dict, OrderedDict):
            return _dict_to_json(value, where)
        case bytes() if type(value) is bytes:
            return {"$bytes": _packed(value, where)}
        case Tensor() if type(value) is Tensor:
            return {"$tensor": [str(value.dtype).removeprefix("torch."), list(value.shape), _packed(_bytes_of(value), where)]}
        case np.ndarray() | np.generic() if value.dtype.kind in "biufc" and (type(value) is np.ndarray or isinstance(value, np.generic)):
            array = np.asarray(value)
            kind = "$array" if isinstance(value, np.ndarray) else "$scalar"
            return {kind: [array.dtype.str, list(array.shape), _packed(array.tobytes(), where)]}
    raise TypeError(
        f"{where} is a {type(value).__qualname__}: a state holds plain values, lists, tuples, dictionaries, bytes, arrays and tensors"
    )


def from_json(value: Json) -> Any:
    """Inverse of `to_json`."""
    if isinstance(value, list):
        return [from_json(each) for each in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: from_json(each) for key, each in value.items()}
    ((kind, inner),) = value.items()
    return _MAKERS[kind](inner)


def _dict_to_json(value: Mapping[Any, Any], where: str) -> Json:
    items = [(key, to_json(each, f"{where}[{key!r}]")) for key, each in value.items()]
    if all(type(key) is str and not key.startswith("$") for key in value):
        # Pairs where the order is not the sorted one: a committed manifest sorts keys.
        return dict(items) if list(value) == sorted(value) else {"$dict": [[key, each] for key, each in items]}
    return {"$dict": [[to_json(key, f"a key of {where}"), each] for key, each in items]}


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _packed(body: bytes, where: str) -> str:
    if len(body) > MAX_BYTES:
        raise TypeError(
            f"{where} has {len(body)} bytes, more than {MAX_BYTES}: it belongs among the tensors that are given to Checkpointer.save"
        )
    return base64.b64encode(body).decode()


def _tensor(inner: Sequence[Any]) -> Tensor:
    dtype, shape, body = inner
    memory = bytearray(base64.b64decode(body))
    flat = torch.frombuffer(memory, dtype=getattr(torch, dtype)) if memory else torch.empty(0, dtype=getattr(torch, dtype))
    return flat.reshape(shape)


def _array(inner: Sequence[Any]) -> np.ndarray[Any, Any]:
    dtype, shape, body = inner
    return np.frombuffer(base64.b64decode(body), dtype=np.dtype(dtype)).reshape(shape).copy()


_MAKERS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "$float": float,
    "$tuple": lambda inner: tuple(from_json(inner)),
    "$counter": lambda inner: Counter(from_json(inner)),
    "$dict": lambda inner: {from_json(key): from_json(each) for key, each in inner},
    "$bytes": base64.b64decode,
    "$tensor": _tensor,
    "$array": _array,
    "$scalar": lambda inner: _array(inner)[()],
}
