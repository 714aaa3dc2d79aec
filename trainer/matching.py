"""Whether a checkpoint is of this model: tensor by tensor, and what may differ when somebody says so by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from torch import Tensor

from keepstep.storage.manifest import TensorEntry

from .checkpoint import dtype_name

_SHOWN: Final = 20  # names of each kind in a message

Kind = tuple[str, tuple[int, ...]]  # dtype, global shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """Between a checkpoint and a model, each in name order."""

    missing: tuple[str, ...] = ()  # in the model only
    extra: tuple[str, ...] = ()  # in the checkpoint only
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]  # name -> (global shape in the checkpoint, in the model)
    recast: Mapping[str, tuple[str, str]]  # name -> (dtype in the checkpoint, in the model)

    def names(self) -> frozenset[str]:
        return frozenset((*self.missing, *self.extra, *self.reshaped, *self.recast))

    def groups(self) -> dict[str, list[str]]:
        """Everything, by kind; kinds without a difference are left out."""
        groups = {
            "missing in it": list(self.missing),
            "not in this model": list(self.extra),
            "of another shape": [f"{name} ({list(saved)} in it, {list(here)} here)" for name, (saved, here) in self.reshaped.items()],
            "of another dtype": [f"{name} ({saved} in it, {here} here)" for name, (saved, here) in self.recast.items()],
        }
        return {what: names for what, names in groups.items() if names}

    def without(self, names: frozenset[str]) -> Differences:
        return Differences(
            missing=tuple(name for name in self.missing if name not in names),
            extra=tuple(name for name in self.extra if name not in names),
            reshaped={name: shapes for name, shapes in self.reshaped.items() if name not in names},
            recast={name: dtypes for name, dtypes in self.recast.items() if name not in names},
        )


class CheckpointMismatch(ValueError):
    """The checkpoint is sound, but it is not of this model. The message names up to 20 tensors of each kind, `report` all of them."""

    def __init__(self, differences: Differences) -> None:
        super().__init__(differences)
        self.differences = differences

    def __str__(self) -> str:
        told = (f"{len(names)} {what}: {_listed(names)}" for what, names in self.differences.groups().items())
        return f"the checkpoint is of another model or optimizer: {'; '.join(told)}"

    @property
    def report(self) -> str:
        """Every difference on a line of its own."""
        groups = self.differences.groups().items()
        return "".join(f"{len(names)} {what}:\n" + "".join(f"  {name}\n" for name in names) for what, names in groups)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def compare(saved: Iterable[TensorEntry], flat: Mapping[str, Tensor]) -> Differences:
    """What differs in names, global shapes and dtypes."""
    there: dict[str, Kind] = {entry.name: (entry.dtype, entry.global_shape) for entry in saved}
    names_of = {dtype: dtype_name(dtype) for dtype in {tensor.dtype for tensor in flat.values()}}
    here: dict[str, Kind] = {name: (names_of[tensor.dtype], tuple(tensor.shape)) for name, tensor in flat.items()}
    if there == here:
        return Differences(reshaped={}, recast={})
    both = sorted(there.keys() & here.keys())
    return Differences(
        missing=tuple(sorted(here.keys() - there.keys())),
        extra=tuple(sorted(there.keys() - here.keys())),
        reshaped={name: (there[name][1], here[name][1]) for name in both if there[name][1] != here[name][1]},
        recast={name: (there[name][0], here[name][0]) for name in both if there[name][0] != here[name][0]},
    )


def skipped(saved: Sequence[TensorEntry], flat: Mapping[str, Tensor], partial: Sequence[str]) -> frozenset[str]:
    """The tensors that differ and may, because their name matches one of the patterns in `partial` (as in a shell: "model.blocks.3.*").

    Raises:
        CheckpointMismatch: something else differs.
        ValueError: a pattern matches no tensor at all.
    """
    matching = matched({entry.name for entry in saved} | flat.keys(), partial) if partial else frozenset()
    differences = compare(saved, flat)
    wrong = differences.without(matching)
    if wrong.names():
        raise CheckpointMismatch(wrong)
    return differences.names()


def matched(names: Iterable[str], partial: Sequence[str]) -> frozenset[str]:
    """The names that match at least one pattern. Raises ValueError for a pattern that matches none."""
    names = sorted(names)
    found = {pattern: [name for name in names if fnmatchcase(name, pattern)] for pattern in partial}
    if idle := [pattern for pattern, hits in found.items() if not hits]:
        raise ValueError(f"--partial {idle[0]} matches no tensor; the names are {_listed(names) or 'none'}")
    return frozenset(name for hits in found.values() for name in hits)
