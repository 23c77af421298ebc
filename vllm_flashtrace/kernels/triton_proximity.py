"""Exact L1 proximities from the paged V cache, on the GPU.

The scheme is that of `core.proximity`, where the maths is written, in three steps: the directions
of the nearest coordinates (`triton_nearest`), one pass over all pairs (`triton_screen`), and all
coordinates for the pairs that reach further (`triton_overshoot`). On real text these are a few in
a hundred, so going from 8 coordinates straight to all costs less than a stage in between would.

Invariant: no synchronisation with the device, and the same bits for the same input: no result
depends on the order in which programs run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_flashtrace.kernels.triton_nearest import nearest_coordinates
from vllm_flashtrace.kernels.triton_overshoot import complete_overshoot
from vllm_flashtrace.kernels.triton_screen import screen_pairs
from vllm_flashtrace.kernels.triton_values import Operands, PagedValues


def triton_proximity(
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
    """Triton form of `proximity.proximity`, which describes arguments and result."""
    if column_sums.shape[1] == 0:
        return column_sums.new_empty(0)
    if column_sums.stride(1) != 1:
        column_sums = column_sums.contiguous()
    column_norms, stream = column_norms.contiguous(), stream.contiguous()
    values = PagedValues(value_cache, block_table, value_scale)
    operands = Operands.choose(value_cache.dtype, weight.dtype, value_cache.shape[3])
    with torch.cuda.device_of(column_sums):
        nearest = nearest_coordinates(
            weight, column_norms, stream, operands.padded_dim, operands.dtype
        )
        screened = screen_pairs(column_sums, values, nearest, operands)
        if exact_fraction > 0:
            complete_overshoot(
                screened, exact_fraction, column_sums, values, weight, stream, operands
            )
        return screened.sum_over_heads()
