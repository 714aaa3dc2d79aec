"""The architectures, all with the interface of `LanguageModel`."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Final

import torch
from torch import nn

from keepstep.trainer.config import ModelSection, TrainSection

from .gpt import Bert, Gpt
from .llama import Llama
from .lora import adapt, is_lora, merge
from .parts import LanguageModel, Memory, initial_value, num_parameters
from .patterns import chosen
from .recurrent import Recurrent

__all__ = [
    "KINDS",
    "Bert",
    "Gpt",
    "LanguageModel",
    "Llama",
    "Memory",
    "Recurrent",
    "build_model",
    "initial_value",
    "is_lora",
    "merge",
    "num_parameters",
]

KINDS: Final[Mapping[str, type[LanguageModel]]] = {
    "gpt": Gpt,
    "bert": Bert,
    "llama": Llama,
    "rnn": Recurrent,
    "lstm": Recurrent,
    "gru": Recurrent,
}


def build_model(
    config: ModelSection, vocabulary: int, device: str | torch.device = "cpu", *, outputs: int = 0, train: TrainSection | None = None
) -> LanguageModel:
    """The model with uninitialised parameters: restore them, or give each its `initial_value`.

    Args:
        outputs: classes, each a column of an output layer of its own, `model.output_name`; 0: the output is that of the next token.
        train: which parameters are trained, and what is adapted (LoRA); None: all as they are.

    Raises:
        ValueError: heads do not divide width, or key-value heads do not divide heads; a pattern of names matches none, or nothing is left
            to train; model.folder holds no model that can be built here.
        ImportError: kind = "hf", and transformers is missing.
    """
    with torch.device("meta"):
        model = _own(config, vocabulary, outputs) if config.kind != "hf" else _foreign(config, vocabulary, outputs)
        if train is not None:
            _limit(model, train, is_classifier=outputs > 0)
    return model.to_empty(device=device)


def _own(config: ModelSection, vocabulary: int, outputs: int) -> LanguageModel:
    kind = KINDS[config.kind]
    if kind is not Recurrent and config.width % config.heads:
        raise ValueError(f"model.heads = {config.heads} must divide model.width = {config.width}")
    if config.kv_heads and config.heads % config.kv_heads:
        raise ValueError(f"model.kv_heads = {config.kv_heads} must divide model.heads = {config.heads}")
    model = kind(config, vocabulary)
    if outputs:
        model.head = nn.Linear(config.width, outputs, bias=False)
    return model


def _foreign(config: ModelSection, vocabulary: int, outputs: int) -> LanguageModel:
    from .hugging import Hugging

    with torch.device("cpu"):  # where its buffers are computed
        return Hugging(config, vocabulary, outputs)


def _limit(model: LanguageModel, train: TrainSection, *, is_classifier: bool) -> None:
    """Adapts, and freezes what is not trained. With LoRA that is all but A and B, an output layer of classes, and what `start_without`
    names: those begin with random values, and would keep them."""
    if train.lora.rank:
        adapt(model, train.lora)
    names = [name for name, _ in model.named_parameters()]
    frozen = chosen(names, train.freeze, "train.freeze")
    for name, parameter in model.named_parameters():
        begins_random = (is_classifier and name == model.output_name) or any(fnmatchcase(name, each) for each in train.start_without)
        is_trained = not train.lora.rank or is_lora(name) or begins_random
        parameter.requires_grad_(is_trained and name not in frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"train.freeze = {list(train.freeze)} freezes every parameter: nothing is left to train")
