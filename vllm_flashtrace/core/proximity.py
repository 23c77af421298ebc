"""L1 proximity of every token's contribution to the residual stream.

Invariant: nothing of size ``tokens * heads * D`` is ever stored, and yet every score is exact:
only the coordinates that a contribution can push past zero are computed, which are few.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_TEMPORARY_FLOATS = 1 << 22
"""Largest block of contributions held at a time (16 MiB of float32)."""

# Rounding of the reach must never hide a coordinate.
_REACH_SLACK = 1 + 1e-5

DEFAULT_EXACT_FRACTION = 1.0
"""Share of the bound's mass that is evaluated exactly; see `token_proximity`."""


class OutputProjection(NamedTuple):
    """``W_O`` of one layer, cut by heads.

    Attributes:
        weight: float32 ``[H, d, D]``, so that a head's contribution is ``v @ weight[h]``.
        column_norms: float32 ``[H, D]``, Euclidean norms of its columns.
    """

    weight: Tensor
    column_norms: Tensor


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
    ``u_h = W_O^h s`` with ``s = sign(x)`` is one vector per head. From `l1_proximity`,
    ``prox(z) <= max(0, sum_i s_i z_i) = c_h[j] max(0, v_j.u_h)``, since ``c_h[j] >= 0``.

    Args:
        column_sums: float32 ``[H, N]``, non-negative.
        values: ``[N, G, d]``, value vectors with their bias, as cached.
        out_proj: ``[H, d, D]``, the output projection of each head, so ``v @ out_proj[h]``.
        stream: ``[D]``, the residual stream after attention.

    Returns:
        float32 ``[N, H]``.
    """
    return _alignment(column_sums, values, out_proj, stream).clamp_(min=0).T


def token_proximity(
    column_sums: Tensor,
    values: Tensor,
    out_proj: Tensor,
    stream: Tensor,
    *,
    exact_fraction: float = DEFAULT_EXACT_FRACTION,
    column_norms: Tensor | None = None,
) -> Tensor:
    """Computes each token's proximity to the residual stream, summed over heads.

    With ``t_i = s_i z_i`` the proximity is ``sum_i t_i - 2 sum_i max(0, t_i - |x_i|)``. The first
    sum costs ``d`` multiply-adds for a (token, head) pair (see `proximity_bounds`). The second, the
    overshoot, runs over coordinates that the contribution pushes past zero. By Cauchy-Schwarz
    ``t_i <= c_h[j] ||v_j|| ||W_O^h[:, i]||``, so coordinate ``i`` matters only to pairs whose reach
    ``c_h[j] ||v_j||`` exceeds ``|x_i| / ||W_O^h[:, i]||``. On real text that is one coordinate in a
    thousand: most pairs have none, few have more than a handful, so the exact result costs little
    more than its bound.

    Args:
        column_sums: float32 ``[H, N]``, non-negative.
        values: ``[N, G, d]``, value vectors with their bias, as cached. Fastest where the memory
            order is ``[G, N, d]``.
        out_proj: ``[H, d, D]``, the output projection of each head.
        stream: ``[D]``, the residual stream after attention, in the weighting of `column_sums`.
        exact_fraction: Below 1.0, the pairs with the largest bounds, which together hold this share
            of the bounds' total, are exact; the rest count with their bound. 0.0 gives the bound.
        column_norms: ``[H, D]``, Euclidean norms of the columns of `out_proj` where the caller
            keeps them; computed if None.

    Returns:
        float32 ``[N]``: ``sum_h prox(c_h[j] v_j W_O^h)``.

    Raises:
        ValueError: `exact_fraction` is not within 0..1.
    """
    if not 0 <= exact_fraction <= 1:
        raise ValueError(f"exact_fraction must be within 0..1, got {exact_fraction}")
    values, out_proj, stream = values.float(), out_proj.float(), stream.float()
    totals = _alignment(column_sums, values, out_proj, stream)  # [H, N]
    groups = values.shape[1]
    lengths = torch.linalg.vector_norm(values, dim=2).T  # [G, N]
    reach = column_sums.view(groups, -1, lengths.shape[1]) * (lengths * _REACH_SLACK)[:, None]
    reach = reach.view_as(totals)
    chosen = totals > 0 if exact_fraction == 1 else _largest(totals, exact_fraction)
    reach.mul_(chosen)

    if column_norms is None:
        column_norms = torch.linalg.vector_norm(out_proj, dim=1)
    size = stream.abs()
    limits = torch.where(column_norms > 0, size / column_norms, torch.inf)  # [H, D]
    hidden = size.shape[0]
    few = min(max(32, hidden // 16), hidden)
    near, columns = limits.topk(few, dim=1, largest=False)
    count = _longest(reach > near[:, :1])
    if count == 0:
        return totals.clamp_(min=0).sum(dim=0)

    # For every head the tokens that reach furthest; heads with fewer are padded with tokens that
    # reach no coordinate, which is harmless.
    reach, tokens = reach.topk(count, dim=1)  # [H, P]
    kv_head = torch.arange(len(totals), device=totals.device) // (len(totals) // groups)
    rows = values[tokens, kv_head[:, None]] * column_sums.gather(1, tokens)[:, :, None]
    signs = _signs(stream)
    picked = out_proj.gather(2, columns[:, None].expand(-1, out_proj.shape[1], -1))
    overshoot = _overshoot(rows, picked * signs[columns][:, None], size[columns])
    if few < hidden and (further := _longest(reach > near[:, -1:])):
        every = size.expand(len(rows), -1)
        overshoot[:, :further] = _overshoot(rows[:, :further], out_proj * signs, every)
    overshoot.mul_(reach > near[:, :1])
    totals.scatter_add_(1, tokens, overshoot.mul_(-2))
    return totals.clamp_(min=0).sum(dim=0)


def _alignment(column_sums: Tensor, values: Tensor, out_proj: Tensor, stream: Tensor) -> Tensor:
    """``sum_i s_i z_i`` of every pair, float32 ``[H, N]``."""
    directions = out_proj.float() @ _signs(stream.float())  # [H, d]
    groups, dim = values.shape[1:]
    aligned = torch.bmm(directions.view(groups, -1, dim), values.float().permute(1, 2, 0))
    return aligned.view_as(column_sums).mul_(column_sums)


def _overshoot(rows: Tensor, aligned: Tensor, size: Tensor) -> Tensor:
    """``sum_i max(0, t_i - |x_i|)`` with ``t = rows @ aligned``, in bounded blocks of rows.

    Args:
        rows: ``[H, P, d]``, weighted value vectors.
        aligned: ``[H, d, M]``, columns of the output projection times the stream's signs.
        size: ``[H, M]``, absolute values of the stream there.

    Returns:
        ``[H, P]``.
    """
    block = max(1, _TEMPORARY_FLOATS // size.numel())
    return torch.cat(
        [
            torch.baddbmm(size[:, None], part, aligned, beta=-1).clamp_(min=0).sum(dim=2)
            for part in rows.split(block, dim=1)
        ],
        dim=1,
    )


def _longest(mask: Tensor) -> int:
    """The largest number of set entries in a row."""
    return int(mask.sum(dim=1).max())


def _signs(stream: Tensor) -> Tensor:
    """Signs of the stream with +1 at zero, where either sign gives ``-|z|``."""
    return torch.where(stream < 0, -1.0, 1.0).to(stream.dtype)


def _largest(bounds: Tensor, fraction: float) -> Tensor:
    """Mask of the largest positive bounds that together hold `fraction` of the total.

    Chosen by threshold, so equal bounds are treated alike and token order does not matter.
    """
    positive = bounds > 0
    if fraction == 1:
        return positive
    ranked = bounds[positive].sort(descending=True).values
    if fraction == 0 or ranked.numel() == 0:
        return torch.zeros_like(positive)
    mass = ranked.cumsum(0, dtype=torch.float64)
    last = torch.searchsorted(mass, fraction * mass[-1:])
    return bounds >= ranked[last.clamp_(max=ranked.numel() - 1)]
