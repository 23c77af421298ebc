"""Integrated gradients add up to the change they explain; AttnLRP's rules are the paper's."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.faithfulness.example import Prepared
from benchmarks.faithfulness.gradients import attn_lrp, integrated_gradients, with_lrp_rules
from benchmarks.faithfulness.hf import HFModel

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
