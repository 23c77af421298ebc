"""Token scores of one layer from its accumulated sums.

Invariant: a score is returned only when every input is finite; a layer's scores and its residual
share never exceed one in total.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_flashtrace.core.proximity import (
    DEFAULT_EXACT_FRACTION,
    l1_proximity,
    token_proximity,
)


@dataclass
class LayerSums:
    """What one layer accumulates over the target positions; every field is additive over them.

    Attributes:
        column_sums: float32 ``[H, N]``, weighted column sums of the attention matrix.
        residual: float32 ``[D]``, weighted sum of the stream entering the attention block.
        stream: float32 ``[D]``, weighted sum of the stream after attention has been added.
    """

    column_sums: Tensor
    residual: Tensor
    stream: Tensor


def layer_scores(
    sums: LayerSums,
    values: Tensor,
    out_proj: Tensor,
    *,
    exact_fraction: float = DEFAULT_EXACT_FRACTION,
    column_norms: Tensor | None = None,
) -> Tensor:
    """Computes the share of the attention block's output that flows from each token.

    ``e_j = sum_h prox(f_jh) / (sum_jh prox(f_jh) + prox(r))`` with ``f_jh`` the contribution of
    token ``j`` through head ``h`` and ``r`` the residual (arXiv 2602.01914; the residual counts in
    the denominator only). Does not change when all target weights are scaled by one factor.

    Args:
        sums: The layer's sums over all target positions.
        values: ``[N, G, d]``, value vectors with their bias, as cached.
        out_proj: ``[H, d, D]``, the output projection of each head, so ``v @ out_proj[h]``.
        exact_fraction: See `token_proximity`.
        column_norms: See `token_proximity`.

    Returns:
        float32 ``[N]``, non-negative, summing to at most one; zeros if nothing is aligned with the
        stream, the residual included.

    Raises:
        ValueError: The shapes do not fit together, or a tensor holds a NaN, an infinity or (in
            the column sums) a negative number; the message names it.
    """
    _check_shapes(sums, values, out_proj)
    _check_numbers(sums, out_proj if column_norms is None else column_norms)
    tokens = token_proximity(
        sums.column_sums,
        values,
        out_proj,
        sums.stream,
        exact_fraction=exact_fraction,
        column_norms=column_norms,
    )
    residual = l1_proximity(sums.residual.float(), sums.stream.float())
    return token_shares(tokens, tokens.sum() + residual)


def token_shares(proximities: Tensor, denominators: Tensor) -> Tensor:
    """Computes ``e_j``, each token's share of a layer's proximity.

    Args:
        proximities: ``[..., N]``, summed over heads; over some of the heads gives their part.
        denominators: ``[...]``, the proximity of all tokens through all heads and of the residual.

    Returns:
        ``[..., N]``, zeros where nothing is aligned with the stream.
    """
    shares = proximities / denominators[..., None]
    return torch.where(denominators[..., None] > 0, shares, torch.zeros_like(shares))


def _check_shapes(sums: LayerSums, values: Tensor, out_proj: Tensor) -> None:
    shapes = {
        "column_sums": sums.column_sums.shape,
        "values": values.shape,
        "out_proj": out_proj.shape,
        "residual": sums.residual.shape,
        "stream": sums.stream.shape,
    }
    listing = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
    if values.dim() != 3 or out_proj.dim() != 3 or 0 in values.shape:
        raise ValueError(f"values must be [N, G, d] and out_proj [H, d, D]; got {listing}")
    context, groups, dim = values.shape
    heads, hidden = out_proj.shape[0], out_proj.shape[2]
    expected = {
        "column_sums": (heads, context),
        "out_proj": (heads, dim, hidden),
        "residual": (hidden,),
        "stream": (hidden,),
    }
    if heads % groups or any(shapes[name] != shape for name, shape in expected.items()):
        raise ValueError(f"the layer's tensors do not fit together: {listing}")


def _check_numbers(sums: LayerSums, projection: Tensor) -> None:
    """Refuses what is not finite; `projection` is the matrix or the norms of its columns.

    Values are checked where their norms are computed anyway, in `token_proximity`.
    """
    tensors = {
        "column_sums": sums.column_sums,
        "residual": sums.residual,
        "stream": sums.stream,
        "out_proj": projection,
    }
    # A sum is one pass without a temporary, and neither a NaN nor an infinity leaves it finite.
    totals = torch.stack([t.sum().float() for t in tensors.values()] + [sums.column_sums.min()])
    *finite, _ = totals.isfinite().tolist()
    for name, fine in zip(tensors, finite, strict=True):
        if not fine:
            raise ValueError(f"{name} of the layer is not finite")
    if (lowest := float(totals[-1])) < 0:
        raise ValueError(f"column_sums of the layer has a negative entry: {lowest}")
