"""Tokens per second of our GPT's training step beside a plain PyTorch loop of the same model, on one process.

    python benchmarks/models.py                   results/models.json and a table
    python benchmarks/models.py --quick

Ours is the whole step of the trainer, `loop.advance`, as a rank runs it: reading the batch, forward, backward, the exchange, the guard
against bad steps, clipping, the update, the step's record. Plain is what one writes by hand, in the manner of nanoGPT: a module,
cross-entropy, `clip_grad_norm_`, fused AdamW. Both train the same sizes on the same tokens with one thread; stretches of steps alternate.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from common import Verdict, machine, parser, publish, spread
from torch import Tensor, nn

from keepstep.trainer.attach import Attached
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.loop import advance
from keepstep.trainer.parallel import World, join
from keepstep.trainer.run import Run, open_run

TARGET: Final = 0.97
SIZES: Final = {
    "GPT 4 x 128": {"layers": 4, "width": 128, "heads": 4, "context": 128},
    "GPT 6 x 384": {"layers": 6, "width": 384, "heads": 6, "context": 128},
}
BATCH: Final = 8  # samples
ROUNDS, QUICK_ROUNDS, STRETCH_S = 9, 3, 3.0


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, C // self.heads).transpose(1, 2) for part in self.qkv(self.norm1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous().view(B, T, C)
        x = x + self.out(y)
        mlp: Tensor = self.mlp(self.norm2(x))
        return x + mlp


class PlainGpt(nn.Module):
    def __init__(self, vocabulary: int, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Plain:
    def __init__(self, run: Run) -> None:
        model = run.config.model
        self.context, self.tokens = model.context, run.tokens.train
        self.model = PlainGpt(run.tokens.index.vocabulary, model.layers, model.width, model.heads, model.context)
        decayed = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        exempt = [parameter for parameter in self.model.parameters() if parameter.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": exempt, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)

    def step(self) -> None:
        starts = np.random.randint(0, len(self.tokens) - self.context - 1, BATCH)[:, None] + np.arange(self.context + 1)
        rows = torch.from_numpy(self.tokens[starts].astype(np.int64))
        loss = F.cross_entropy(self.model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        loss.item()  # for the log


def steps_per_s(step: Callable[[], object]) -> float:
    step()
    count, began = 0, time.perf_counter()
    while time.perf_counter() < began + STRETCH_S:
        step()
        count += 1
    return count / (time.perf_counter() - began)


def compare(run: Run, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each stretch."""
    plain = Plain(run)
    makers: dict[str, Callable[[], object]] = {"plain": plain.step, "keepstep": lambda: advance(run, run.share[run.step + 1])}
    found: dict[str, list[float]] = {name: [] for name in makers}
    for number in range(rounds):
        for name in sorted(makers, reverse=number % 2 == 0):
            found[name].append(steps_per_s(makers[name]) * BATCH * run.config.model.context)
    return found


def opened(folder: Path, size: dict[str, int], world: World) -> Run:
    config = TrainerConfig.model_validate(
        {
            "run": {"root": str(folder / "root"), "steps": 1_000_000},
            "data": {"max_bytes": 4 << 20},
            "model": size | {"dropout": 0.0},
            "optimizer": {"lr": 1e-3},
            "train": {"batch_tokens": BATCH * size["context"]},
            "trace": {"interval": 0},
        }
    )
    return open_run(config, Attached(None), world)


def main() -> None:
    options = parser(__doc__).parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    began_on = machine()
    measured, verdicts, world = {}, [], join(Attached(None))
    with tempfile.TemporaryDirectory(prefix="ks-bench-") as folder:
        for name, size in SIZES.items():
            found = compare(opened(Path(folder), size, world), QUICK_ROUNDS if options.quick else ROUNDS)
            ratios = [mine / other for mine, other in zip(found["keepstep"], found["plain"], strict=True)]
            measured[name] = found
            verdicts.append(
                Verdict(
                    what=f"training step beside plain PyTorch, {name}",
                    target=f">= {TARGET} x the tokens per second",
                    result=spread(ratios, "x", 3),
                    met=statistics.median(ratios) >= TARGET,
                    note=f"{statistics.median(found['keepstep']):,.0f} tokens/s",
                )
            )
            print(json.dumps({name: {key: statistics.median(values) for key, values in found.items()}}))
    publish("models", verdicts, measured, began_on=began_on)


if __name__ == "__main__":
    main()
