"""The FlashTrace method (arXiv 2602.01914) in plain torch: no engine, no tokenizer, no I/O.

A finished trace is input, reasoning and output. For a target, non-negative weights ``w_i`` over its
positions (`weights`), one attribution pass gives every earlier token a score. With ``alpha`` the
attention weights of a layer, ``x_prev`` the residual stream entering its attention block and
``x_mid`` the stream after attention is added (section 3.2):

    c_h[j]  = sum_i w_i alpha^h_ij                                          `attention`
    r       = sum_i w_i x_prev_i,    x = sum_i w_i x_mid_i
    f_jh    = c_h[j] v_j^h W_O^h
    prox(z) = max(0, ||x||_1 - ||x - z||_1)                                 `proximity`
    e_j     = sum_h prox(f_jh) / (sum_jh prox(f_jh) + prox(r))

A token's score is ``e_j`` summed over layers. ``c``, ``r`` and ``x`` are additive over target
positions, so they may be accumulated over chunks and segments; ``prox`` is applied once, at the
end. Later hops take the scores on the reasoning as the next target (section 3.3, `hops`).
`identity` measures whether a layer is what all this takes it for. `head_weights` has weights of
heads, learned from ablations, that can take the place of `proximity`.
"""

from __future__ import annotations

from vllm_flashtrace.core.attention import AttentionForm, TargetRowBlocks
from vllm_flashtrace.core.head_weights import fit_head_weights, head_scores
from vllm_flashtrace.core.hops import HopMass, HopRecursion, HopResult
from vllm_flashtrace.core.identity import attention_error, contribution, identity_error
from vllm_flashtrace.core.proximity import (
    DEFAULT_EXACT_FRACTION,
    LayerSums,
    l1_proximity,
    token_proximity,
    token_shares,
)
from vllm_flashtrace.core.weights import TargetWeights

__all__ = [
    "DEFAULT_EXACT_FRACTION",
    "AttentionForm",
    "HopMass",
    "HopRecursion",
    "HopResult",
    "LayerSums",
    "TargetRowBlocks",
    "TargetWeights",
    "attention_error",
    "contribution",
    "fit_head_weights",
    "head_scores",
    "identity_error",
    "l1_proximity",
    "token_proximity",
    "token_shares",
]
