"""Turns a GGUF file of a Llama or Qwen2 model into a Hugging Face model folder.

Tensors are dequantised to float32 with the ``gguf`` package, and a Llama's query/key rows are put
back into Hugging Face's rotary order. The result depends on the GGUF file alone.

``transformers`` can load the same file, but refuses to save what it loaded, needs ``accelerate``,
drops the digit-splitting pre-tokenizer of the ``smollm`` vocabulary, and pulls in torch (which must
not run before vLLM forks its engine).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_CONTROL_TOKEN = 3
# Pre-tokenizer of the vocabulary of each architecture.
_VOCABULARIES = {"llama": "smollm", "qwen2": "qwen2"}
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Metadata = dict[str, Any]
Array = npt.NDArray[np.float32]


def write_model_folder(gguf_path: Path, folder: Path) -> None:
    """Writes config, weights, tokenizer and generation config into ``folder``.

    Args:
        gguf_path: A GGUF file of architecture ``llama`` or ``qwen2`` with a byte-level BPE
            tokenizer whose pre-tokenizer is ``smollm`` or ``qwen2``, respectively.
        folder: An existing, empty directory.

    Raises:
        ValueError: The file has another architecture, tokenizer or an unknown tensor.
    """
    reader = gguf.GGUFReader(gguf_path)
    metadata: Metadata = {key: field.contents() for key, field in reader.fields.items()}
    architecture = metadata.get("general.architecture")
    if architecture not in _VOCABULARIES:
        known = " or ".join(map(repr, _VOCABULARIES))
        name = "general.architecture"
        raise ValueError(f"{gguf_path.name}: {name} is {architecture!r}, not {known}.")
    expected = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _VOCABULARIES[architecture],
    }
    for key, value in expected.items():
        if metadata.get(key) != value:
            raise ValueError(f"{gguf_path.name}: {key} is {metadata.get(key)!r}, not {value!r}.")

    tensors = _weights(reader, metadata)
    weights_path = folder / "model.safetensors"
    save_file(tensors, weights_path, metadata={"format": "pt"})
    weights_path.chmod(0o644)  # safetensors leaves it readable by its owner alone
    _write_json(folder / "config.json", _config(metadata, tied="lm_head.weight" not in tensors))
    _write_json(folder / "generation_config.json", _special_ids(metadata))
    _tokenizer(metadata).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata))
    template = metadata["tokenizer.chat_template"]
    (folder / "chat_template.jinja").write_text(template, "utf-8")


def _weights(reader: gguf.GGUFReader, metadata: Metadata) -> dict[str, Array]:
    interleaved: dict[str, int] = {}
    suffixes: tuple[str, ...] = ("weight", "bias")
    if metadata["general.architecture"] == "llama":
        interleaved = {
            "attn_q": metadata["llama.attention.head_count"],
            "attn_k": metadata["llama.attention.head_count_kv"],
        }
        suffixes = ("weight",)
    tensors: dict[str, Array] = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        *_, kind, suffix = tensor.name.split(".")
        if suffix not in suffixes:
            raise ValueError(f"unexpected tensor {tensor.name!r}.")
        if kind in interleaved:
            values = _to_half_rotary(values, interleaved[kind])
        tensors[_hf_name(tensor.name)] = np.ascontiguousarray(values)
    return tensors


def _hf_name(name: str) -> str:
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in _TOP_NAMES:
        return f"{_TOP_NAMES[parts[0]]}.weight"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    raise ValueError(f"unexpected tensor {name!r}.")


def _to_half_rotary(weight: Array, heads: int) -> Array:
    """Reorders each head's rows from interleaved pairs (GGUF) to two halves (Hugging Face).

    Args:
        weight: ``[heads * head_dim, hidden]``.
        heads: Number of heads in ``weight``.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(rows, hidden)


def _special_ids(metadata: Metadata) -> dict[str, int]:
    return {
        name: int(metadata[f"tokenizer.ggml.{key}_token_id"])
        for name, key in (
            ("bos_token_id", "bos"),
            ("eos_token_id", "eos"),
            ("pad_token_id", "padding"),
        )
    }


def _config(metadata: Metadata, tied: bool) -> dict[str, Any]:
    architecture = metadata["general.architecture"]
    read = {
        key.removeprefix(f"{architecture}."): value
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
    }
    heads, hidden = int(read["attention.head_count"]), int(read["embedding_length"])
    biases = {"attention_bias": False, "mlp_bias": False} if architecture == "llama" else {}
    return {
        "architectures": [f"{architecture.capitalize()}ForCausalLM"],
        "model_type": architecture,
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": int(read["feed_forward_length"]),
        "num_hidden_layers": int(read["block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(read["attention.head_count_kv"]),
        "head_dim": hidden // heads,
        "max_position_embeddings": int(read["context_length"]),
        "rms_norm_eps": float(f"{read['attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(read["rope.freq_base"]),
        **biases,
        "tie_word_embeddings": tied,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        **_special_ids(metadata),
    }


def _tokenizer(metadata: Metadata) -> Tokenizer:
    """Byte-level BPE that splits text as the vocabulary's pre-tokenizer does."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    splits: Any = pre_tokenizers.Digits(individual_digits=True)
    joined = pre_tokenizers.ByteLevel(False)
    if metadata["tokenizer.ggml.pre"] == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        splits = pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated")
        joined = pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splits, joined])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    return tokenizer


def _tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = _special_ids(metadata)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[ids["pad_token_id"]],
        **({"unk_token": tokens[unknown]} if unknown is not None else {}),
        "model_max_length": int(metadata[f"{metadata['general.architecture']}.context_length"]),
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
