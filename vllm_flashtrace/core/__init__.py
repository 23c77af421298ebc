"""The FlashTrace maths in plain torch (arXiv 2602.01914): no engine, no tokenizer, no I/O."""

from __future__ import annotations

from vllm_flashtrace.core.attention import AttentionForm, TargetRowBlocks, weighted_column_sums
from vllm_flashtrace.core.hops import HopMass, HopRecursion, HopResult
from vllm_flashtrace.core.proximity import (
    LayerSums,
    OutputProjection,
    l1_proximity,
    layer_scores,
    proximity_bounds,
    token_proximity,
    token_shares,
)
from vllm_flashtrace.core.weights import TargetWeights

__all__ = [
    "AttentionForm",
    "HopMass",
    "HopRecursion",
    "HopResult",
    "LayerSums",
    "OutputProjection",
    "TargetRowBlocks",
    "TargetWeights",
    "l1_proximity",
    "layer_scores",
    "proximity_bounds",
    "token_proximity",
    "token_shares",
    "weighted_column_sums",
]
