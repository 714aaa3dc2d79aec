"""How large a model is, and what a step of it costs, from its section of run.toml alone. Pure.

Memory of activations after Korthikanti et al. 2022 (table 2, with attention that keeps no matrix of scores), floating-point operations
after Kaplan et al. 2020: two for each weight that a token meets in the forward pass, and the products of attention; the backward pass takes
twice as many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from .config import RECURRENT, ModelSection, OptimizerSection

_GATES: Final = {"rnn": 1, "lstm": 4, "gru": 3}
_KEPT: Final = {"rnn": 3, "lstm": 17, "gru": 8}  # activations that torch's CPU kernels keep of a token, in widths, as counted
_MASTER_BYTES: Final = 4  # parameters, gradients and moments are float32
# Moments of each parameter, as optim.py keeps them.
_MOMENTS: Final[Mapping[str, Callable[[OptimizerSection], int]]] = {
    "sgd": lambda optimizer: int(optimizer.momentum > 0),
    "adam": lambda optimizer: 2,
    "adamw": lambda optimizer: 2,
    "rmsprop": lambda optimizer: 1 + int(optimizer.momentum > 0),
    "adagrad": lambda optimizer: 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Parameters are counted once, also where two layers share them."""

    embeddings: int  # of tokens and positions, and an output layer of its own
    block: int
    blocks: int
    last: int  # the norm behind the blocks
    weights_met: int  # by a token, in matrix products of a forward pass
    attention: int  # operations of the products of a token with those of its context, in a forward pass

    @property
    def parameters(self) -> int:
        return self.embeddings + self.block * self.blocks + self.last

    @property
    def flops_per_token(self) -> int:
        """Of forward and backward pass."""
        return 3 * (2 * self.weights_met + self.attention)


def model_size(config: ModelSection, vocabulary: int) -> ModelSize:
    """Raises ValueError for kind "hf", whose size is in its folder."""
    if config.kind == "hf":
        raise ValueError('model.kind = "hf": its size follows from the config.json of model.folder, not from run.toml')
    width, biased = config.width, int(config.bias)
    embeddings = vocabulary * width * (1 if config.tied else 2)
    if config.kind in RECURRENT:
        rows = _GATES[config.kind] * width
        met = config.layers * 2 * rows * width + vocabulary * width
        return ModelSize(embeddings=embeddings, block=2 * rows * (width + 1), blocks=config.layers, last=0, weights_met=met, attention=0)
    inner = inner_width(config)
    if config.kind == "llama":
        kv_width = (config.kv_heads or config.heads) * (width // config.heads)
        matrices = 2 * width * width + 2 * width * kv_width + 3 * width * inner
        block = matrices + 2 * width + biased * (3 * width + 2 * kv_width + 2 * inner)
        last = width
    else:
        embeddings += config.context * width
        matrices = 4 * width * width + 2 * width * inner
        block = matrices + 2 * width + biased * (2 * width + 3 * width + width + inner + width)
        last = width * (1 + biased)
    return ModelSize(
        embeddings=embeddings,
        block=block,
        blocks=config.layers,
        last=last,
        weights_met=config.layers * matrices + vocabulary * width,
        attention=config.layers * 4 * config.context * width,
    )


def inner_width(config: ModelSection) -> int:
    """Of an MLP."""
    return config.inside or (-(-8 * config.width // (3 * 32)) * 32 if config.kind == "llama" else 4 * config.width)


def state_bytes(parameters: int, optimizer: OptimizerSection) -> int:
    """Of a checkpoint: parameters and moments."""
    return parameters * _MASTER_BYTES * (1 + _MOMENTS[optimizer.kind](optimizer))


def gradient_bytes(parameters: int) -> int:
    return parameters * _MASTER_BYTES


def activation_bytes(config: ModelSection, vocabulary: int, samples: int, *, element_bytes: int, checkpointing: bool) -> int:
    """What a forward pass of so many samples keeps for the backward pass, logits included.

    Args:
        element_bytes: of train.precision: 2 or 4.
        checkpointing: train.activation_checkpointing: what goes into each block is kept, and one block's activations are there at a time.
    """
    tokens = samples * config.context
    logits = tokens * vocabulary * (element_bytes + 2 * 4)  # as they are, in float32, and their gradient
    if config.kind in RECURRENT:
        of_block = tokens * config.width * element_bytes * _KEPT[config.kind]
    else:
        # A block keeps what goes into its two norms and what they give, queries, keys, values, what attention gives, and the MLP's inside.
        kept = 8 * config.width + inner_width(config) * (4 if config.kind == "llama" else 2)
        of_block = tokens * kept * element_bytes
    into_block = tokens * config.width * element_bytes
    blocks = config.layers * into_block + of_block if checkpointing else config.layers * of_block
    return logits + blocks
