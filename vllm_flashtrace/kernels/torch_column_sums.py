"""Log-sum-exps and weighted column sums from a paged K cache in plain torch.

Invariant: the sums are those of `core.TargetRowBlocks`, on a view where one block holds all tokens
and may be overwritten, and on a gathered copy otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_flashtrace.core.attention_form import AttentionForm
from vllm_flashtrace.kernels.target_rows import PagedRows, RowSegment
from vllm_flashtrace.kernels.torch_proximity import gather_tokens


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
