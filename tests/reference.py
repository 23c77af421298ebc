"""The paper authors' package as an oracle, where it is exact: Llama-type models, stored attentions.

Spans here are half-open like everywhere in this repository; the package's are inclusive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from flashtrace import core as package
from torch import nn

Span = tuple[int, int]


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
    dtype = next(model.parameters()).dtype
    metadata = package.extract_model_metadata(model)
    cache, handles = package.attach_hooks(metadata.layers, dtype)
    try:
        outputs = model(
            input_ids=torch.tensor([token_ids]), output_attentions=True, use_cache=False
        )
    finally:
        for handle in handles:
            handle.remove()
    params = package.IFRParameters(
        n_layers=metadata.n_layers,
        n_heads_q=metadata.n_heads_q,
        n_kv_heads=metadata.n_kv_heads,
        head_dim=metadata.head_dim,
        group_size=metadata.group_size,
        d_model=metadata.d_model,
        sequence_length=len(token_ids),
        model_dtype=dtype,
        chunk_tokens=128,
        sink_chunk_tokens=32,
    )
    begin, end = reasoning or (target[0] - 1, target[0])
    result = package.compute_multi_hop_ifr(
        sink_start=target[0],
        sink_end=target[1] - 1,
        thinking_span=(begin, end - 1),
        n_hops=hops,
        cache=cache,
        attentions=outputs.attentions,
        weight_pack=package.build_weight_pack(metadata, dtype),
        params=params,
    )
    return ReferenceHops(
        hops=[hop.token_importance_total.float() for hop in result.raw_attributions],
        observation=result.observation["sum"],
        thinking_ratios=[float(ratio) for ratio in result.thinking_ratios],
    )
