"""What several architectures are made of. Shapes stand in the names:

B samples, T positions (at most model.context), S positions with those remembered, C model.width, H heads, G key-value heads, K = C / H,
V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keepstep.trainer.config import ModelSection

if TYPE_CHECKING:
    from .lora import Adapter

INIT_STD: Final = 0.02
LORA_NAMES: Final = ("lora_a", "lora_b")  # of the parameters that lora.py adds to a layer


class Memory:
    """What a model keeps of the tokens before those that it is given: keys and values of an attention, the state of a recurrent layer.

    Attributes:
        length: tokens that it has seen.
        layers: by layer.
        cache: the same in another library's form, of models that are built by one.
    """

    def __init__(self) -> None:
        self.length = 0
        self.layers: dict[int, tuple[Tensor, ...]] = {}
        self.cache: Any = None

    def detach(self) -> None:
        """Gradients end here: truncated back-propagation through time (Williams and Peng 1990)."""
        self.layers = {layer: tuple(tensor.detach() for tensor in tensors) for layer, tensors in self.layers.items()}


class LanguageModel(nn.Module):
    """Token ids to logits. `blocks` are what FSDP gathers and activation checkpointing recomputes, one at a time."""

    blocks: nn.ModuleList
    is_causal = True  # no position sees a later one: it can be trained on the next token, and generate
    output_name = "head.weight"  # of the parameter of the output layer, where it has one of its own

    def __init__(self, config: ModelSection, vocabulary: int) -> None:
        super().__init__()
        self.adapters: dict[str, Adapter] = {}  # by layer, see lora.py
        self.config, self.context, self.dropout = config, config.context, config.dropout
        self.vocabulary = vocabulary  # tokens of the tokenizer
        self.tokens = nn.Embedding(vocabulary, config.width)
        self.head = None if config.tied else nn.Linear(config.width, vocabulary, bias=False)

    def embedded(self, ids_BT: Tensor) -> Tensor:
        """(B, T, C). Ids below 0 are padding: any vector will do, as no position that counts sees it."""
        vectors_BTC: Tensor = self.tokens(ids_BT.clamp(min=0))
        return vectors_BTC

    def logits(self, x_BTC: Tensor) -> Tensor:
        """(B, T, V); with tied embeddings as in Press and Wolf 2017."""
        logits_BTV: Tensor = F.linear(x_BTC, self.tokens.weight if self.head is None else self.head.weight)
        return logits_BTV

    @abstractmethod
    def forward(self, ids_BT: Tensor, memory: Memory | None = None) -> Tensor:
        """Logits of the next token at each position, (B, T, V). What was seen is added to `memory`."""

    def fill(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """The initial value of one parameter, in place, float32 on the CPU: norms 1, biases 0, matrices N(0, 0.02), those that feed the
        residual stream scaled by 1 / sqrt(2 layers) (Radford et al. 2019)."""
        if value.ndim == 1:
            value.fill_(float(name.endswith("norm.weight")))
            return
        std = INIT_STD / (2 * self.config.layers) ** 0.5 if name.endswith("out.weight") else INIT_STD
        value.normal_(0.0, std, generator=generator)


def initial_value(model: LanguageModel, name: str, shape: torch.Size, seed: int) -> Tensor:
    """The whole initial value of one parameter. It follows from (seed, name): no rank needs the whole model, no stream is touched."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    value = torch.empty(shape)
    if not _fill_lora(name, value, generator):
        model.fill(name, value, generator)
    return value


def _fill_lora(name: str, value: Tensor, generator: torch.Generator) -> bool:
    """The initial value of A (uniform, as nn.Linear's own) or B (0) of a low-rank adaptation, in place; False: it is neither."""
    which = name.rpartition(".")[2]
    if which == LORA_NAMES[0]:
        bound = 1 / math.sqrt(value.shape[1])
        value.uniform_(-bound, bound, generator=generator)
    elif which == LORA_NAMES[1]:
        value.zero_()
    return which in LORA_NAMES


def attend(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTK: Tensor,
    *,
    is_causal: bool,
    memory: Memory | None,
    layer: int,
    is_token_B11S: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention, (B, T, C). Query heads share key-value heads where there are fewer of those (Ainslie et al. 2023).

    Args:
        is_token_B11S: where all positions see each other: which are no padding.
    """
    B, H, T, K = q_BHTK.shape
    k_BGSK, v_BGSK = k_BGTK, v_BGTK
    if memory is not None:
        if layer in memory.layers:
            k_before, v_before = memory.layers[layer]
            k_BGSK, v_BGSK = torch.cat((k_before, k_BGTK), dim=2), torch.cat((v_before, v_BGTK), dim=2)
        memory.layers[layer] = k_BGSK, v_BGSK
    S, grouped = k_BGSK.shape[2], k_BGSK.shape[1] != H
    if is_causal and 1 < T < S:  # the new positions see all that were remembered, and each other up to themselves
        mask_TS = torch.ones(T, S, dtype=torch.bool, device=q_BHTK.device).tril(S - T)
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, attn_mask=mask_TS, enable_gqa=grouped)
    else:
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BGSK, v_BGSK, attn_mask=is_token_B11S, is_causal=is_causal and T == S, enable_gqa=grouped
        )
    return y_BHTK.transpose(1, 2).reshape(B, T, H * K)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
