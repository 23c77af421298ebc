"""Token scores of one layer from its accumulated sums (section 3.2).

With ``f_jh = c_h[j] v_j^h W_O^h`` the contribution of token ``j`` through head ``h``, ``r`` the
residual entering the attention block and ``x`` the stream after it,

    prox(z) = max(0, ||x||_1 - ||x - z||_1)
    e_j     = sum_h prox(f_jh) / (sum_jh prox(f_jh) + prox(r))

The residual counts in the denominator only.

Where the output ``u_i = sum_jh alpha^h_ij v_j^h W_O^h + b`` of the attention block passes an
RMSNorm before it is added to the stream,

    x_mid_i - x_prev_i = gamma * u_i / rms_i,    rms_i = sqrt(mean(u_i^2) + epsilon)

and ``rms_i`` is one number for all heads and tokens, as it is in the forward pass. So it belongs to
the weight of row ``i`` in this layer, and ``gamma`` to the projection, both exactly:

    c_h[j] = sum_i (w_i / rms_i) alpha^h_ij      W_O^h diag(gamma) in the place of W_O^h
    r      = sum_i w_i x_prev_i                  x = r + gamma * sum_i (w_i / rms_i) u_i

Where the attention's output passes a gate before ``W_O``, ``g_i^h`` for each head or ``g_i^h[e]``
for each coordinate of its value, the gate of row ``i`` is one for all tokens and belongs to the
row's weight too:

    c_h[j] = sum_i w_i g_i^h alpha^h_ij          f_jh = c_h[j] v_j^h W_O^h
    c_h[j][e] = sum_i w_i g_i^h[e] alpha^h_ij    f_jh = (c_h[j] * v_j^h) W_O^h

Contributions have ``tokens * heads * D`` coordinates;
`token_proximity` is exact without storing or even computing most of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULT_EXACT_FRACTION = 1.0
"""Share of the bound's mass that is evaluated exactly; see `token_proximity`."""

_TEMPORARY_FLOATS = 1 << 22
"""Largest block of contributions held at a time (16 MiB of float32)."""

_FEW_COLUMNS, _SOME_COLUMNS = 8, 32
"""Coordinates that are computed for every pair, and for those that reach further."""

# Rounding of the reach must never hide a coordinate.
_REACH_SLACK = 1 + 1e-5


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


def l1_proximity(contribution: Tensor, stream: Tensor) -> Tensor:
    """Computes ``prox(z) = max(0, ||x||_1 - ||x - z||_1)``, how much of ``x`` comes from ``z``.

    With ``s = sign(x)`` (+1 at 0) and ``t = s * z``, coordinate by coordinate
    ``|x| - |x - z| = min(t, 2|x| - t)``: the same number without subtracting two large norms, which
    would lose small contributions in float32.

    Args:
        contribution: ``[..., D]``, the added vectors ``z``.
        stream: ``[D]``, the residual stream ``x`` they are part of.

    Returns:
        ``[...]``: proximities, never negative.
    """
    aligned = contribution * _signs(stream)
    return torch.minimum(aligned, 2 * stream.abs() - aligned).sum(dim=-1).clamp(min=0)


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

    With ``s = sign(x)`` and ``t_i = s_i z_i``, the proximity of ``z`` is the positive part of
    ``sum_i t_i - 2 sum_i max(0, t_i - |x_i|)``.

    The first sum is ``c_h[j] v_j . (W_O^h s)``: ``d`` multiply-adds for a (token, head) pair. It
    bounds the proximity from above. The second, the overshoot, runs over coordinates that the
    contribution pushes past zero. By Cauchy-Schwarz ``t_i <= c_h[j] ||v_j|| ||W_O^h[:, i]||``, so
    coordinate ``i`` matters only to pairs whose reach ``c_h[j] ||v_j||`` exceeds
    ``|x_i| / ||W_O^h[:, i]||``. On real text that is one coordinate in a thousand: most pairs have
    none, few have more than a handful, so the exact result costs little more than its bound.

    Args:
        column_sums: float32 ``[H, N]``, non-negative.
        values: ``[N, G, d]``, value vectors with their bias, as cached. Fastest where the memory
            order is ``[G, N, d]``.
        out_proj: ``[H, d, D]``, the output projection of each head, so ``f = v @ out_proj[h]``.
            Fastest as a view of a linear layer's own weight, ``[D, H * d]``.
        stream: ``[D]``, the residual stream after attention, in the weighting of `column_sums`.
        exact_fraction: Below 1.0, the pairs with the largest bounds, which together hold this share
            of the bounds' total, are exact; the rest count with the overshoot of few coordinates,
            which is at least their proximity and at most their bound.
        column_norms: ``[H, D]``, Euclidean norms of the columns of `out_proj` where the caller
            keeps them; computed if None.

    Returns:
        float32 ``[N]``: ``sum_h prox(c_h[j] v_j W_O^h)``.

    Raises:
        ValueError: `exact_fraction` is not within 0..1, or a value vector is not finite.
    """
    if not 0 <= exact_fraction <= 1:
        raise ValueError(f"exact_fraction must be within 0..1, got {exact_fraction}")
    values, out_proj, stream = values.float(), out_proj.float(), stream.float()
    if column_norms is None:
        column_norms = torch.linalg.vector_norm(out_proj, dim=1)
    size, signs = stream.abs(), _signs(stream)
    limits = torch.where(column_norms > 0, size / column_norms, torch.inf)  # [H, D]
    near, columns = limits.topk(min(_SOME_COLUMNS, len(size)), dim=1, largest=False)
    heads = torch.arange(len(out_proj), device=out_proj.device)[:, None]
    by_column = out_proj.permute(2, 0, 1)  # [D, H, d]
    picked = by_column[columns, heads] * signs[columns][:, :, None]  # [H, M, d]
    sizes = size[columns]

    # Every pair: the sum over all coordinates, and the overshoot at the few nearest ones.
    few = min(_FEW_COLUMNS, near.shape[1])
    whole = (signs @ by_column.flatten(1)).view(len(out_proj), 1, -1)
    directions = torch.cat([whole, picked[:, :few]], dim=1)
    aligned = _products(directions, values).mul_(column_sums[:, None])  # [H, 1 + few, N]
    totals = aligned[:, 0]
    overshoot = (aligned[:, 1:] - sizes[:, :few, None]).clamp_(min=0).sum(dim=1)  # [H, N]

    # Pairs that reach further: for every head the tokens that reach furthest. Heads with fewer of
    # them are padded with tokens that need no more than they have, which is harmless.
    reach = _reach(column_sums, values)
    reach *= _largest(totals, exact_fraction)
    if few < len(size) and (count := _longest(reach > near[:, few - 1 : few])):
        reach, tokens = reach.topk(count, dim=1)  # [H, P]
        kv_heads = heads // (len(heads) // values.shape[1])
        rows = values[tokens, kv_heads] * column_sums.gather(1, tokens)[:, :, None]
        further = _overshoot(rows, picked.transpose(1, 2), sizes)
        if columns.shape[1] < len(size) and (count := _longest(reach > near[:, -1:])):
            every = size.expand(len(rows), -1)
            further[:, :count] = _overshoot(rows[:, :count], out_proj, every, signs)
        known = overshoot.gather(1, tokens)
        overshoot.scatter_(1, tokens, torch.where(reach > 0, further, known))
    return totals.sub_(overshoot.mul_(2)).clamp_(min=0).sum(dim=0)


def gated_token_proximity(
    column_sums: Tensor,
    values: Tensor,
    out_proj: Tensor,
    stream: Tensor,
    *,
    exact_fraction: float = DEFAULT_EXACT_FRACTION,
    column_norms: Tensor,
) -> Tensor:
    """As `token_proximity` with a column sum for each coordinate of a head's values.

    One head after another, so that the gated values of one head is all that is held beside them.

    Args:
        column_sums: float32 ``[H * d, N]``, finite, of any sign.
        values: As there.
        out_proj: As there.
        stream: As there.
        exact_fraction: As there, of each head's bounds.
        column_norms: As there.

    Returns:
        float32 ``[N]``: ``sum_h prox((c_h[j] * v_j) W_O^h)``.

    Raises:
        ValueError: As there.
    """
    by_head = column_sums.unflatten(0, (len(out_proj), -1))
    shared = len(out_proj) // values.shape[1]
    ones = column_sums.new_ones(1, column_sums.shape[1])
    total = torch.zeros_like(ones[0])
    for head, sums in enumerate(by_head):
        gated = values[:, head // shared].float() * sums.t()
        own = slice(head, head + 1)
        total += token_proximity(
            ones,
            gated[:, None],
            out_proj[own],
            stream,
            exact_fraction=exact_fraction,
            column_norms=column_norms[own],
        )
    return total


def token_shares(proximities: Tensor, denominators: Tensor) -> Tensor:
    """Computes ``e_j``, each token's share of a layer's proximity.

    Args:
        proximities: ``[..., N]``, summed over heads; over some of the heads gives their part.
        denominators: ``[...]``, the proximity of all tokens through all heads and of the residual.

    Returns:
        ``[..., N]``, zeros where nothing is aligned with the stream.
    """
    factors = torch.where(denominators > 0, 1 / denominators, torch.zeros_like(denominators))
    return proximities * factors[..., None]


def _products(directions: Tensor, values: Tensor) -> Tensor:
    """``directions [H, M, d]`` times every value vector ``[N, G, d]``: ``[H, M, N]``."""
    groups, dim = values.shape[1:]
    products = torch.bmm(directions.view(groups, -1, dim), values.permute(1, 2, 0))
    return products.view(len(directions), -1, len(values))


def _reach(column_sums: Tensor, values: Tensor) -> Tensor:
    """``c_h[j] ||v_j||`` of every pair, rounded up, ``[H, N]``."""
    lengths = torch.linalg.vector_norm(values.transpose(0, 1), dim=2).mul_(_REACH_SLACK)  # [G, N]
    if not lengths.sum().isfinite():
        raise ValueError("values of the layer is not finite")
    grouped = column_sums.view(len(lengths), -1, lengths.shape[1])
    return (grouped * lengths[:, None]).view_as(column_sums)


def _overshoot(rows: Tensor, matrix: Tensor, size: Tensor, signs: Tensor | None = None) -> Tensor:
    """``sum_i max(0, t_i - |x_i|)`` with ``t = signs * (rows @ matrix)``, in bounded blocks.

    Args:
        rows: ``[H, P, d]``, weighted value vectors.
        matrix: ``[H, d, M]``, columns of the output projection.
        size: ``[H, M]``, absolute values of the stream there.
        signs: ``[M]``; None if they are in the matrix.

    Returns:
        ``[H, P]``.
    """
    block = max(1, _TEMPORARY_FLOATS // size.numel())
    parts = []
    for part in rows.split(block, dim=1):
        aligned = torch.bmm(part, matrix)
        if signs is not None:
            aligned *= signs
        parts.append(aligned.sub_(size[:, None]).clamp_(min=0).sum(dim=2))
    return torch.cat(parts, dim=1)


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
