"""Integrated gradients add up to the change they explain; AttnLRP's rules are the paper's."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.faithfulness.attention import attention_mean
from benchmarks.faithfulness.example import Prepared
from benchmarks.faithfulness.gradients import (
    attention_gradient,
    attention_ig,
    attention_times_ig,
    attn_lrp,
    integrated_gradients,
    with_lrp_rules,
)
from benchmarks.faithfulness.hf import HFModel
from tests.oracle import LayerActivations, capture_hf

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def relevance_model(hf: HFModel) -> Any:
    return with_lrp_rules(hf.twin())


@torch.no_grad()
def log_probability(hf: HFModel, prepared: Prepared, token_ids: list[int]) -> float:
    logs = hf.model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    return sum(float(logs[at - 1, prepared.token_ids[at]]) for at in range(*prepared.target))


def test_integrated_gradients_are_complete(hf: HFModel, prepared: Prepared) -> None:
    scores, facts = integrated_gradients(hf, prepared, 100)
    first, end = prepared.user
    padded = list(prepared.token_ids)
    padded[first:end] = [hf.pad_token_id] * (end - first)
    whole = log_probability(hf, prepared, list(prepared.token_ids))
    change = whole - log_probability(hf, prepared, padded)
    assert float(scores.sum()) == pytest.approx(change, rel=0.05)
    assert facts["completeness_gap"] < 0.05
    assert not scores[:first].any() and not scores[end:].any()


@pytest.fixture(scope="module")
def layers(double_model: Any, prepared: Prepared) -> list[LayerActivations]:
    return capture_hf(double_model, prepared.token_ids)


@torch.no_grad()
def mixed(double_model: Any, prepared: Prepared, change: Any) -> float:
    """The target's log-probability where `change` makes what each attention block adds.

    It gets the number of the layer, the block's values ``[N, H, d]`` and what it would add.
    """

    def hook(at: int) -> Any:
        def replaced(module: Any, _: Any, kwargs: Any, output: Any) -> Any:
            values = module.v_proj(kwargs["hidden_states"])[0].unflatten(-1, (-1, module.head_dim))
            values = values.repeat_interleave(module.num_key_value_groups, dim=1)
            return change(at, values, output[0][0])[None], None

        return replaced

    hooks = [
        layer.self_attn.register_forward_hook(hook(at), with_kwargs=True)
        for at, layer in enumerate(double_model.model.layers)
    ]
    try:
        logs = double_model(torch.tensor([prepared.token_ids])).logits[0].log_softmax(-1)
    finally:
        for handle in hooks:
            handle.remove()
    return sum(float(logs[at - 1, prepared.token_ids[at]]) for at in range(*prepared.target))


def given(
    double_model: Any, prepared: Prepared, layers: list[LayerActivations], weights: Sequence[Tensor]
) -> float:
    """The target's log-probability with these attention weights."""

    def change(at: int, values: Tensor, _: Tensor) -> Tensor:
        return torch.einsum("hij,jhd->ihd", weights[at], values).flatten(1) @ layers[at].o_proj.T

    return mixed(double_model, prepared, change)


def adding(layer: int, row: int, vector: Tensor) -> Any:
    """For `mixed`: one row of one layer's block adds this, too."""
    return lambda at, _, added: (
        added.index_add(0, torch.tensor([row]), vector[None]) if at == layer else added
    )


def test_integrated_attention_is_complete(
    hf: HFModel, double_model: Any, prepared: Prepared, layers: list[LayerActivations]
) -> None:
    whole = mixed(double_model, prepared, lambda _, __, added: added)
    without = mixed(double_model, prepared, lambda _, __, added: 0 * added)
    coarse, fine = (float(attention_ig(hf, prepared, n)[0].sum()) for n in (40, 80))
    # The rule's error halves with the step.
    assert 2 * fine - coarse == pytest.approx(whole - without, rel=0.01)
    assert given(double_model, prepared, layers, [x.alpha for x in layers]) == pytest.approx(whole)
    assert hf.model.config._attn_implementation == "eager"
    assert not hasattr(hf.model.model.layers[0].self_attn, "given_attention")


def test_attention_weights_are_scaled_together(
    hf: HFModel, double_model: Any, prepared: Prepared, layers: list[LayerActivations]
) -> None:
    """The columns' changes by central differences, at both points of the rule."""
    scores, _ = attention_ig(hf, prepared, 2)
    column = int(scores.abs().argmax())
    step = 0.02  # Norms and softmax compute in float32 even so.
    wanted = 0.0
    for share in (0.5, 1.0):
        ends = []
        for sign in (1, -1):
            weights = [share * layer.alpha for layer in layers]
            for weight, layer in zip(weights, layers, strict=True):
                weight[:, :, column] += sign * step * layer.alpha[:, :, column]
            ends.append(given(double_model, prepared, layers, weights))
        wanted += (ends[0] - ends[1]) / (2 * step) / 2
    assert float(scores[column]) == pytest.approx(wanted, rel=1e-3)


def test_attention_gradient_rolls_out_what_a_change_of_attention_does(
    hf: HFModel, double_model: Any, prepared: Prepared, layers: list[LayerActivations]
) -> None:
    """Against the matrix rule, with gradients by autograd on the block's output."""
    outputs: list[Tensor] = []

    def take(_: Any, __: Any, output: Any) -> Any:
        output[0].requires_grad_()
        outputs.append(output[0])

    hooks = [layer.self_attn.register_forward_hook(take) for layer in double_model.model.layers]
    try:
        logs = double_model(torch.tensor([prepared.token_ids])).logits[0].log_softmax(-1)
    finally:
        for hook in hooks:
            hook.remove()
    value = sum(logs[at - 1, prepared.token_ids[at]] for at in range(*prepared.target))
    assert isinstance(value, Tensor)
    relevance = torch.eye(len(prepared.token_ids), dtype=torch.float64)
    first, end = prepared.target
    slopes = torch.autograd.grad(value, outputs)
    for number, (layer, slope) in enumerate(zip(layers, slopes, strict=True)):
        heads = len(layer.alpha)
        values = layer.value.repeat_interleave(heads // layer.value.shape[1], dim=1)
        projection = layer.o_proj.unflatten(1, (heads, -1))  # [D, H, d]
        gradient = torch.einsum("iD,Dhd,jhd->hij", slope[0], projection, values)
        relevance = relevance + (layer.alpha * gradient).clamp(min=0).mean(0) @ relevance
        # One entry by central differences, in which later layers attend anew.
        row, column, step = end - 2, prepared.user[0] + 3, 2e-3
        brought = values[column, 1] @ projection[:, 1].T
        ends = [
            mixed(double_model, prepared, adding(number, row, sign * step * brought))
            for sign in (1, -1)
        ]
        wanted = (ends[0] - ends[1]) / (2 * step)
        assert float(gradient[1, row, column]) == pytest.approx(wanted, rel=1e-3)
    scores, _ = attention_gradient(hf, prepared)
    torch.testing.assert_close(scores, relevance[first - 1 : end - 1].mean(0), rtol=1e-3, atol=1e-6)


def test_attention_times_ig_is_a_product(hf: HFModel, prepared: Prepared) -> None:
    scores, _ = attention_times_ig(hf, prepared)
    gradients, _ = integrated_gradients(hf, prepared)
    attention, _ = attention_mean(hf.recorded(prepared), prepared)
    torch.testing.assert_close(scores, gradients * attention, rtol=1e-4, atol=1e-9)
    assert (scores < 0).any() and (scores > 0).any()


def test_the_forward_pass_is_the_models(
    hf: HFModel, relevance_model: Any, prepared: Prepared
) -> None:
    ids = torch.tensor([prepared.token_ids])
    with torch.no_grad():
        torch.testing.assert_close(
            relevance_model(ids).logits, hf.model(ids).logits, rtol=1e-4, atol=1e-4
        )


def test_rules_stay_on_the_copy(hf: HFModel, prepared: Prepared) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    before = LlamaMLP.forward, LlamaRMSNorm.forward
    copy = with_lrp_rules(hf.twin())
    assert (LlamaMLP.forward, LlamaRMSNorm.forward) == before
    assert "forward" not in vars(hf.model.model.layers[0].mlp)
    assert hf.model.config._attn_implementation == "eager"
    plain, _ = attn_lrp(hf.model, prepared)
    ruled, _ = attn_lrp(copy, prepared)
    assert (plain - ruled).abs().max() > 0.1 * ruled.abs().max()
    weights = copy.model.layers[0].mlp.up_proj.weight
    assert weights.data_ptr() == hf.model.model.layers[0].mlp.up_proj.weight.data_ptr()


def test_relevance_is_conserved_but_for_the_softmax(hf: HFModel, prepared: Prepared) -> None:
    """Norms, gated MLPs, linear layers and residuals hand on all they get."""
    silenced = with_lrp_rules(hf.twin())
    for layer in silenced.model.layers:
        layer.self_attn.o_proj.weight = nn.Parameter(
            torch.zeros_like(layer.self_attn.o_proj.weight), requires_grad=False
        )
    relevance, facts = attn_lrp(silenced, prepared)
    assert facts["conserved"] == pytest.approx(1, abs=1e-3)
    assert relevance.abs().sum() > 0


@pytest.mark.usefixtures("relevance_model")
def test_attention_follows_the_explicit_rules() -> None:
    """Against lxt's own explicit propagation of relevance through products and softmax."""
    from lxt.explicit import functional as explicit
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    generator = torch.Generator().manual_seed(3)
    shapes = (1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), (1, 2, 5, 8)
    query, key, value, relevance = (torch.randn(s, generator=generator) for s in shapes)

    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    logits = explicit.matmul(leaves[0], leaves[1].transpose(2, 3))
    explicit.matmul(explicit.softmax(logits, -1), leaves[2]).backward(relevance)
    wanted = [leaf.grad for leaf in leaves]

    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    module = types.SimpleNamespace(num_key_value_groups=1, is_causal=False, training=False)
    attention = ALL_ATTENTION_FUNCTIONS["attnlrp"]
    output = attention(module, *leaves, None, scaling=1.0, dropout=0.0)[0].transpose(1, 2)
    output.backward(relevance / output.detach())
    for leaf, rule in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.detach() * leaf.grad, rule, rtol=1e-3, atol=1e-3)
