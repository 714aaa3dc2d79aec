"""The GPT. Shapes stand in the names:

B samples, T positions (at most model.context), C model.width, H model.heads, K = C / H, V vocabulary.

Pre-norm decoder as in GPT-2 (Radford et al. 2019) without biases, input and output embeddings tied (Press and Wolf 2017). Parameters are
initialised one by one from (seed, name): no rank needs the whole model, and no other random stream is touched.
"""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelSection

_INIT_STD = 0.02


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        q_BHTK, k_BHTK, v_BHTK = self.qkv(x_BTC).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        return F.dropout(self.out(y_BHTK.transpose(1, 2).reshape(B, T, C)), self.dropout, self.training)


class Mlp(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.activation = nn.GELU()
        self.out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return F.dropout(self.out(self.activation(self.up(x_BTC))), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=False)
        self.attention = Attention(config.width, config.heads, config.dropout)
        self.mlp_norm = nn.LayerNorm(config.width, bias=False)
        self.mlp = Mlp(config.width, config.dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC))
        added_BTC: Tensor = self.mlp(self.mlp_norm(x_BTC))
        return x_BTC + added_BTC


class Gpt(nn.Module):
    def __init__(self, config: ModelSection, vocabulary: int) -> None:
        super().__init__()
        self.context, self.dropout = config.context, config.dropout
        self.tokens = nn.Embedding(vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits of the next token at each position, (B, T, V)."""
        x_BTC = self.tokens(ids_BT) + self.positions(torch.arange(ids_BT.shape[1], device=ids_BT.device))
        x_BTC = F.dropout(x_BTC, self.dropout, self.training)
        for block in self.blocks:
            x_BTC = block(x_BTC)
        logits_BTV: Tensor = F.linear(self.norm(x_BTC), self.tokens.weight)
        return logits_BTV


def build_model(config: ModelSection, vocabulary: int, device: str | torch.device = "cpu") -> Gpt:
    """The model with uninitialised parameters: restore them, or `initialise` each.

    Raises:
        ValueError: heads do not divide width.
    """
    if config.width % config.heads:
        raise ValueError(f"model.heads = {config.heads} must divide model.width = {config.width}")
    with torch.device("meta"):
        model = Gpt(config, vocabulary)
    return model.to_empty(device=device)


def initial_value(name: str, shape: torch.Size, seed: int, layers: int) -> Tensor:
    """The whole initial value of one parameter, float32 on the CPU: norms 1, matrices N(0, 0.02), those that feed the residual stream
    scaled by 1 / sqrt(2 layers) (GPT-2)."""
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    std = _INIT_STD / math.sqrt(2 * layers) if name.endswith("out.weight") else _INIT_STD
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
