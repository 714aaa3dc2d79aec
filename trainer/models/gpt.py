"""GPT-2 (Radford et al. 2019), and the same blocks without a mask as an encoder like BERT (Devlin et al. 2019), pre-norm both.

`bias = true`, `activation = "gelu_tanh"` and `norm_eps = 1e-5` are GPT-2 as it was published; by default there are no biases.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keepstep.trainer.config import ModelSection

from .parts import LanguageModel, Memory, attend


class Attention(nn.Module):
    def __init__(self, config: ModelSection, layer: int, *, is_causal: bool) -> None:
        super().__init__()
        self.size, self.dropout, self.layer, self.is_causal = config.width // config.heads, config.dropout, layer, is_causal
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x_BTC: Tensor, memory: Memory | None = None, is_token_B11T: Tensor | None = None) -> Tensor:
        B, T, _ = x_BTC.shape
        q_BHTK, k_BHTK, v_BHTK = self.qkv(x_BTC).view(B, T, 3, -1, self.size).permute(2, 0, 3, 1, 4)  # as many heads as `qkv` makes
        y_BTC = attend(q_BHTK, k_BHTK, v_BHTK, is_causal=self.is_causal, memory=memory, layer=self.layer, is_token_B11S=is_token_B11T)
        return F.dropout(self.out(y_BTC), self.dropout, self.training)


class Mlp(nn.Module):
    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.dropout = config.dropout
        inside = config.inside or 4 * config.width
        self.up = nn.Linear(config.width, inside, bias=config.bias)
        self.activation = nn.GELU("tanh" if config.activation == "gelu_tanh" else "none")
        self.out = nn.Linear(inside, config.width, bias=config.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return F.dropout(self.out(self.activation(self.up(x_BTC))), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: ModelSection, layer: int, *, is_causal: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.attention = Attention(config, layer, is_causal=is_causal)
        self.mlp_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.mlp = Mlp(config)

    def forward(self, x_BTC: Tensor, memory: Memory | None = None, is_token_B11T: Tensor | None = None) -> Tensor:
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), memory, is_token_B11T)
        added_BTC: Tensor = self.mlp(self.mlp_norm(x_BTC))
        return x_BTC + added_BTC


class Gpt(LanguageModel):
    """A decoder with learnt positions."""

    def __init__(self, config: ModelSection, vocabulary: int) -> None:
        super().__init__(config, vocabulary)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config, layer, is_causal=self.is_causal) for layer in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=config.bias)

    def forward(self, ids_BT: Tensor, memory: Memory | None = None) -> Tensor:
        first, T = memory.length if memory else 0, ids_BT.shape[1]
        x_BTC = self.embedded(ids_BT) + self.positions(torch.arange(first, first + T, device=ids_BT.device))
        x_BTC = F.dropout(x_BTC, self.dropout, self.training)
        is_token_B11T = None if self.is_causal else (ids_BT >= 0)[:, None, None, :]
        for block in self.blocks:
            x_BTC = block(x_BTC, memory, is_token_B11T)
        if memory is not None:
            memory.length += T
        return self.logits(self.norm(x_BTC))


class Bert(Gpt):
    """An encoder: every position sees every other. It is trained to name the tokens that were hidden from it (objectives.py)."""

    is_causal = False
