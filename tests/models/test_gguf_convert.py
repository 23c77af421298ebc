from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models.tiny_gguf import CONTROL, LAYERS, gguf_tensors, interleaved, weights, write_gguf
from vllm_flashtrace.models.gguf_convert import write_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gguf")
    (root / "model").mkdir()
    write_model_folder(write_gguf(root / "m.gguf", gguf_tensors(weights())), root / "model")
    return root / "model"


def test_weights_come_back_bit_for_bit(folder: Path) -> None:
    found, expected = load_file(folder / "model.safetensors"), weights()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], weight, err_msg=name)


def test_the_tiny_model_can_tell_rotary_orders_apart() -> None:
    weight = weights()["model.layers.0.self_attn.q_proj.weight"]
    assert not np.array_equal(interleaved(weight, 4), weight)


def test_transformers_loads_every_weight(folder: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.tie_word_embeddings
    assert model.config.num_key_value_heads == 2
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.generation_config.eos_token_id == 2
    with torch.no_grad():
        assert model(torch.tensor([[1, 5, 9]])).logits.isfinite().all()


def test_digits_are_split_and_bytes_survive(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("ab12") == ["ab", "1", "2"]
    for text in ("ab 12\n", "żółć 🙂\t", " <|im_start|>x"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
    assert tokenizer.all_special_tokens
    assert set(tokenizer.all_special_tokens) <= set(CONTROL)
    assert tokenizer.eos_token == "<|im_end|>"


def test_chat_template(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>ab"


def test_everybody_may_read_the_weights(folder: Path) -> None:
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == 0o644


def test_untied_output(tmp_path: Path) -> None:
    tensors = gguf_tensors(weights())
    head = np.flip(tensors["token_embd.weight"], 0).copy()
    (tmp_path / "model").mkdir()
    path = write_gguf(tmp_path / "m.gguf", tensors | {"output.weight": head})
    write_model_folder(path, tmp_path / "model")
    np.testing.assert_array_equal(
        load_file(tmp_path / "model" / "model.safetensors")["lm_head.weight"], head
    )
    assert (
        json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is False
    )


def test_qwen2_has_biases_and_its_own_words(tmp_path: Path) -> None:
    expected = weights()
    tensors = gguf_tensors(expected)
    for kind, name in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v")):
        for layer in range(LAYERS):
            place = f"model.layers.{layer}.self_attn.{kind}_proj"
            # Its rows are in Hugging Face's order already.
            weight = tensors[f"blk.{layer}.{name}.weight"] = expected[f"{place}.weight"]
            bias = np.arange(weight.shape[0], dtype=np.float32)
            tensors[f"blk.{layer}.{name}.bias"] = expected[f"{place}.bias"] = bias
    (tmp_path / "model").mkdir()
    path = write_gguf(tmp_path / "m.gguf", tensors, architecture="qwen2", pre_tokenizer="qwen2")
    write_model_folder(path, tmp_path / "model")
    found = load_file(tmp_path / "model" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_array_equal(found[name], weight, err_msg=name)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.tokenize("ab12") == ["ab", "1", "2"]
    assert tokenizer.decode(tokenizer.encode("e\u0301 12\n\n ab")) == "\u00e9 12\n\n ab"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gemma"}, "general.architecture is 'gemma', not 'llama' or 'qwen2'"),
        ({"architecture": "qwen2"}, "tokenizer.ggml.pre is 'smollm', not 'qwen2'"),
        ({"pre_tokenizer": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe'"),
    ],
)
def test_other_kinds_of_model_are_refused(
    tmp_path: Path, options: dict[str, str], message: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(weights()), **options)
    with pytest.raises(ValueError, match=message):
        write_model_folder(path, tmp_path)


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.0.attn_q_norm.weight", "rope.weight"])
def test_unknown_tensors_are_refused(tmp_path: Path, name: str) -> None:
    tensors = gguf_tensors(weights()) | {name: np.ones(16, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", tensors)
    with pytest.raises(ValueError, match=name):
        write_model_folder(path, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
