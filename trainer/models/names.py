"""GPT-2 and Llama by the names, shapes and settings of Hugging Face transformers: which parameter is which, and what config.json says.

transformers keeps the matrices of GPT-2's blocks as (inputs, outputs), ours are (outputs, inputs), as everywhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from keepstep.trainer.config import ModelSection

FOREIGN_KINDS: Final = ("gpt", "llama")

_NORM_EPS: Final = 1e-5  # of both kinds, here
_BLOCK: Final = re.compile(r"^blocks\.(\d+)\.(.+)\.(weight|bias)$")
_LAYERS: Final = {"gpt": "transformer.h", "llama": "model.layers"}
_TOP: Final[Mapping[str, Mapping[str, str]]] = {
    "gpt": {"tokens": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head"},
    "llama": {"tokens": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
}
_PARTS: Final[Mapping[str, Mapping[str, str]]] = {
    "gpt": {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.out": "mlp.c_proj",
    },
    "llama": {
        "attention_norm": "input_layernorm",
        "attention.q": "self_attn.q_proj",
        "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj",
        "attention.out": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.out": "mlp.down_proj",
    },
}
_ACTIVATIONS: Final = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def foreign_name(kind: str, name: str) -> str:
    """What transformers calls our parameter `name`."""
    if found := _BLOCK.match(name):
        layer, part, which = found.groups()
        return f"{_LAYERS[kind]}.{layer}.{_PARTS[kind][part]}.{which}"
    module, _, which = name.rpartition(".")
    return f"{_TOP[kind][module]}.{which}"


def is_transposed(kind: str, name: str) -> bool:
    """Whether transformers keeps our parameter `name` with rows and columns exchanged."""
    found = _BLOCK.match(name) if kind == "gpt" else None
    return found is not None and found[3] == "weight" and not found[2].endswith("norm")


def differences(config: ModelSection, settings: Mapping[str, Any], *, is_classifier: bool = False) -> Iterator[str]:
    """What [model] and a config.json say differently, where no shape of a parameter shows it.

    Args:
        is_classifier: the output layer is another one than there in any case.
    """
    known = {"gpt": "gpt2", "llama": "llama"}[config.kind]
    if settings.get("model_type") != known:
        yield f'model_type is "{settings.get("model_type")}" there, and "{known}" is what model.kind = "{config.kind}" is'
        return
    expected = _gpt2(config, settings) if config.kind == "gpt" else _llama(config, settings)
    for name, ours, theirs in expected:
        if ours != theirs and not (is_classifier and name == "model.tied"):
            yield f"{name} is {ours!r}, and {theirs!r} there"


def _gpt2(config: ModelSection, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, here, there)."""
    activation = settings.get("activation_function", "gelu_new")
    yield "model.heads", config.heads, settings.get("n_head", 12)
    yield "model.layers", config.layers, settings.get("n_layer", 12)
    yield "model.activation", config.activation, _ACTIVATIONS.get(activation, activation)
    yield "model.bias", config.bias, True
    yield "model.tied", config.tied, settings.get("tie_word_embeddings", True)
    yield "the epsilon of norms", _NORM_EPS, settings.get("layer_norm_epsilon", 1e-5)
    yield (
        "scaling of attention",
        (True, False),
        tuple(settings.get(key, default) for key, default in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False))),
    )


def _llama(config: ModelSection, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, here, there)."""
    heads, width = settings.get("num_attention_heads", 32), settings.get("hidden_size", 4096)
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    yield "model.heads", config.heads, heads
    yield "model.kv_heads", config.kv_heads or config.heads, settings.get("num_key_value_heads") or heads
    yield "model.layers", config.layers, settings.get("num_hidden_layers", 32)
    yield "model.bias", config.bias, settings.get("attention_bias", False)
    yield "model.bias", config.bias, settings.get("mlp_bias", False)
    yield "model.tied", config.tied, settings.get("tie_word_embeddings", False)
    yield "model.rope_base", config.rope_base, float(rope.get("rope_theta") or settings.get("rope_theta") or 10000.0)
    yield "the kind of rotary positions", "default", rope.get("rope_type") or rope.get("type") or "default"
    yield "the epsilon of norms", _NORM_EPS, settings.get("rms_norm_eps", 1e-6)
    yield "the activation", "silu", settings.get("hidden_act", "silu")
    yield "the width of a head", width // heads, settings.get("head_dim") or width // heads


def settings_of(config: ModelSection, *, vocabulary: int, inside: int, end_of_text: int, labels: tuple[str, ...] = ()) -> dict[str, Any]:
    """The config.json with which transformers builds the same function.

    Args:
        inside: width of the inner layer of an MLP.
        labels: of classes; empty: the next token is predicted.
    """
    name = {"gpt": "GPT2", "llama": "Llama"}[config.kind]
    common = {
        "architectures": [f"{name}ForSequenceClassification" if labels else name + ("LMHeadModel" if name == "GPT2" else "ForCausalLM")],
        "bos_token_id": end_of_text,
        "dtype": "float32",
        "eos_token_id": end_of_text,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tied and not labels,
        "vocab_size": vocabulary,
        **({"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}} if labels else {}),
    }
    of_kind = _gpt2_settings(config, inside) if config.kind == "gpt" else _llama_settings(config, inside)
    return common | of_kind


def _gpt2_settings(config: ModelSection, inside: int) -> dict[str, Any]:
    return {
        "activation_function": {"gelu": "gelu", "gelu_tanh": "gelu_new"}[config.activation],
        "attn_pdrop": 0.0,
        "embd_pdrop": config.dropout,
        "layer_norm_epsilon": _NORM_EPS,
        "model_type": "gpt2",
        "n_embd": config.width,
        "n_head": config.heads,
        "n_inner": inside,
        "n_layer": config.layers,
        "n_positions": config.context,
        "resid_pdrop": config.dropout,
    }


def _llama_settings(config: ModelSection, inside: int) -> dict[str, Any]:
    return {
        "attention_bias": config.bias,
        "attention_dropout": 0.0,
        "head_dim": config.width // config.heads,
        "hidden_act": "silu",
        "hidden_size": config.width,
        "intermediate_size": inside,
        "max_position_embeddings": config.context,
        "mlp_bias": config.bias,
        "model_type": "llama",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads or config.heads,
        "rms_norm_eps": _NORM_EPS,
        "rope_parameters": {"rope_theta": config.rope_base, "rope_type": "default"},
        "rope_theta": config.rope_base,
    }
