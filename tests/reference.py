"""The paper authors' package as an oracle, where it is exact: Llama-type models, stored attentions.

Spans here are half-open like everywhere in this repository; the package's are inclusive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.reference import Span, capture


@dataclass(frozen=True)
class ReferenceHops:
    """Scores of every hop ``[N]`` (sum over layers, unnormalised) and the hop formula's result."""

    hops: list[torch.Tensor]
    observation: torch.Tensor
    thinking_ratios: list[float]


@torch.no_grad()
def reference_scores(
    model: nn.Module,
    token_ids: list[int],
    target: Span,
    reasoning: Span | None = None,
    hops: int = 0,
) -> ReferenceHops:
    """Runs the package on a HF model that was loaded with ``attn_implementation="eager"``."""
    captured = capture(model, token_ids)
    result = captured.hops(target, reasoning or (target[0] - 1, target[0]), hops)
    return ReferenceHops(
        hops=[hop.token_importance_total.float() for hop in result.raw_attributions],
        observation=result.observation["sum"],
        thinking_ratios=[float(ratio) for ratio in result.thinking_ratios],
    )
