"""L1 proximity of every token to the residual stream, from the paged V cache.

L1 proximities from a paged V cache in plain torch.

Invariant: finite input runs `core.token_proximity`, on a view where one block holds all tokens and
on a gathered copy otherwise; one pass over the column sums is all that is added to its cost.

L1 proximity of every token to the stream, from the paged V cache.

Invariant: the device of the tensors picks the form, and both give the same number. The maths and
`core.l1_proximity`, which the residual needs, are in `core.proximity`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm_flashtrace.core.proximity import l1_proximity, token_proximity


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


__all__ = ["l1_proximity", "proximity"]

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_VALUE_DTYPES = (*_WEIGHT_DTYPES, torch.float8_e4m3fn, torch.float8_e5m2)
_LARGEST_HEAD = 256


def proximity(
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
    """Computes each token's proximity to the residual stream, summed over heads.

    With ``v_j`` as cached times `value_scale`, ``sum_h max(0, |x|_1 - |x - c_h[j] v_j W_O^h|_1)``,
    as `core.token_proximity` describes it (arXiv 2602.01914). CUDA tensors are read in place by
    Triton kernels, without waiting for the device; others are gathered and computed by torch.

    Args:
        column_sums: float32 ``[H, N]``, non-negative.
        value_cache: ``[num_blocks, G, block_size, d]``, any strides, float32, float16, bfloat16 or
            eight-bit floats (e4m3fn, e5m2); head ``h`` reads key/value head ``h // (H // G)``.
        block_table: int32 ``[>= ceil(N / block_size)]``: token ``j`` lies in slot
            ``j % block_size`` of block ``block_table[j // block_size]``.
        weight: ``[D, H*d]``, the output projection as a linear layer keeps it, float32, float16 or
            bfloat16.
        column_norms: float32 ``[H, D]``: Euclidean norms of ``weight[i, h*d:(h+1)*d]``.
        stream: float32 ``[D]``, the residual stream after attention, in the weighting of
            `column_sums`.
        value_scale: Factor on the values in the cache.
        exact_fraction: Below 1.0, only the pairs with the largest bounds, which together hold this
            share of the bounds' total, are exact; the others come out between their proximity and
            their bound.

    Returns:
        float32 ``[N]``. A token is NaN if one of its values or column sums is not finite or a
        column sum is negative; every token is if the stream or a norm is not finite.

    Raises:
        ValueError: The shapes or types do not fit together, `exact_fraction` is not within 0..1, or
            `value_scale` is not a positive number.
    """
    _check(column_sums, value_cache, block_table, weight, column_norms, stream)
    if not 0 <= exact_fraction <= 1:
        raise ValueError(f"exact_fraction must be within 0..1, got {exact_fraction}")
    if not 0 < value_scale < math.inf:
        raise ValueError(f"value_scale must be positive, got {value_scale}")
    form = torch_proximity
    if column_sums.is_cuda:
        from vllm_flashtrace.kernels.triton_proximity import triton_proximity

        form = triton_proximity
    return form(
        column_sums,
        value_cache,
        block_table,
        weight,
        column_norms,
        stream,
        value_scale=value_scale,
        exact_fraction=exact_fraction,
    )


def _check(
    column_sums: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    weight: Tensor,
    column_norms: Tensor,
    stream: Tensor,
) -> None:
    tensors = {
        "column_sums": column_sums,
        "value_cache": value_cache,
        "block_table": block_table,
        "weight": weight,
        "column_norms": column_norms,
        "stream": stream,
    }
    listing = ", ".join(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in tensors.items())
    if [t.dim() for t in tensors.values()] != [2, 4, 1, 2, 2, 1]:
        raise ValueError(f"the layer's tensors do not have the dimensions expected: {listing}")
    (heads, tokens), (_, groups, block_size, dim) = column_sums.shape, value_cache.shape
    hidden = len(stream)
    fitting = (
        min(heads, groups, block_size, hidden) > 0
        and heads % groups == 0
        and 0 < dim <= _LARGEST_HEAD
        and block_table.numel() * block_size >= tokens
        and weight.shape == (hidden, heads * dim)
        and column_norms.shape == (heads, hidden)
    )
    typed = (
        column_sums.dtype == column_norms.dtype == stream.dtype == torch.float32
        and block_table.dtype == torch.int32
        and weight.dtype in _WEIGHT_DTYPES
        and value_cache.dtype in _VALUE_DTYPES
    )
    if not fitting or not typed:
        raise ValueError(f"the layer's tensors do not fit together: {listing}")
