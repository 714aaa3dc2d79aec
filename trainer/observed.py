"""One step, watched from within: what its modules give, its gradients before clipping, its parameters before and after, its samples.

Watching draws no random number and changes no operation of the step: the loss has the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from .agreement import gradient_scale_of
from .blocks import in_recomputation, opaque
from .contract import BAD_STEP_KIND
from .loader import MicroBatch
from .portions import whole
from .replay import View
from .run import Run
from .samples import IGNORED
from .state import placed_like
from .traceback import LOGITS, Statistics, activation_statistics, combined, tensor_statistics

WORST: Final = 5  # samples of each process whose text is shown


@dataclass(slots=True, kw_only=True)
class Forward:
    """What one process's forward passes gave, micro-batch by micro-batch.

    Attributes:
        rows: by module, in the order of the forward pass: figures of the samples that are wanted, see traceback.py.
        tensors: by rank and module: outputs, where a dump is wanted.
        samples: one for each sample that is wanted: its place and its loss.
    """

    run: Run
    parts: Sequence[MicroBatch]  # that the model is called for, in order
    view: View
    rows: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[int, dict[str, list[Tensor]]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    _calls: int = 0

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        with activation_statistics(model, every=True) as found:
            compiled = opaque(model)
            seen = {name or LOGITS: module for name, module in model.named_modules() if not name.startswith(compiled)}
            handles = [module.register_forward_hook(partial(self._take, name)) for name, module in seen.items()]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()
        if any(wanted := [self._wants(part) for part in self.parts]):
            self.rows = found.rows(wanted)

    def _wants(self, part: MicroBatch) -> bool:
        """The first rank of a tensor-parallel group tells of its samples; of what the group cuts it has its own part."""
        return part.counts and not self.run.world.tensor_rank and self.view.rank in (None, part.share)

    def _take(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if in_recomputation():
            return
        part = self.parts[self._calls]
        if self._wants(part) and isinstance(output, Tensor):
            if "activations" in self.view.dump:
                self.tensors.setdefault(part.share, {}).setdefault(name, []).append(output.detach().cpu().clone())
            if name == LOGITS:
                self._take_samples(part, output.detach())
        if name == LOGITS:
            self._calls += 1

    def _take_samples(self, part: MicroBatch, logits_BTV: Tensor) -> None:
        targets_BT = torch.from_numpy(part.rows.targets).to(logits_BTV.device)
        flat = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED, reduction="none")
        counts = (targets_BT != IGNORED).sum(1)
        losses = flat.view(targets_BT.shape).double().sum(1) / counts
        feed, (first, last) = self.run.feed, part.turns
        places = zip(feed.at(first, last).tolist(), feed.samples(first, last).tolist(), strict=True)
        for (position, sample), loss, tokens in zip(places, losses.tolist(), counts.tolist(), strict=True):
            self.samples.append({"rank": part.share, "position": position, "sample": sample, "loss": loss, "tokens": tokens})


class ObservedEngine:
    """The engine of a run, for one step."""

    def __init__(self, engine: Any, run: Run, parts: Sequence[MicroBatch], view: View) -> None:
        called = [part for part in parts if part.counts] if run.config.cluster.exact_reduction else parts
        self._engine, self._run, self._view = engine, run, view
        self.forward = Forward(run=run, parts=called, view=view)
        self.found: dict[str, Any] = {"updates": {}}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def backward(self, parts: Sequence[MicroBatch], *, step: int) -> Any:
        with self.forward.watching(self._engine.model):
            sums = self._engine.backward(parts, step=step)
        self.found["parameters"] = self._look(self._shards, "parameters", "-before")
        tokens = float(self._run.world.data.gather([sums.tokens]).sum())
        scale = gradient_scale_of(self._run, tokens)
        gradients = {name: shard.grad * scale for name, shard in self._shards.items() if shard.grad is not None}
        self.found["gradients"] = self._look(gradients, "gradients")
        return sums

    def update(self, *, lr: float, scale: float) -> None:
        before = {name: shard.detach().clone() for name, shard in self._shards.items()}
        self._engine.update(lr=lr, scale=scale)
        self.found["updates"] = self._look({name: shard.detach() - before[name] for name, shard in self._shards.items()})
        self._look(self._shards, "parameters", "-after")

    @property
    def _shards(self) -> Mapping[str, Tensor]:
        shards: Mapping[str, Tensor] = self._engine.optimizer.shards
        return shards

    def _look(self, shards: Mapping[str, Tensor], dumped_as: str = "", suffix: str = "") -> dict[str, Any]:
        """Collective. Rank 0: statistics of the whole tensors, which are written down where that is wanted. One at a time is whole."""
        statistics, kept = {}, {}
        for name, shard in shards.items():
            tensor = whole(placed_like(self._run.tensors["model"][name], shard.detach()))
            if self._run.world.rank == 0:
                statistics[name] = described(tensor_statistics(tensor))
                if dumped_as in self._view.dump:
                    kept[name] = tensor.contiguous()
        if kept:
            save_file(kept, Path(self._view.out, f"{dumped_as}{suffix}.safetensors"))
        return statistics


def described(statistics: Statistics) -> dict[str, Any]:
    """For people: with the norm."""
    norm = None if statistics.rms is None else statistics.rms * statistics.count**0.5
    return {"norm": norm, "elements": statistics.count, **statistics.to_json()}


def observe(run: Run, parts: Sequence[MicroBatch], view: View, advance: Callable[[], object]) -> dict[str, Any]:
    """Collective. Makes one step by `advance`; what this process saw of it, as JSON; of all of them together on rank 0.

    A step that the run's guard refuses is seen all the same: its sentence stands under "rejected".
    """
    engine = run.engine
    observed = ObservedEngine(engine, run, parts, view)
    run.engine = observed
    rejected = ""
    try:
        advance()
    except Exception as error:
        if getattr(error, "kind", "") != BAD_STEP_KIND:
            raise
        rejected = str(error)
    finally:
        run.engine = engine
    forward = observed.forward
    _save_activations(forward, view)
    return {
        **observed.found,
        "activations": _together(forward.rows),
        "samples": forward.samples,
        "worst": _worst(run, forward.samples),
        "rejected": rejected,
    }


def _together(mine: Mapping[str, Tensor]) -> dict[str, Any]:
    """Collective. By module: figures over all ranks that have some."""
    of_ranks: list[Mapping[str, list[float]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, {name: row.tolist() for name, row in mine.items()})
    names = {name: None for rows in of_ranks for name in rows}
    joined = {name: torch.tensor([rows[name] for rows in of_ranks if name in rows], dtype=torch.float64) for name in names}
    return {name: described(Statistics.of(combined(rows).tolist())) for name, rows in joined.items()}


def _save_activations(forward: Forward, view: View) -> None:
    for rank, modules in forward.tensors.items():
        tensors = {name: torch.cat(outputs) for name, outputs in modules.items()}
        save_file(tensors, Path(view.out, f"activations-rank-{rank:05d}.safetensors"))


def _worst(run: Run, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of this process: the samples with the highest loss, those without a finite one first, with their text."""
    ordered = sorted(samples, key=badness, reverse=True)[:WORST]
    return [{**sample, "place": place_of(run, sample["sample"]), "text": _text(run, sample["sample"])} for sample in ordered]


def badness(sample: Mapping[str, Any]) -> float:
    """NaN is worse than anything."""
    loss = float(sample["loss"])
    return loss if loss == loss else torch.inf


def place_of(run: Run, sample: int) -> str:
    """Which documents a sample is cut from; names of documents are not kept with the tokens."""
    (first,), (count,) = (values.tolist() for values in run.samples.spans(np.array([sample], dtype=np.uint64)))
    documents = np.searchsorted(run.tokens.starts, np.array([first, first + count - 1], dtype=np.uint64), side="right") - 1
    before = np.cumsum([0, *(source.documents for source in run.tokens.index.train.sources)])
    number = int(np.searchsorted(before, documents[0], side="right")) - 1
    one, last = (int(document) - int(before[number]) for document in documents)
    numbers = f"document {one}" if one == last else f"documents {one} to {last}"
    return f"{numbers} of {run.config.data.source_key(number)}"


def _text(run: Run, sample: int) -> str:
    (ids,) = run.samples.ids(np.array([sample], dtype=np.uint64)).tolist()
    return run.tokens.tokenizer.decode([token for token in ids if token != IGNORED])
