"""Weighted sums of the residual stream over target rows.

Invariant: the device of the tensors picks the form, and both add the same numbers.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vllm_flashtrace.core.attention import as_slice
from vllm_flashtrace.kernels.target_rows import PagedRows


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
