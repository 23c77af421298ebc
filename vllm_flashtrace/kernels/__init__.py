"""What a trace computes from paged KV caches: Triton on CUDA, torch elsewhere; no vLLM."""

from __future__ import annotations

from vllm_flashtrace.core.attention import AttentionForm
from vllm_flashtrace.kernels.paged_attention import (
    AttentionInputs,
    KeptQueries,
    LayerKeys,
    add_kept_column_sums,
    add_row_sums,
    inverse_rms,
    paged_column_sums,
    paged_lse,
)
from vllm_flashtrace.kernels.paged_proximity import (
    ProximityLayer,
    ProximityTrace,
    column_norms,
    gather_tokens,
    replace_by_proximities,
    sum_shares,
)
from vllm_flashtrace.kernels.target_rows import (
    Accumulators,
    PagedRows,
    RowSegment,
    SumsTouchedError,
    touching_sums,
)

__all__ = [
    "Accumulators",
    "AttentionForm",
    "AttentionInputs",
    "KeptQueries",
    "LayerKeys",
    "PagedRows",
    "ProximityLayer",
    "ProximityTrace",
    "RowSegment",
    "SumsTouchedError",
    "add_kept_column_sums",
    "add_row_sums",
    "column_norms",
    "gather_tokens",
    "inverse_rms",
    "paged_column_sums",
    "paged_lse",
    "replace_by_proximities",
    "sum_shares",
    "touching_sums",
]
