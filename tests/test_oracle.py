"""The oracle itself: its capture is what the model computes, its formulas on numbers by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.oracle import (
    activation_scores,
    as_float64,
    capture_hf,
    dense_weights,
    layer_oracle,
    oracle_hops,
    oracle_scores,
)
from tests.tiny_models import FAMILIES, VOCABULARY, make_tiny_model

IDS = torch.randint(3, 510, (60,), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_activations_are_those_of_the_eager_model(model: Any) -> None:
    layers = capture_hf(model, IDS)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        output = eager(IDS[None], output_attentions=True, output_hidden_states=True)
    assert len(layers) == 4
    for index, layer in enumerate(layers):
        torch.testing.assert_close(
            layer.alpha.float(), output.attentions[index][0], rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(
            layer.x_prev.float(), output.hidden_states[index][0], rtol=1e-3, atol=1e-3
        )


def test_sinks_and_windows(tmp_path: Path) -> None:
    """The weights of a model with both are those of its own code, and sum to less than 1."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        make_tiny_model("gpt_oss", tmp_path), attn_implementation="eager", dtype=torch.float32
    )
    layers = capture_hf(model, IDS)
    with torch.no_grad():
        output = model(IDS[None], output_attentions=True)
    for layer, attention in zip(layers, output.attentions, strict=True):
        torch.testing.assert_close(layer.alpha.float(), attention[0], rtol=1e-3, atol=1e-4)
        assert float(layer.alpha.sum(-1).max()) < 1


def test_contributions_add_up_to_the_attention_block(model: Any) -> None:
    for layer in capture_hf(model, IDS):
        heads, dim = layer.query.shape[1:]
        values = layer.value.repeat_interleave(heads // layer.value.shape[1], dim=1)
        o_proj = layer.o_proj.reshape(-1, heads, dim)
        added = torch.einsum("hij,jhd,khd->ik", layer.alpha, values, o_proj)
        torch.testing.assert_close(layer.x_prev + added, layer.x_mid, rtol=1e-9, atol=1e-9)


def test_capture_leaves_the_model_as_it_was(model: Any) -> None:
    double = as_float64(model)
    implementation = double.config._attn_implementation
    capture_hf(double, IDS)
    assert double.config._attn_implementation == implementation
    assert not any(layer._forward_pre_hooks for layer in double.model.layers)
    assert model.dtype == torch.float32


def test_reducing_as_layers_run_gives_the_same_scores(model: Any) -> None:
    positions, weights = [40, 41, 59], [1.0, 0.5, 2.0]
    stored = activation_scores(capture_hf(model, IDS), dense_weights(60, positions, weights))
    lean = oracle_scores(model, IDS.tolist(), positions, weights)
    assert lean.dtype == torch.float64
    torch.testing.assert_close(lean, stored.sum(0), rtol=1e-12, atol=1e-15)


def test_tiny_attention_is_far_from_uniform(model: Any) -> None:
    uniform = 1 / torch.arange(1, 61)
    for layer in capture_hf(model, IDS)[1:]:
        assert (layer.alpha.amax(-1)[:, 30:] > 2 * uniform[30:]).all()


def test_tiny_tokenizer_covers_the_vocabulary(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == VOCABULARY
    text = "<think>Où est la clé? 鍵</think> 4821"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_ids("<think>") == ids[0]
    chat = [{"role": "user", "content": "key?"}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert rendered == "<|im_start|>user\nkey?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token == "<|im_end|>"


def test_same_seed_same_weights(tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> bytes:
        folder = make_tiny_model("llama", tmp_path / name, seed=seed)
        return (folder / "model.safetensors").read_bytes()

    assert weights("a", 0) == weights("b", 0) != weights("c", 1)


def test_layer_by_hand() -> None:
    # One head of size 1, hidden size 2, W = (1, 0). Row 1 of the attention is (1/4, 3/4).
    alpha = torch.tensor([[[1, 0], [0.25, 0.75]]], dtype=torch.float64)
    v = torch.tensor([[[4.0]], [[-4.0]]], dtype=torch.float64)
    o_proj = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    x_prev = torch.tensor([[9, 9], [4, 3]], dtype=torch.float64)
    x_mid = torch.tensor([[9, 9], [2, 3]], dtype=torch.float64)
    # f_0 = (1, 0): prox 5 - 4 = 1. f_1 = (-3, 0): 5 - 8 < 0, prox 0. r = (4, 3): 5 - 2 = 3.
    scores = layer_oracle(alpha, x_prev, x_mid, v, o_proj, dense_weights(2, [1], [1.0]))
    assert scores.tolist() == [0.25, 0.0]


def test_hops_by_hand() -> None:
    # Token 0 is input, 1 reasoning, 2 target: rho_0 = 0.6, then a quarter stays on reasoning.
    answers = iter([torch.tensor([0.3, 0.6, 0.1]), torch.tensor([3.0, 1.0, 0.0])])
    final, remaining = oracle_hops(
        lambda _: next(answers).double(),
        torch.tensor([0.0, 0, 1], dtype=torch.float64),
        torch.tensor([True, False, False]),
        torch.tensor([False, True, False]),
        1,
    )
    assert final.tolist() == pytest.approx([0.3 + 0.6 * 0.75, 0, 0])
    assert remaining == pytest.approx(0.6 * 0.25)
