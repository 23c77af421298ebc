"""Log-sum-exps, weighted column sums and row sums over a paged K cache: Triton, or plain torch.

Log-sum-exps and weighted column sums from a paged K cache in plain torch.

Invariant: the sums are those of `core.TargetRowBlocks`, on a view where one block holds all tokens
and may be overwritten, and on a gathered copy otherwise.

Weighted sums of the residual stream over target rows.

Invariant: the device of the tensors picks the form, and both add the same numbers.

Log-sum-exps and weighted column sums of attention over a paged K cache.

Invariant: the device of the tensors picks the form, and both give the same numbers. Nothing of
size rows times context is stored.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vllm_flashtrace.core.attention import AttentionForm, as_slice
from vllm_flashtrace.kernels.paged_proximity import gather_tokens
from vllm_flashtrace.kernels.target_rows import PagedRows, RowSegment


def torch_column_sums(
    query: Tensor,
    key_cache: Tensor,
    rows: PagedRows,
    form: AttentionForm,
    layer: int,
    *,
    overwrite_keys: bool = False,
) -> None:
    """Torch form of `column_sums.paged_column_sums`, which describes the arguments."""
    query = _plain(query)
    for segment, blocks in zip(rows.segments, rows.blocks, strict=True):
        keys = _keys(key_cache, segment, may_view=overwrite_keys)
        blocks.add(query, keys, form, segment.sums.column_sums[layer])


def torch_lse(query: Tensor, key_cache: Tensor, rows: PagedRows, form: AttentionForm) -> Tensor:
    """Torch form of `column_sums.paged_lse`, which describes arguments and result."""
    parts = [
        blocks.log_sum_exp(_plain(query), _keys(key_cache, segment), form)
        for segment, blocks in zip(rows.segments, rows.blocks, strict=True)
    ]
    return torch.cat(parts)


def _plain(query: Tensor) -> Tensor:
    """Eight-bit floats cannot be indexed."""
    return query.float() if query.itemsize == 1 else query


def _keys(key_cache: Tensor, segment: RowSegment, *, may_view: bool = False) -> Tensor:
    """float32 ``[G, d, columns]``."""
    keys = gather_tokens(key_cache, segment.block_table, segment.columns).permute(1, 2, 0)
    shares_memory = keys.untyped_storage().data_ptr() == key_cache.untyped_storage().data_ptr()
    return keys.to(torch.float32, copy=shares_memory and not may_view)


def add_row_sums(
    residual: Tensor, rows: PagedRows, layer: int, to: Literal["residual", "stream"]
) -> None:
    """Adds ``sum_i w_i x_i`` over each segment's rows to one of its accumulators.

    Args:
        residual: ``[tokens, D]``, any float dtype and strides.
        rows: The target rows.
        layer: Layer of the accumulators.
        to: Which accumulator.
    """
    if residual.is_cuda:
        from vllm_flashtrace.kernels.triton_row_sums import triton_row_sums

        triton_row_sums(residual, rows, layer, to)
        return
    for segment in rows.segments:
        sums = getattr(segment.sums, to)
        sums[layer] += segment.weights @ residual[as_slice(segment.rows)].float()


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_EIGHT_BIT = (torch.float8_e4m3fn, torch.float8_e5m2)
_LARGEST_HEAD = 256


def paged_lse(query: Tensor, key_cache: Tensor, rows: PagedRows, form: AttentionForm) -> Tensor:
    """Computes ``log sum_j exp(logit_ij)`` of every target row and head, a sink included.

    Args:
        query: ``[tokens, H, d]``, the step's queries after position encoding, any strides;
            float32, float16, bfloat16 or eight-bit floats (e4m3fn, e5m2).
        key_cache: ``[num_blocks, G, block_size, d]``, any strides, of the same types; head ``h``
            reads key/value head ``h // (H // G)``.
        rows: The target rows.
        form: How the layer makes logits; `form.scale` includes the scales of eight-bit floats.

    Returns:
        float32 ``[R, H]``, the rows of all segments one after another.

    Raises:
        ValueError: The shapes or types do not fit together.
    """
    _check(query, key_cache, rows)
    if query.is_cuda:
        from vllm_flashtrace.kernels.triton_lse import triton_lse

        return triton_lse(query, key_cache, rows, form)
    return torch_lse(query, key_cache, rows, form)


def paged_column_sums(
    query: Tensor,
    key_cache: Tensor,
    rows: PagedRows,
    form: AttentionForm,
    layer: int,
    *,
    overwrite_keys: bool = False,
) -> None:
    """Adds ``c_h[j] += sum_i w_i exp(logit_ij - lse_i)`` to each segment's column sums.

    The one part of FlashTrace (arXiv 2602.01914) that touches the attention matrix. CUDA tensors
    are read in place by Triton kernels, without waiting for the device and with the same bits for
    the same input: no program adds to what another adds to.

    Args:
        query: See `paged_lse`.
        key_cache: See `paged_lse`.
        rows: The target rows, with the accumulators.
        form: See `paged_lse`.
        layer: Layer of the accumulators.
        overwrite_keys: Whether a float32 ``key_cache`` of one block may be used as scratch memory.

    Raises:
        ValueError: The shapes or types do not fit together.
    """
    _check(query, key_cache, rows)
    if query.is_cuda:
        from vllm_flashtrace.kernels.triton_column_sums import triton_column_sums
        from vllm_flashtrace.kernels.triton_lse import row_offsets

        offsets = row_offsets(query, key_cache, rows, form)
        triton_column_sums(query, key_cache, rows, form, layer, offsets)
    else:
        torch_column_sums(query, key_cache, rows, form, layer, overwrite_keys=overwrite_keys)


def _check(query: Tensor, key_cache: Tensor, rows: PagedRows) -> None:
    listing = (
        f"query {query.dtype} {tuple(query.shape)}, "
        f"key_cache {key_cache.dtype} {tuple(key_cache.shape)}"
    )
    if query.dim() != 3 or key_cache.dim() != 4:
        raise ValueError(
            f"query must be [tokens, H, d] and key_cache of four dimensions: {listing}"
        )
    known = (*_FLOATS, *_EIGHT_BIT)
    block_size, dim = key_cache.shape[2:]
    fitting = (
        query.shape[1:] == (rows.num_heads, dim)
        and key_cache.shape[1] == rows.num_kv_heads
        and 0 < dim <= _LARGEST_HEAD
        and block_size > 0
    )
    if not fitting or query.dtype not in known or key_cache.dtype not in known:
        raise ValueError(
            f"queries and keys do not fit {rows.num_heads} heads over {rows.num_kv_heads}: "
            f"{listing}"
        )
    for segment in rows.segments:
        if segment.block_table.numel() * block_size < segment.columns:
            raise ValueError(
                f"a block table of {segment.block_table.numel()} blocks of {block_size} does not "
                f"hold {segment.columns} tokens"
            )
