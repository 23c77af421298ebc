"""One layer's attribution put together from the package's parts, on tensors that are not paged."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_flashtrace.core import (
    AttentionForm,
    LayerSums,
    TargetRowBlocks,
    l1_proximity,
    token_proximity,
    token_shares,
)


def weighted_column_sums(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    positions: Tensor,
    form: AttentionForm,
    *,
    out: Tensor | None = None,
    block_rows: int | None = None,
) -> Tensor:
    """``c_h[j]`` of rows ``query [R, H, d]`` over keys ``[N, G, d]``: ``[H, N]``.

    Added to ``out [H, >= N]`` where it is given.
    """
    heads, (context, groups, _) = query.shape[1], key.shape
    if out is None:
        out = torch.zeros(heads, context)
    blocks = TargetRowBlocks(weights, positions, heads, groups, block_rows=block_rows)
    blocks.add(query, key.permute(1, 2, 0).to(torch.float32, copy=True), form, out)
    return out[:, :context]


def layer_scores(
    sums: LayerSums, values: Tensor, out_proj: Tensor, *, exact_fraction: float = 1.0
) -> Tensor:
    """``e_j`` of every token, ``[N]``, for ``values [N, G, d]`` and ``out_proj [H, d, D]``."""
    tokens = token_proximity(
        sums.column_sums, values, out_proj, sums.stream, exact_fraction=exact_fraction
    )
    return token_shares(tokens, tokens.sum() + l1_proximity(sums.residual, sums.stream))


def proximity_bounds(
    column_sums: Tensor, values: Tensor, out_proj: Tensor, stream: Tensor
) -> Tensor:
    """``max(0, sum_i sign(x_i) z_i)`` of every pair, which no proximity exceeds: ``[N, H]``."""
    signs = torch.where(stream < 0, -1.0, 1.0)
    repeated = values.repeat_interleave(len(out_proj) // values.shape[1], dim=1)
    aligned = torch.einsum("nhd,hd->nh", repeated, out_proj @ signs)
    return (aligned * column_sums.T).clamp(min=0)
