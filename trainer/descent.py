"""Whether a run may begin with what train.start names, as far as that is known before there are ranks: same vocabulary and, of a run, same
tokenizer and same function of the same parameters, which no shape shows. Torch-free.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any, Final

from keepstep.storage.layout import RUN_CONFIG_KEY
from keepstep.storage.store import Store

from .config import ModelSection, TrainerConfig
from .index import TokenIndex, read_index
from .origin import EMBEDDINGS, Origin, locate, other_vocabulary, recall

_LORA_SCALE: Final = "*.lora_?"  # tensors that are worth what alpha / rank makes of them


def check_start(store: Store, config: TrainerConfig, index: TokenIndex) -> None:
    """Once the text's tokens are known, before anything is launched. Raises ValueError with the remedy."""
    if not config.train.start:
        return
    origin = recall(store, config.train.start) or locate(config.train.start)
    if config.model.kind != "hf":  # which may have more tokens than its tokenizer
        _check_vocabulary(config, origin, index.vocabulary)
    if origin.is_run:
        _check_run(config, origin, index)


def _check_vocabulary(config: TrainerConfig, origin: Origin, vocabulary: int) -> None:
    for name in EMBEDDINGS:
        entry = origin.tensors.get(name)
        if entry is not None and not _may_differ(config, name, EMBEDDINGS[0]) and entry.global_shape[0] != vocabulary:
            raise ValueError(f"{origin.name}: {other_vocabulary(origin, entry.global_shape[0], vocabulary, [name])}")


def _check_run(config: TrainerConfig, origin: Origin, index: TokenIndex) -> None:
    theirs = read_index(origin.store)
    if theirs and theirs.tokenizer_sha256 != index.tokenizer_sha256 and not _may_differ(config, EMBEDDINGS[0]):
        raise ValueError(
            f"{origin.name} learnt other tokens, though equally many: use its tokenizer, data.tokenizer = {json.dumps(origin.start)}, in "
            f'another run.root; or name "{EMBEDDINGS[0]}" in train.start_without'
        )
    base = TrainerConfig.model_validate(tomllib.loads(origin.store.get(RUN_CONFIG_KEY).decode()))
    here, there = _function_of(config.model), _function_of(base.model)
    told = [
        f"model.{key} = {json.dumps(there.get(key))}, here {json.dumps(value)}" for key, value in here.items() if there.get(key) != value
    ]
    told += _other_adaptation(config, base)
    if told:
        raise ValueError(
            f"{origin.name} computes something else with these parameters: it has {'; '.join(told)}. Set [model] and [train.lora] so"
        )


def _function_of(model: ModelSection) -> dict[str, Any]:
    """What a model computes with its parameters, beside what their shapes say."""
    fields: dict[str, Any] = {"kind": model.kind}
    if model.kind in {"gpt", "bert", "llama"}:
        fields |= {"heads": model.heads}
    if model.kind in {"gpt", "bert"}:
        fields |= {"activation": model.activation}
    if model.kind == "llama":
        fields |= {"kv_heads": model.kv_heads or model.heads, "rope_base": model.rope_base}
    return fields


def _other_adaptation(config: TrainerConfig, base: TrainerConfig) -> Iterator[str]:
    here, there = config.train.lora, base.train.lora
    if here.rank and there.rank == here.rank and here.alpha != there.alpha and not _may_differ(config, _LORA_SCALE):
        yield f"train.lora.alpha = {there.alpha:g}, here {here.alpha:g}"


def _may_differ(config: TrainerConfig, *names: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in config.train.start_without)
