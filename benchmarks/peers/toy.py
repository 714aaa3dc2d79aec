"""What every system of benchmarks/peers.py trains: one model, one stream of data, one optimizer. Imports torch alone.

A stack of four residual MLP blocks (2.1 million parameters) under AdamW. A batch is a function of step and rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, BLOCKS, SAMPLES = 256, 4, 32
INTERVAL = 10  # steps between checkpoints


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BC: Tensor) -> Tensor:
        return x_BC + self.down(torch.relu(self.up(self.norm(x_BC))))


def plain_model() -> nn.Sequential:
    """The same weights in every process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(BLOCKS)))


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    x_BC = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(1000 * step + rank))
    return (model(x_BC) - x_BC.flip(-1)).square().mean()


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int) -> Tensor:
    """One step, the one after `step` finished ones; its loss."""
    loss = loss_of(model, step, rank)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss
