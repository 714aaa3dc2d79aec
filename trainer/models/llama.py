"""Llama (Touvron et al. 2023).

RMSNorm (Zhang and Sennrich 2019), rotary positions (Su et al. 2021), SwiGLU (Shazeer 2020), grouped queries (Ainslie et al. 2023).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keepstep.trainer.config import ModelSection

from .parts import LanguageModel, Memory, attend

_NORM_EPS = 1e-5


class Attention(nn.Module):
    def __init__(self, config: ModelSection, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.layer = config.heads, config.kv_heads or config.heads, layer
        self.dropout, self.size = config.dropout, config.width // config.heads
        self.q = nn.Linear(config.width, config.width, bias=config.bias)
        self.k = nn.Linear(config.width, self.kv_heads * self.size, bias=config.bias)
        self.v = nn.Linear(config.width, self.kv_heads * self.size, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x_BTC: Tensor, turn_2TK: Tensor, memory: Memory | None = None) -> Tensor:
        q_BHTK, k_BGTK, v_BGTK = (_heads(project(x_BTC), self.size) for project in (self.q, self.k, self.v))
        q_BHTK, k_BGTK = _turned(q_BHTK, turn_2TK), _turned(k_BGTK, turn_2TK)
        y_BTC = attend(q_BHTK, k_BGTK, v_BGTK, is_causal=True, memory=memory, layer=self.layer)
        return F.dropout(self.out(y_BTC), self.dropout, self.training)


def _heads(x_BTC: Tensor, size: int) -> Tensor:
    B, T, C = x_BTC.shape
    return x_BTC.view(B, T, C // size, size).transpose(1, 2)


def _turned(x_BHTK: Tensor, turn_2TK: Tensor) -> Tensor:
    """Each pair (i, i + K/2) of a head turned by its position's angle: the layout of Hugging Face's checkpoints."""
    one, other = x_BHTK.chunk(2, dim=-1)
    cos_TK, sin_TK = turn_2TK.to(x_BHTK.dtype)
    turned_BHTK: Tensor = x_BHTK * cos_TK + torch.cat((-other, one), dim=-1) * sin_TK
    return turned_BHTK


class Mlp(nn.Module):
    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.dropout = config.dropout
        inside = config.inside or -(-8 * config.width // (3 * 32)) * 32
        self.gate = nn.Linear(config.width, inside, bias=config.bias)
        self.up = nn.Linear(config.width, inside, bias=config.bias)
        self.out = nn.Linear(inside, config.width, bias=config.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return F.dropout(self.out(F.silu(self.gate(x_BTC)) * self.up(x_BTC)), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: ModelSection, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=_NORM_EPS)
        self.attention = Attention(config, layer)
        self.mlp_norm = nn.RMSNorm(config.width, eps=_NORM_EPS)
        self.mlp = Mlp(config)

    def forward(self, x_BTC: Tensor, turn_2TK: Tensor, memory: Memory | None = None) -> Tensor:
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), turn_2TK, memory)
        added_BTC: Tensor = self.mlp(self.mlp_norm(x_BTC))
        return x_BTC + added_BTC


class Llama(LanguageModel):
    def __init__(self, config: ModelSection, vocabulary: int) -> None:
        super().__init__(config, vocabulary)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=_NORM_EPS)

    def forward(self, ids_BT: Tensor, memory: Memory | None = None) -> Tensor:
        first, T = memory.length if memory else 0, ids_BT.shape[1]
        x_BTC = F.dropout(self.embedded(ids_BT), self.dropout, self.training)
        turn_2TK = rotary(first, T, self.config.width // self.config.heads, self.config.rope_base, ids_BT.device)
        for block in self.blocks:
            x_BTC = block(x_BTC, turn_2TK, memory)
        if memory is not None:
            memory.length += T
        return self.logits(self.norm(x_BTC))


def rotary(first: int, count: int, size: int, base: float, device: torch.device) -> Tensor:
    """Cosines and sines of the angles of `count` positions from `first` on, (2, count, size), float32."""
    powers = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
    angles = torch.outer(torch.arange(first, first + count, dtype=torch.float32, device=device), base**-powers)
    angles = torch.cat((angles, angles), dim=-1)
    return torch.stack((angles.cos(), angles.sin()))
