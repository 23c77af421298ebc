"""L1 proximities from a paged V cache in plain torch.

Invariant: finite input runs `core.token_proximity`, on a view where one block holds all tokens and
on a gathered copy otherwise; one pass over the column sums is all that is added to its cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_flashtrace.core.proximity import token_proximity


def torch_proximity(
    column_sums: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    weight: Tensor,
    column_norms: Tensor,
    stream: Tensor,
    *,
    value_scale: float = 1.0,
    exact_fraction: float = 1.0,
) -> Tensor:
    """Torch form of `proximity.proximity`, which describes arguments and result."""
    heads, tokens = column_sums.shape
    if tokens == 0 or not bool((stream.sum() + column_norms.sum()).isfinite()):
        return column_sums.new_full((tokens,), torch.nan)
    values = gather_tokens(value_cache, block_table, tokens)
    by_head = weight.unflatten(1, (heads, -1)).permute(1, 2, 0)  # [H, d, D]
    if value_scale != 1:
        column_sums = column_sums * value_scale

    def core(column_sums: Tensor, values: Tensor) -> Tensor:
        return token_proximity(
            column_sums,
            values,
            by_head,
            stream,
            exact_fraction=exact_fraction,
            column_norms=column_norms,
        )

    lowest, highest = column_sums.aminmax()
    if bool((lowest >= 0) & (highest < torch.inf)):
        try:
            return core(column_sums, values)
        except ValueError:
            usable = _usable(column_sums, values)
            if bool(usable.all()):
                raise
    else:
        usable = _usable(column_sums, values)
    column_sums = column_sums.masked_fill(~usable, 0)
    values = values.masked_fill(~usable[:, None, None], 0)
    return core(column_sums, values).masked_fill_(~usable, torch.nan)


def gather_tokens(cache: Tensor, block_table: Tensor, tokens: int) -> Tensor:
    """The first `tokens` vectors that a block table names.

    Args:
        cache: ``[num_blocks, G, block_size, d]``, any strides; eight-bit floats come out as
            float32.
        block_table: int32 ``[>= ceil(tokens / block_size)]``.
        tokens: Number of vectors.

    Returns:
        ``[tokens, G, d]``, in memory ``[G, tokens, d]``; a view where one block holds them all.
    """
    needed = -(-tokens // cache.shape[2])
    if needed == 1:
        vectors = cache[int(block_table[0]), :, :tokens]
    else:
        raw = cache.view(torch.uint8) if cache.itemsize == 1 else cache
        blocks = raw.transpose(0, 1)[:, block_table[:needed].long()]  # [G, blocks, block_size, d]
        vectors = blocks.contiguous().view(cache.dtype).flatten(1, 2)[:, :tokens]
    if cache.itemsize == 1:
        vectors = vectors.float()
    return vectors.transpose(0, 1)


def _usable(column_sums: Tensor, values: Tensor) -> Tensor:
    """Tokens whose values and column sums are numbers, bool ``[N]``."""
    lengths = torch.linalg.vector_norm(values.float(), dim=2)
    fine = (column_sums >= 0) & (column_sums < torch.inf)
    return lengths.isfinite().all(dim=1) & fine.all(dim=0)
