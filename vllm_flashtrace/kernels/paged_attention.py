"""What the target rows of a step add to their traces: column sums of attention, sums of the stream.

CUDA tensors are read in place by Triton kernels, others are gathered and computed by torch; both
give the same numbers, and neither stores anything of size rows times context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vllm_flashtrace.core.attention import AttentionForm, as_slice
from vllm_flashtrace.kernels.paged_proximity import gather_tokens
from vllm_flashtrace.kernels.target_rows import PagedRows, RowSegment, touching_sums

_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_LARGEST_HEAD = 256


@dataclass(frozen=True, slots=True, eq=False)
class AttentionInputs:
    """One layer's attention as a step's target rows see it.

    Attributes:
        query: ``[tokens, H, d]``, the step's queries after position encoding, any strides;
            float32, float16, bfloat16 or eight-bit floats (e4m3fn, e5m2).
        key_cache: ``[num_blocks, G, block_size, d]``, any strides, of the same types; head ``h``
            reads key/value head ``h // (H // G)``.
        rows: The target rows, with their accumulators.
        form: How the layer makes logits; `form.scale` includes the scales of eight-bit floats.

    Raises:
        ValueError: The shapes or types do not fit together.
    """

    query: Tensor
    key_cache: Tensor
    rows: PagedRows
    form: AttentionForm

    def __post_init__(self) -> None:
        query, key_cache, rows = self.query, self.key_cache, self.rows
        listing = (
            f"query {query.dtype} {tuple(query.shape)}, "
            f"key_cache {key_cache.dtype} {tuple(key_cache.shape)}"
        )
        if query.dim() != 3 or key_cache.dim() != 4:
            raise ValueError(
                f"query must be [tokens, H, d] and key_cache of four dimensions: {listing}"
            )
        block_size, dim = key_cache.shape[2:]
        fitting = (
            query.shape[1:] == (rows.num_heads, dim)
            and key_cache.shape[1] == rows.num_kv_heads
            and 0 < dim <= _LARGEST_HEAD
            and block_size > 0
        )
        if not fitting or query.dtype not in _DTYPES or key_cache.dtype not in _DTYPES:
            raise ValueError(
                f"queries and keys do not fit {rows.num_heads} heads over {rows.num_kv_heads}: "
                f"{listing}"
            )
        for segment in rows.segments:
            if segment.block_table.numel() * block_size < segment.columns:
                raise ValueError(
                    f"a block table of {segment.block_table.numel()} blocks of {block_size} does "
                    f"not hold {segment.columns} tokens"
                )


def paged_column_sums(inputs: AttentionInputs, layer: int, *, overwrite_keys: bool = False) -> None:
    """Adds ``c_h[j] += sum_i w_i exp(logit_ij - lse_i)`` to each segment's column sums.

    On a GPU it does not wait for the device and gives the same bits for the same input: no program
    adds to what another adds to.

    Args:
        inputs: The layer's tensors, all on one device.
        layer: Layer of the accumulators.
        overwrite_keys: Whether a float32 ``key_cache`` of one block may be used as scratch memory.

    Raises:
        SumsTouchedError: It failed when it had begun to add. After any other exception the sums are
            as they were.
    """
    if inputs.query.is_cuda:
        from vllm_flashtrace.kernels.triton_column_sums import triton_column_sums
        from vllm_flashtrace.kernels.triton_lse import row_offsets

        triton_column_sums(inputs, layer, row_offsets(inputs))
    else:
        torch_column_sums(inputs, layer, overwrite_keys=overwrite_keys)


def paged_lse(inputs: AttentionInputs) -> Tensor:
    """Computes ``log sum_j exp(logit_ij)`` of every target row and head, a sink included.

    Returns:
        float32 ``[R, H]``, the rows of all segments one after another.
    """
    if inputs.query.is_cuda:
        from vllm_flashtrace.kernels.triton_lse import triton_lse

        return triton_lse(inputs)
    return torch_lse(inputs)


def add_row_sums(
    residual: Tensor, rows: PagedRows, layer: int, to: Literal["residual", "stream"]
) -> None:
    """Adds ``sum_i w_i x_i`` over each segment's rows to one of its accumulators.

    Args:
        residual: ``[tokens, D]``, any float dtype and strides.
        rows: The target rows.
        layer: Layer of the accumulators.
        to: Which accumulator, ``r`` or ``x``.

    Raises:
        SumsTouchedError: See `paged_column_sums`.
    """
    if residual.is_cuda:
        from vllm_flashtrace.kernels.triton_row_sums import triton_row_sums

        triton_row_sums(residual, rows, layer, to)
        return
    with touching_sums():
        for segment in rows.segments:
            sums = getattr(segment.sums, to)
            sums[layer] += segment.weights @ residual[as_slice(segment.rows)].float()


def torch_column_sums(inputs: AttentionInputs, layer: int, *, overwrite_keys: bool = False) -> None:
    """Torch form of `paged_column_sums`."""
    query = _plain(inputs.query)
    with touching_sums():
        for segment, target in zip(inputs.rows.segments, inputs.rows.blocks, strict=True):
            keys = _keys(inputs.key_cache, segment, may_view=overwrite_keys)
            target.add(query, keys, inputs.form, segment.sums.column_sums[layer])


def torch_lse(inputs: AttentionInputs) -> Tensor:
    """Torch form of `paged_lse`."""
    query, form = _plain(inputs.query), inputs.form
    parts = []
    for segment, target in zip(inputs.rows.segments, inputs.rows.blocks, strict=True):
        keys = _keys(inputs.key_cache, segment)
        memory = target.block_memory(keys)
        for block in target.blocks:
            queries = block.queries(query, target.num_kv_heads, form.scale)
            first = form.first_visible(int(block.positions[0]))
            _, denominators, largest = block.weights_of(form, queries, keys, first, memory)
            parts.append((largest + denominators.log()).t())
    return torch.cat(parts)


def _plain(query: Tensor) -> Tensor:
    """Eight-bit floats cannot be indexed."""
    return query.float() if query.itemsize == 1 else query


def _keys(key_cache: Tensor, segment: RowSegment, *, may_view: bool = False) -> Tensor:
    """float32 ``[G, d, columns]``."""
    keys = gather_tokens(key_cache, segment.block_table, segment.columns).permute(1, 2, 0)
    shares_memory = keys.untyped_storage().data_ptr() == key_cache.untyped_storage().data_ptr()
    return keys.to(torch.float32, copy=shares_memory and not may_view)
