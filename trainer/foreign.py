"""A trained model as a folder of Hugging Face transformers: config.json, model.safetensors, and the tokenizer if it is of that world.

What was adapted with LoRA is merged. Models of classes become those for sequence classification, whose class is asked for at a row's last
token, the end of the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from .models import merge
from .models.names import FOREIGN_KINDS, foreign_name, is_transposed, settings_of
from .tokenizer import END_OF_TEXT
from .trained import Trained

_SCORE = "score.weight"  # what transformers calls the output layer of classes


def check_kind(trained: Trained) -> None:
    """Raises ValueError for a model that transformers has no equal of."""
    kind = trained.config.model.kind
    if kind not in {*FOREIGN_KINDS, "hf"}:
        raise ValueError(f'--format hf: transformers has no model that computes what model.kind = "{kind}" computes; choose safetensors')
    if kind == "hf" and trained.config.train.objective == "classes":
        raise ValueError(
            '--format hf: the output layer of classes does not belong to the config.json of model.kind = "hf"; choose safetensors'
        )


def write_folder(trained: Trained, folder: Path, facts: Mapping[str, str]) -> dict[str, Tensor]:
    """Writes the files; `facts` go into the weights' header. Merges the model that it is given.

    Returns:
        the tensors that were written.
    """
    merge(trained.model)
    if trained.config.model.kind == "hf":
        cast(Any, trained.model).inner.save_pretrained(folder)
        tensors = {name: parameter.detach() for name, parameter in trained.model.named_parameters()}
    else:
        tensors = dict(_renamed(trained))
        save_file(tensors, folder / "model.safetensors", metadata=dict(facts))
        _write_json(folder / "config.json", _settings(trained))
    _write_tokenizer(trained, folder)
    return tensors


@torch.no_grad()
def _renamed(trained: Trained) -> Iterator[tuple[str, Tensor]]:
    """By transformers' names. GPT-2 has biases there; where ours has none they are 0."""
    kind, parameters = trained.config.model.kind, dict(trained.model.named_parameters())
    for name, parameter in parameters.items():
        theirs = _SCORE if _is_classifier(trained) and name == "head.weight" else foreign_name(kind, name)
        yield theirs, (parameter.T if is_transposed(kind, name) else parameter).detach().contiguous()
        module, _, which = name.rpartition(".")
        if kind == "gpt" and which == "weight" and module.startswith(("blocks.", "norm")) and f"{module}.bias" not in parameters:
            yield foreign_name(kind, f"{module}.bias"), torch.zeros(parameter.shape[0])


def _settings(trained: Trained) -> dict[str, Any]:
    parameters = dict(trained.model.named_parameters())
    return settings_of(
        trained.config.model,
        vocabulary=parameters["tokens.weight"].shape[0],
        inside=parameters["blocks.0.mlp.up.weight"].shape[0],
        end_of_text=trained.tokens.tokenizer.end_of_text,
        labels=trained.tokens.index.labels if _is_classifier(trained) else (),
    )


def _is_classifier(trained: Trained) -> bool:
    return trained.config.train.objective == "classes"


def _write_tokenizer(trained: Trained, folder: Path) -> None:
    """Bytes need none: their ids are their values."""
    body = trained.tokens.tokenizer_json
    if "model" not in json.loads(body):
        return
    (folder / "tokenizer.json").write_bytes(body)
    known = {token["content"] for token in json.loads(body).get("added_tokens", [])}
    special = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT} if END_OF_TEXT in known else {}
    _write_json(
        folder / "tokenizer_config.json", {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast", **special}
    )


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
