"""L1 proximity of every token's contribution to the residual stream.

Invariant: nothing of size ``tokens * heads * D`` is ever stored; a cheap upper bound decides which
contributions are worth forming, and a contribution whose bound is zero scores exactly zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TEMPORARY_FLOATS = 1 << 22
# Multiply-adds per layer that are spent on exact evaluation whatever the fraction.
_CHEAP_MULTIPLY_ADDS = 1 << 25

# On real text with SmolLM2: relative L1 error of the scores 2e-4, where 0.9 reaches 1.3e-3.
DEFAULT_EXACT_FRACTION = 0.98
"""Largest block of contributions held at a time (16 MiB of float32)."""


def l1_proximity(contribution: Tensor, stream: Tensor) -> Tensor:
    """Computes ``max(0, ||x||_1 - ||x - z||_1)``, how much of ``x`` is explained by ``z``.

    With ``s = sign(x)`` (+1 at 0) and ``t = s * z``, coordinate by coordinate
    ``|x| - |x - z| = min(t, 2|x| - t)``: the same number without subtracting two large norms.

    Args:
        contribution: ``[..., D]``, the added vectors ``z``.
        stream: ``[D]``, the residual stream ``x`` they are part of.

    Returns:
        ``[...]``: proximities, never negative.
    """
    aligned = contribution * _signs(stream)
    return torch.minimum(aligned, 2 * stream.abs() - aligned).sum(dim=-1).clamp(min=0)


def proximity_bounds(
    column_sums: Tensor, values: Tensor, out_proj: Tensor, stream: Tensor
) -> Tensor:
    """Bounds every (token, head) proximity from above at ``d`` multiply-adds each.

    The contribution of token ``j`` through head ``h`` is ``z = c_h[j] v_j W_O^h``, and
    ``u_h = W_O^h sign(x)`` is one vector per head. Proof of ``prox(z) <= c_h[j] max(0, v_j.u_h)``:
    ``|x_i| - |x_i - z_i| <= sign(x_i) z_i`` for ``x_i != 0`` since ``|a| >= s a`` for a sign ``s``,
    and ``-|z_i| <= 0`` for ``x_i = 0``; sum over ``i`` and use ``c_h[j] >= 0``.

    Args:
        column_sums: float32 ``[H, N]``, non-negative.
        values: ``[N, G, d]``, value vectors with their bias, as cached.
        out_proj: ``[H, d, D]``, the output projection of each head, so ``v @ out_proj[h]``.
        stream: ``[D]``, the residual stream after attention.

    Returns:
        float32 ``[N, H]``.
    """
    directions = out_proj.float() @ stream.float().sign()  # [H, d]
    grouped = directions.view(values.shape[1], -1, directions.shape[1])  # [G, H/G, d]
    alignment = torch.einsum("ngd,grd->ngr", values.float(), grouped).flatten(1)
    return column_sums.T * alignment.clamp(min=0)


def token_proximity(
    column_sums: Tensor,
    values: Tensor,
    out_proj: Tensor,
    stream: Tensor,
    *,
    exact_fraction: float = DEFAULT_EXACT_FRACTION,
) -> Tensor:
    """Computes each token's proximity to the residual stream, summed over heads.

    The (token, head) pairs with the largest bounds, which together hold ``exact_fraction`` of the
    bounds' total, are evaluated exactly; the rest count with their bound (see
    `proximity_bounds`). The bounds are skewed, so 0.98 means less than a third of the pairs on
    real text. Where evaluating more pairs costs next to nothing, more are evaluated: pruning only
    pays for long contexts and large models.

    Args:
        column_sums: float32 ``[H, N]``, non-negative.
        values: ``[N, G, d]``, value vectors with their bias, as cached.
        out_proj: ``[H, d, D]``, the output projection of each head.
        stream: ``[D]``, the residual stream after attention, in the weighting of `column_sums`.
        exact_fraction: 1.0 evaluates every pair with a positive bound, 0.0 none.

    Returns:
        float32 ``[N]``: ``sum_h prox(c_h[j] v_j W_O^h)``.

    Raises:
        ValueError: `exact_fraction` is not within 0..1.
    """
    bounds = proximity_bounds(column_sums, values, out_proj, stream)
    cheap = _CHEAP_MULTIPLY_ADDS // (out_proj.shape[1] * out_proj.shape[2])
    chosen = _largest(bounds, exact_fraction, at_least=cheap)
    scores = bounds.masked_fill(chosen, 0).sum(dim=1)

    heads_per_group = out_proj.shape[0] // values.shape[1]
    tokens = chosen.T.nonzero()[:, 1]  # ordered by head
    for head, picked in enumerate(tokens.split(chosen.sum(dim=0).tolist())):
        if picked.numel() == 0:
            continue
        rows = values[:, head // heads_per_group][picked].float()
        rows = rows * column_sums[head, picked, None]
        scores.index_add_(0, picked, _head_proximity(rows, out_proj[head].float(), stream.float()))
    return scores


def _head_proximity(rows: Tensor, projection: Tensor, stream: Tensor) -> Tensor:
    """Proximities ``[P]`` of ``rows [P, d] @ projection [d, D]``, in bounded blocks of rows.

    Uses ``sum_i min(t_i, 2|x_i| - t_i) = sum_i t_i - 2 sum_i max(0, t_i - |x_i|)``, in which the
    first sum needs no ``[P, D]`` matrix and the second is one GEMM with ``|x|`` as its addend.
    """
    aligned = projection * _signs(stream)
    total = rows @ aligned.sum(dim=1)
    size = stream.abs()
    block = max(1, _TEMPORARY_FLOATS // size.shape[0])
    overshoot = torch.cat(
        [
            torch.addmm(size, part, aligned, beta=-1).clamp_(min=0).sum(dim=1)
            for part in rows.split(block)
        ]
    )
    return (total - 2 * overshoot).clamp_(min=0)


def _signs(stream: Tensor) -> Tensor:
    """Signs of the stream with +1 at zero, where either sign gives ``-|z|``."""
    return torch.where(stream < 0, -1.0, 1.0).to(stream.dtype)


def _largest(bounds: Tensor, fraction: float, at_least: int = 0) -> Tensor:
    """Mask of the largest positive bounds that together hold `fraction` of the total.

    At least `at_least` bounds are chosen, if there are as many and `fraction` is positive.

    Chosen by threshold, so equal bounds are treated alike and token order does not matter.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"exact_fraction must be within 0..1, got {fraction}")
    positive = bounds > 0
    if fraction == 1:
        return positive
    ranked = bounds[positive].sort(descending=True).values
    if fraction == 0 or ranked.numel() == 0:
        return torch.zeros_like(positive)
    mass = ranked.cumsum(0, dtype=torch.float64)
    last = torch.searchsorted(mass, fraction * mass[-1:]).clamp_(min=at_least - 1)
    return bounds >= ranked[last.clamp_(max=ranked.numel() - 1)]
