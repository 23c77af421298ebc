"""What a trace computes from paged KV caches: Triton on CUDA, torch elsewhere; no vLLM."""

from __future__ import annotations

from vllm_flashtrace.core.attention import AttentionForm
from vllm_flashtrace.core.proximity import l1_proximity
from vllm_flashtrace.kernels.paged_attention import (
    AttentionInputs,
    KeptQueries,
    LayerKeys,
    add_kept_column_sums,
    add_row_sums,
    paged_column_sums,
    paged_lse,
)
from vllm_flashtrace.kernels.paged_proximity import PagedValues, ProximityInputs, proximity
from vllm_flashtrace.kernels.target_rows import (
    Accumulators,
    PagedRows,
    RowSegment,
    SumsTouchedError,
)

__all__ = [
    "Accumulators",
    "AttentionForm",
    "AttentionInputs",
    "KeptQueries",
    "LayerKeys",
    "PagedRows",
    "PagedValues",
    "ProximityInputs",
    "RowSegment",
    "SumsTouchedError",
    "add_kept_column_sums",
    "add_row_sums",
    "l1_proximity",
    "paged_column_sums",
    "paged_lse",
    "proximity",
]
