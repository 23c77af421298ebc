"""Every pair of a token and a head: alignment, overshoot at the nearest coordinates, reach.

Invariant: one pass over the V cache. A value vector is loaded once for all query heads that share
it, and nothing larger than ``[H, N]`` is stored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_flashtrace.kernels.triton_nearest import DIRECTIONS, PIECES, Nearest
from vllm_flashtrace.kernels.triton_values import Operands, PagedValues, load_values

# Rounding of the reach must never hide a coordinate.
_REACH_SLACK = tl.constexpr(1 + 1e-5)

# Tokens of a program by bytes of a head's row of operands; half as many where products of float32
# are taken in parts, which need twice the shared memory. 99 KiB of it suffice.
_TOKENS = {128: 128, 256: 128, 512: 64, 1024: 64}

_SUM_TOKENS = 256


class Screened(NamedTuple):
    """What is known of every pair.

    Attributes:
        totals: float32 ``[H, N]``, the sum over all coordinates of ``s_i z_i``; NaN where an input
            of the pair is not finite or its column sum is negative.
        overshoot: float32 ``[H, N]``, ``sum max(0, s_i z_i - |x_i|)`` over the coordinates known.
        further: int8 ``[H, N]``, 1 where a coordinate that is not known can overshoot.
    """

    totals: Tensor
    overshoot: Tensor
    further: Tensor

    def sum_over_heads(self) -> Tensor:
        """Each token's proximity: float32 ``[N]``, heads added in order."""
        heads, tokens = self.totals.shape
        result = self.totals.new_empty(tokens)
        _sum_heads_kernel[(triton.cdiv(tokens, _SUM_TOKENS),)](
            self.totals, self.overshoot, result, heads, tokens, TOKENS=_SUM_TOKENS, num_warps=4
        )
        return result


def screen_pairs(
    column_sums: Tensor, values: PagedValues, nearest: Nearest, operands: Operands
) -> Screened:
    """Takes all pairs of the ``[H, N]`` column sums, whose rows are adjacent in memory."""
    heads, tokens = column_sums.shape
    groups, block_size, head_dim = values.cache.shape[1:]
    totals = column_sums.new_empty(heads, tokens)
    screened = Screened(
        totals, torch.empty_like(totals), torch.empty_like(totals, dtype=torch.int8)
    )
    tile = _TOKENS[max(128, operands.padded_dim * operands.dtype.itemsize)]
    tile //= 2 if operands.precision == "tf32x3" else 1
    _screen_kernel[(triton.cdiv(tokens, tile), groups)](
        *values.arguments(),
        column_sums,
        nearest.directions,
        nearest.scale,
        nearest.sizes,
        nearest.limits,
        *screened,
        tokens,
        column_sums.stride(0),
        SHARED=heads // groups,
        TOKENS=tile,
        HEAD_DIM=head_dim,
        PADDED_DIM=operands.padded_dim,
        BLOCK_SIZE=block_size,
        EIGHT_BIT=values.eight_bit,
        PRECISION=operands.precision,
        num_warps=4,
        num_stages=1,
    )
    return screened


@triton.jit(
    do_not_specialize=["num_tokens", "stride_head"],
    do_not_specialize_on_alignment=["block_table"],
)
def _screen_kernel(
    cache,
    block_table,
    value_scale,
    stride_block,
    stride_group,
    stride_slot,
    stride_dim,
    column_sums,
    directions,
    scale,
    sizes,
    limits,
    totals,
    overshoot,
    further,
    num_tokens,
    stride_head,
    SHARED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of tokens for the query heads of one key/value head."""
    group = tl.program_id(1)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    valid = tokens < num_tokens
    cached = load_values(
        cache,
        block_table,
        stride_block,
        stride_group,
        stride_slot,
        stride_dim,
        group,
        tokens,
        valid,
        HEAD_DIM,
        PADDED_DIM,
        BLOCK_SIZE,
        EIGHT_BIT,
    )
    wide = cached.to(tl.float32)
    lengths = tl.sqrt(tl.sum(wide * wide, axis=1)) * value_scale * _REACH_SLACK
    values = cached.to(directions.dtype.element_ty)
    dims = tl.arange(0, PADDED_DIM)
    rows = tl.arange(0, DIRECTIONS)
    for shared in range(SHARED):
        head = group * SHARED + shared
        packed = tl.load(
            directions + (head * DIRECTIONS + rows)[:, None] * PADDED_DIM + dims[None, :]
        )
        factor = tl.load(
            column_sums + head.to(tl.int64) * stride_head + tokens, mask=valid, other=0.0
        )
        aligned = tl.dot(values, tl.trans(packed), input_precision=PRECISION)
        aligned *= (factor * value_scale)[:, None]
        total = tl.sum(tl.where((rows < PIECES)[None, :], aligned, 0.0), axis=1)
        total *= tl.load(scale + head)
        size = tl.load(sizes + head * DIRECTIONS + rows)
        known = tl.sum(tl.maximum(aligned - size[None, :], 0.0), axis=1)
        reach = factor * lengths
        # What is not a number fails every comparison.
        fine = (factor >= 0) & (reach < float("inf")) & (tl.abs(total) < float("inf"))
        reaches = (reach > tl.load(limits + head)) & (total > 0) & fine
        places = head.to(tl.int64) * num_tokens + tokens
        tl.store(totals + places, tl.where(fine, total, float("nan")), mask=valid)
        tl.store(overshoot + places, known, mask=valid)
        tl.store(further + places, reaches.to(tl.int8), mask=valid)


@triton.jit(do_not_specialize=["num_tokens"])
def _sum_heads_kernel(totals, overshoot, result, heads, num_tokens, TOKENS: tl.constexpr):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    valid = tokens < num_tokens
    proximities = tl.zeros([TOKENS], tl.float32)
    totals += tokens
    overshoot += tokens
    for _ in range(heads):
        proximity = tl.load(totals, mask=valid, other=0.0)
        proximity -= 2 * tl.load(overshoot, mask=valid, other=0.0)
        # Not a maximum, which would drop a NaN.
        proximities += tl.where(proximity < 0, 0.0, proximity)
        totals += num_tokens
        overshoot += num_tokens
    tl.store(result + tokens, proximities, mask=valid)
