"""Recurrent language models: the vanilla RNN (Elman 1990), LSTM (Hochreiter and Schmidhuber 1997) and GRU (Cho et al. 2014).

Embedding, layers of recurrent cells, output layer (Mikolov et al. 2010), with dropout between the layers only (Zaremba et al. 2014).
Weights are U(-1/sqrt(C), 1/sqrt(C)), biases 0, but 1 for what an LSTM's forget gate adds (Jozefowicz et al. 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keepstep.trainer.config import ModelSection

from .parts import LanguageModel, Memory

_GATES: Final[Mapping[str, int]] = {"rnn": 1, "lstm": 4, "gru": 3}
STATES: Final[Mapping[str, int]] = {"rnn": 1, "lstm": 2, "gru": 1}  # tensors of a layer's state
_KERNELS: Final[Mapping[str, Callable[..., Any]]] = {"rnn": torch.rnn_tanh, "lstm": torch.lstm, "gru": torch.gru}


class Layer(nn.Module):
    """One layer over all positions, by torch's own kernel. (`nn.LSTM` keeps a second list of its weights, which FSDP cannot follow.)"""

    def __init__(self, config: ModelSection, layer: int) -> None:
        super().__init__()
        self.kind, self.layer, self.width, self.dropout = config.kind, layer, config.width, config.dropout
        rows = _GATES[config.kind] * config.width
        self.from_input = nn.Linear(config.width, rows)
        self.from_state = nn.Linear(config.width, rows)

    def forward(self, x_BTC: Tensor, memory: Memory | None = None) -> Tensor:
        before = memory.layers.get(self.layer) if memory else None
        zeros_1BC = x_BTC.new_zeros(1, x_BTC.shape[0], self.width)
        state = [tensor.to(x_BTC.dtype) for tensor in before or (zeros_1BC,) * STATES[self.kind]]
        weights = [self.from_input.weight, self.from_state.weight, self.from_input.bias, self.from_state.bias]
        begin = state if self.kind == "lstm" else state[0]
        y_BTC, *after = _KERNELS[self.kind](x_BTC, begin, weights, True, 1, 0.0, self.training, False, True)
        if memory is not None:
            memory.layers[self.layer] = tuple(after)
        dropped_BTC: Tensor = F.dropout(y_BTC, self.dropout, self.training)
        return dropped_BTC


class Recurrent(LanguageModel):
    def __init__(self, config: ModelSection, vocabulary: int) -> None:
        super().__init__(config, vocabulary)
        self.blocks = nn.ModuleList(Layer(config, layer) for layer in range(config.layers))

    def forward(self, ids_BT: Tensor, memory: Memory | None = None) -> Tensor:
        x_BTC = F.dropout(self.embedded(ids_BT), self.dropout, self.training)
        for block in self.blocks:
            x_BTC = block(x_BTC, memory)
        if memory is not None:
            memory.length += ids_BT.shape[1]
        return self.logits(x_BTC)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Layers, tensors of a layer's state, and width of each."""
        return self.config.layers, STATES[self.config.kind], self.config.width

    def fill(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        if value.ndim > 1:
            bound = 1 / math.sqrt(self.config.width)
            value.uniform_(-bound, bound, generator=generator)
            return
        value.zero_()
        if self.config.kind == "lstm" and name.endswith("from_input.bias"):
            value[self.config.width : 2 * self.config.width] = 1.0  # torch's order: input, forget, cell, output
