"""Model folders with a config and no weights, for engines with dummy ones.

Invariant: the shape is all that counts; weights are vLLM's dummy ones, so no text means anything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}

SMALL: dict[str, Any] = {
    **QWEN3_8B,
    "head_dim": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}


def write_model(folder: Path, *, small: bool, layers: int | None) -> dict[str, Any]:
    """Writes ``config.json`` and returns it.

    Args:
        folder: An existing folder.
        small: A tiny shape instead of Qwen3-8B's.
        layers: Number of layers; the shape's own if None.
    """
    config = dict(SMALL if small else QWEN3_8B)
    if layers is not None:
        config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return config
