"""The peer of benchmarks/recovery.py: what a careful user of plain torchrun writes. No part of keepstep, neither imported nor preloaded.

A causal transformer of the size that recovery.toml gives keepstep, FSDP2, AdamW, a checkpoint through torch.distributed.checkpoint every
INTERVAL steps, resume from the newest complete one. After every step each rank writes the same 32 bytes that a keepstep rank writes into
its progress page, so that both are timed in the same way.
"""

from __future__ import annotations

import os
import struct
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

LAYERS, WIDTH, HEADS, CONTEXT, VOCABULARY = 4, 128, 4, 128, 257
BATCH_SAMPLES = 1024 // CONTEXT
INTERVAL = 10
PAGE = struct.Struct("<IIqQd64x")  # phase, request, step, beats, time.monotonic(): keepstep.trainer.contract.PROGRESS


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, dropout=0.1, activation="gelu", batch_first=True, norm_first=True, bias=False
            )
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTC = self.tokens(ids_BT) + self.positions.weight
        for block in self.blocks:
            x_BTC = block(x_BTC, src_mask=self.mask, is_causal=True)
        return nn.functional.linear(self.norm(x_BTC), self.tokens.weight)


def newest(folder: Path) -> int:
    """Step of the newest complete checkpoint; 0 if there is none."""
    return max((int(path.parent.name) for path in folder.glob("*/.metadata")), default=0)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    model = Model()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)

    step = newest(folder / "checkpoints")
    if step:
        resume(model, optimizer, folder / "checkpoints" / str(step))
    page = os.open(folder / f"progress-{os.getpid()}-{rank}", os.O_RDWR | os.O_CREAT)
    os.pwrite(page, PAGE.pack(1, 0, step, 0, time.monotonic()), 0)
    while True:
        train_step(model, optimizer, step, rank, world)
        step += 1
        os.pwrite(page, PAGE.pack(2, 0, step, step, time.monotonic()), 0)
        if step % INTERVAL == 0:
            weights, moments = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / "checkpoints" / str(step))


def resume(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int, world: int) -> None:
    generator = torch.Generator().manual_seed(step * world + rank)
    ids_BT = torch.randint(VOCABULARY, (BATCH_SAMPLES // world, CONTEXT + 1), generator=generator)
    logits_BTV = model(ids_BT[:, :-1])
    nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert torch.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
