"""The identity that the method rests on, as a measure of how well a layer is understood.

For every row ``i`` of a layer's attention block (section 3.2)

    o_i^h          = sum_j alpha^h_ij v_j^h                      the attention's own output
    x_mid - x_prev = sum_h sum_j alpha^h_ij v_j^h M_h + b        what the block adds to the stream

with ``M_h`` the linear map from a cached value to the residual stream. Whatever lies between the
values and the stream and is not in ``alpha``, ``v`` or ``M_h``, be it a window, a soft cap, a gate,
a norm or a factor, makes the two sides differ. `attention_error` measures the first line, and
`contribution` and `identity_error` the second. All products are float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHUNK_NUMBERS = 1 << 22
"""Most numbers of ``M`` that are float64 at a time (32 MiB)."""


def attention_error(weights: Tensor, values: Tensor, output: Tensor) -> float:
    """How far the attention's own output is from ``sum_j alpha^h_ij v_j^h``.

    Args:
        weights: ``[R, H, n]``, attention weights of R rows, or ``[R, H, d, n]`` where each
            coordinate of a head has its own, times the rows' gates if there are any.
        values: ``[n, G, d]``, cached values; head ``h`` reads ``h // (H // G)``.
        output: ``[R, H, d]``, the layer's own output, before its projection, times the gates.

    Returns:
        The largest Euclidean distance of any row and head, relative to the norm of
        ``sum_j alpha_ij |v_j|``, which unlike that of the output is not small where values cancel;
        infinite if a number is not finite.
    """
    mixed = _mixed(weights, values)
    size = _mixed(weights, values.abs()).norm(dim=-1)
    return _largest((mixed - output.double()).norm(dim=-1), size, output)


def contribution(weights: Tensor, values: Tensor, projection: Tensor) -> Tensor:
    """``sum_h sum_j alpha^h_ij v_j^h M_h`` of every row, float64 ``[R, D]``.

    Args:
        weights: As in `attention_error`.
        values: As in `attention_error`.
        projection: ``[D, H * d]``, column block ``h`` is the transpose of ``M_h``.
    """
    mixed = _mixed(weights, values).flatten(1)
    rows = max(1, _CHUNK_NUMBERS // projection.shape[1])
    return torch.cat([mixed @ part.double().t() for part in projection.split(rows)], dim=1)


def identity_error(contributed: Tensor, added: Tensor, rounded: Tensor | None = None) -> float:
    """How far what a block adds is from what its heads contribute.

    Args:
        contributed: float64 ``[R, D]``, `contribution` over all heads, and the bias.
        added: ``[R, D]``, what the block added to the stream.
        rounded: ``[R, D]``, the stream from whose rounded values ``added`` was got as a difference;
            None where it was seen itself.

    Returns:
        The largest Euclidean distance of any row, relative to the norm of ``added``, or of
        ``rounded`` if that is larger; infinite if a number is not finite.
    """
    size = added.double().norm(dim=-1)
    if rounded is not None:
        size = torch.maximum(size, rounded.double().norm(dim=-1))
    return _largest((contributed - added.double()).norm(dim=-1), size, added)


def _mixed(weights: Tensor, values: Tensor) -> Tensor:
    """``sum_j alpha^h_ij v_j^h``, float64 ``[R, H, d]``."""
    grouped = weights.double().unflatten(1, (values.shape[1], -1))
    products = "rgsn,ngd->rgsd" if weights.dim() == 3 else "rgsdn,ngd->rgsd"
    return torch.einsum(products, grouped, values.double()).flatten(1, 2)


def _largest(distances: Tensor, sizes: Tensor, vectors: Tensor) -> float:
    """The largest ratio; numbers below the normal ones of their type have no relative accuracy."""
    smallest = torch.finfo(vectors.dtype).tiny * math.sqrt(vectors.shape[-1])
    largest = float((distances / sizes.clamp_min(smallest)).max())
    return largest if math.isfinite(largest) else math.inf
