"""Small models of Hugging Face transformers with random weights, in folders as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_OTHERS = {"max_position_embeddings": 16, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {**_GPT2, "bos_token_id": 0, "eos_token_id": 0}),  # tied, Conv1D
    "llama": ("Llama", {**_SIZES, **_OTHERS, "tie_word_embeddings": False, "rms_norm_eps": 1e-5}),
    "qwen2": ("Qwen2", {**_SIZES, **_OTHERS, "tie_word_embeddings": True}),  # rotary, tied, biases of q, k, v
    "gemma": ("Gemma", {**_SIZES, **_OTHERS, "head_dim": 8}),  # norms that begin at 0
}
FOREIGN = tuple(CONFIGS)


def foreign_folder(kind: str, folder: Path, *, vocabulary: int, seed: int = 1, shard_size: str = "1GB", **fields: Any) -> Path:
    """config.json and weights that are far from those of a start: what depends on something shows."""
    import transformers

    name, of_kind = CONFIGS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = getattr(transformers, f"{name}Config")(vocab_size=vocabulary, **{**of_kind, **fields})
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def reference(folder: Path) -> Any:
    """transformers' own model, in evaluation mode."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
