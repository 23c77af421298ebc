"""Weighted column sums of the causal attention matrix, without storing that matrix.

Invariant: the result is additive over rows, so a target may be fed in any number of pieces, in any
order, and the sum over the pieces is the column sums of the whole target.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_FLOATS = 1 << 22
"""Largest block of attention weights held at a time (16 MiB of float32)."""


def weighted_column_sums(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    positions: Tensor,
    scale: float,
    *,
    out: Tensor | None = None,
    block_rows: int = 128,
) -> Tensor:
    """Computes ``c_h[j] = sum_i w_i softmax_j(scale * q_ih . k_j)`` for every head and token.

    This is the only part of FlashTrace (arXiv 2602.01914) that touches the attention matrix. Rows
    are taken block by block, so at most ``H * block_rows * N`` attention weights exist at a time
    (fewer rows per block where even that is large), and a block computes only the columns that
    its rows can see. Rows of weight zero are not computed.

    Args:
        query: ``[R, H, d]``, queries of the target rows after position encoding, any float dtype.
        key: ``[N, G, d]``, keys of the whole context as cached; head ``h`` reads key/value head
            ``h // (H // G)``.
        weights: float32 ``[R]``, non-negative target weight of each row.
        positions: int64 ``[R]``, absolute position of each row; row ``i`` attends to keys
            ``j <= positions[i]``. Any order.
        scale: Factor on the dot products before the softmax.
        out: float32 ``[H, >= N]`` accumulator; its first ``N`` columns are added to in place.
        block_rows: Upper limit on the rows of a block.

    Returns:
        float32 ``[H, N]``: the column sums, or the view ``out[:, :N]`` after adding them.

    Raises:
        ValueError: The shapes do not fit together, or a position lies outside the context.
    """
    _check(query, key, weights, positions, out, block_rows)
    heads, context = query.shape[1], key.shape[0]
    if out is None:
        out = torch.zeros(heads, context, dtype=torch.float32, device=query.device)
    sums = out[:, :context]

    rows = weights.nonzero().squeeze(1)
    if rows.numel() == 0:
        return sums
    rows = rows[positions[rows].argsort()]  # ascending, so early blocks see few columns
    visible = positions[rows].tolist()
    keys = key[: visible[-1] + 1].permute(1, 2, 0).float()  # [G, d, n]

    start = 0
    while start < len(visible):
        limit = min(start + block_rows, len(visible))
        stop = start + max(1, min(limit - start, _BLOCK_FLOATS // (heads * visible[limit - 1] + 1)))
        block = rows[start:stop]
        columns = visible[stop - 1] + 1
        sums[:, :columns] += _block_sums(
            query[block], keys[:, :, :columns], weights[block], positions[block], scale
        )
        start = stop
    return sums


def _block_sums(
    query: Tensor, keys: Tensor, weights: Tensor, positions: Tensor, scale: float
) -> Tensor:
    """Column sums ``[H, n]`` of one block: query ``[B, H, d]``, keys ``[G, d, n]``."""
    rows, heads, dim = query.shape
    groups, _, columns = keys.shape
    stacked = (query.float() * scale).view(rows, groups, heads // groups, dim)
    stacked = stacked.permute(1, 2, 0, 3).reshape(groups, -1, dim)
    attention = torch.bmm(stacked, keys).view(heads, rows, columns)

    # Rows ascend: every row sees all columns up to the first row's position.
    hidden_from = int(positions[0]) + 1
    if hidden_from < columns:
        later = torch.arange(hidden_from, columns, device=keys.device) > positions[:, None]
        attention[:, :, hidden_from:].masked_fill_(later, float("-inf"))

    attention.sub_(attention.amax(dim=-1, keepdim=True)).exp_()
    # The softmax denominator is folded into the row weights: one pass less over the block.
    row_weights = weights.float() / attention.sum(dim=-1)  # [H, B]
    return torch.bmm(row_weights[:, None, :], attention).squeeze(1)


def _check(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    positions: Tensor,
    out: Tensor | None,
    block_rows: int,
) -> None:
    if query.dim() != 3 or key.dim() != 3 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"query must be [R, H, d] and key [N, G, d]; "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    rows, heads, _ = query.shape
    context, groups, _ = key.shape
    if groups == 0 or heads % groups:
        raise ValueError(f"{heads} query heads are not a multiple of {groups} key/value heads")
    if weights.shape != (rows,) or positions.shape != (rows,):
        raise ValueError(
            f"weights and positions must be [{rows}]; "
            f"got {tuple(weights.shape)} and {tuple(positions.shape)}"
        )
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")
    if out is not None and (
        out.dim() != 2
        or out.shape[0] != heads
        or out.shape[1] < context
        or out.dtype != torch.float32
    ):
        raise ValueError(
            f"out must be float32 [{heads}, >= {context}]; got {out.dtype} {tuple(out.shape)}"
        )
    if rows and (int(positions.min()) < 0 or int(positions.max()) >= context):
        raise ValueError(
            f"positions {int(positions.min())}..{int(positions.max())} "
            f"lie outside the context of {context} tokens"
        )
