"""A tiny model in GGUF form, with the metadata the converter reads."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

HIDDEN, HEADS, KV_HEADS, LAYERS, FEED_FORWARD = 16, 4, 2, 2, 24
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*CONTROL, *sorted(ByteLevel.alphabet()), "12", "ab"]
MERGES = ["1 2", "a b"]


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's rotary order (two halves) to GGUF's (pairs), row by row."""
    size = weight.shape[0] // heads
    order = [
        head * size + (i // 2 if i % 2 == 0 else size // 2 + i // 2)
        for head in range(heads)
        for i in range(size)
    ]
    return weight[order]


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights under Hugging Face's names."""
    random = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray:
        return random.normal(0.0, 0.2, shape).astype(np.float32)

    head = HIDDEN // HEADS
    tensors = {
        "model.embed_tokens.weight": matrix(len(TOKENS), HIDDEN),
        "model.norm.weight": 1 + matrix(HIDDEN),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        tensors |= {
            f"{layer}.input_layernorm.weight": 1 + matrix(HIDDEN),
            f"{layer}.self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": matrix(KV_HEADS * head, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": matrix(KV_HEADS * head, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{layer}.post_attention_layernorm.weight": 1 + matrix(HIDDEN),
            f"{layer}.mlp.gate_proj.weight": matrix(FEED_FORWARD, HIDDEN),
            f"{layer}.mlp.up_proj.weight": matrix(FEED_FORWARD, HIDDEN),
            f"{layer}.mlp.down_proj.weight": matrix(HIDDEN, FEED_FORWARD),
        }
    return tensors


def gguf_tensors(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights under GGUF's names and in its rotary order."""
    parts = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    named = {
        "token_embd.weight": tensors["model.embed_tokens.weight"],
        "output_norm.weight": tensors["model.norm.weight"],
    }
    for i in range(LAYERS):
        for theirs, ours in parts.items():
            weight = tensors[f"model.layers.{i}.{theirs}.weight"]
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(ours)
            named[f"blk.{i}.{ours}.weight"] = interleaved(weight, heads) if heads else weight
    return named


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    *,
    architecture: str = "llama",
    pre_tokenizer: str = "smollm",
) -> Path:
    """Writes the file."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
