"""The first pass of the proximity: every (token, head) pair, and which need a second look.

`nearest_coordinates` reads ``W_O`` once and packs, per head, the direction of the total alignment
and the coordinates that are easiest to overshoot. `screen_pairs` then goes over the V cache once: a
value vector is loaded once for all query heads that share it, and nothing larger than ``[H, N]`` is
stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_flashtrace.kernels.paged_proximity import ProximityInputs
from vllm_flashtrace.kernels.triton_operands import (
    Operands,
    eight_bit_format,
    launch,
    load_cached,
    value_arguments,
)

PIECES, NEAREST = tl.constexpr(3), tl.constexpr(8)
"""Rows that together are the total direction; coordinates with an overshoot for every pair."""

DIRECTIONS = tl.constexpr(16)
"""Rows of a head's packed directions: pieces, nearest, zeros up to what a matrix product takes."""

_COLUMNS, _ROWS, _SPLIT_ROWS = 128, 16, 256

# Rounding of the reach must never hide a coordinate.
_REACH_SLACK = tl.constexpr(1 + 1e-5)

# Tokens of a program by bytes of a head's row of operands; half as many where products of float32
# are taken in parts, which need twice the shared memory. 99 KiB of it suffice.
_TOKENS = {128: 128, 256: 128, 512: 64, 1024: 64}

_SUM_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Nearest:
    """Per head the direction of the total alignment and the coordinates easiest to overshoot.

    Attributes:
        directions: ``[H, 16, padded d]`` in the type of the matrix products. The sum of the first
            three rows times `scale` is ``W_O^h s``, whose product with a value vector is the
            alignment over all coordinates: sixteen bits three times hold a float32. The next eight
            rows are the signed columns of ``W_O^h`` at the nearest coordinates; the rest is zero.
        scale: float32 ``[H]``, powers of two; NaN where an input of the head is not finite.
        sizes: float32 ``[H, 16]``, ``|x|`` at the nearest coordinates, infinite in other rows.
        limits: float32 ``[H]``, the reach past which a ninth coordinate can overshoot.
    """

    directions: Tensor
    scale: Tensor
    sizes: Tensor
    limits: Tensor


def nearest_coordinates(inputs: ProximityInputs, operands: Operands) -> Nearest:
    """Finds the nearest coordinates of every head and packs their directions."""
    weight, column_norms, stream = inputs.weight, inputs.column_norms, inputs.stream
    hidden, width = weight.shape
    heads = len(column_norms)
    splits = triton.cdiv(hidden, _SPLIT_ROWS)
    partial = weight.new_empty(splits, width, dtype=torch.float32)
    launch(
        _total_direction_kernel,
        (triton.cdiv(width, _COLUMNS), splits),
        weight,
        stream,
        partial,
        hidden,
        width,
        *weight.stride(),
        SPLIT_ROWS=_SPLIT_ROWS,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=4,
    )
    nearest = Nearest(
        directions=weight.new_empty(
            heads, DIRECTIONS.value, operands.padded_dim, dtype=operands.dtype
        ),
        scale=stream.new_empty(heads),
        sizes=stream.new_empty(heads, DIRECTIONS.value),
        limits=stream.new_empty(heads),
    )
    padded_hidden = triton.next_power_of_2(hidden)
    launch(
        _nearest_kernel,
        (heads,),
        weight,
        column_norms,
        stream,
        partial,
        nearest.directions,
        nearest.scale,
        nearest.sizes,
        nearest.limits,
        hidden,
        splits,
        *weight.stride(),
        HEAD_DIM=width // heads,
        PADDED_DIM=operands.padded_dim,
        PADDED_HIDDEN=padded_hidden,
        num_warps=8 if padded_hidden <= 8192 else 16,
    )
    return nearest


@triton.jit
def _total_direction_kernel(
    weight,
    stream,
    partial,
    hidden,
    width,
    stride_row,
    stride_column,
    SPLIT_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``signs @ weight`` over one split of the rows; the reader adds the splits in order."""
    split = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, SPLIT_ROWS, ROWS):
        rows = split * SPLIT_ROWS + first + tl.arange(0, ROWS)
        inside = rows < hidden
        x = tl.load(stream + rows, mask=inside, other=0.0)
        places = (
            rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
        )
        mask = inside[:, None] & (columns < width)[None, :]
        w = tl.load(weight + places, mask=mask, other=0.0).to(tl.float32)
        sums += tl.where(x < 0, -1.0, 1.0)[:, None] * w
    total = tl.sum(sums, axis=0)
    tl.store(partial + split * width + columns, total, mask=columns < width)


@triton.jit
def _nearest_kernel(
    weight,
    column_norms,
    stream,
    partial,
    directions,
    scale,
    sizes,
    limits,
    hidden,
    splits,
    stride_row,
    stride_column,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_HIDDEN: tl.constexpr,
):
    """One head: takes the smallest limit `NEAREST` times and keeps the one after."""
    head = tl.program_id(0)
    width = tl.num_programs(0) * HEAD_DIM
    dims = tl.arange(0, PADDED_DIM)
    in_head = dims < HEAD_DIM
    columns = head * HEAD_DIM + dims
    rows = tl.arange(0, DIRECTIONS)
    dtype = directions.dtype.element_ty

    total = tl.zeros([PADDED_DIM], tl.float32)
    for split in range(splits):
        total += tl.load(partial + split * width + columns, mask=in_head, other=0.0)
    # A power of two near the largest entry keeps the pieces within the range of float16.
    largest = tl.max(tl.abs(total), axis=0)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) / 256
    power = tl.where((power > 0) & (power < float("inf")), power, 1.0)
    remainder = tl.div_rn(total, power)
    packed = tl.zeros([DIRECTIONS, PADDED_DIM], dtype)
    for piece in tl.static_range(PIECES):
        rounded = remainder.to(dtype)
        remainder -= rounded.to(tl.float32)
        packed = tl.where((rows == piece)[:, None], rounded[None, :], packed)

    coordinates = tl.arange(0, PADDED_HIDDEN)
    inside = coordinates < hidden
    size = tl.abs(tl.load(stream + coordinates, mask=inside, other=0.0))
    norms = tl.load(column_norms + head.to(tl.int64) * hidden + coordinates, mask=inside, other=0.0)
    # What is not a number fails every comparison.
    finite = (size < float("inf")) & (tl.abs(norms) < float("inf"))
    wrong = tl.sum((~finite).to(tl.int32), axis=0)
    wrong += tl.sum((~(tl.abs(total) < float("inf"))).to(tl.int32), axis=0)
    distances = tl.where(norms > 0, tl.div_rn(size, norms), float("inf"))
    distances = tl.where(distances < float("inf"), distances, float("inf"))

    nearest_sizes = tl.full([DIRECTIONS], float("inf"), tl.float32)
    for place in tl.static_range(PIECES, PIECES + NEAREST):
        distance = tl.min(distances, axis=0)
        coordinate = tl.argmin(distances, axis=0)
        x = tl.load(stream + coordinate)
        places = coordinate.to(tl.int64) * stride_row + columns.to(tl.int64) * stride_column
        column = tl.load(weight + places, mask=in_head, other=0.0).to(tl.float32)
        column = tl.where(x < 0, -column, column).to(dtype)
        packed = tl.where((rows == place)[:, None], column[None, :], packed)
        # Nothing overshoots an infinite size: no coordinate is left, or its column is zero.
        x = tl.where(distance < float("inf"), tl.abs(x), float("inf"))
        nearest_sizes = tl.where(rows == place, x, nearest_sizes)
        distances = tl.where(coordinates == coordinate, float("inf"), distances)

    first = head * DIRECTIONS
    tl.store(directions + (first + rows)[:, None] * PADDED_DIM + dims[None, :], packed)
    tl.store(sizes + first + rows, nearest_sizes)
    tl.store(limits + head, tl.min(distances, axis=0))
    tl.store(scale + head, tl.where(wrong > 0, float("nan"), power))


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
        launch(
            _sum_heads_kernel,
            (triton.cdiv(tokens, _SUM_TOKENS),),
            self.totals,
            self.overshoot,
            result,
            heads,
            tokens,
            TOKENS=_SUM_TOKENS,
            num_warps=4,
        )
        return result


def screen_pairs(inputs: ProximityInputs, nearest: Nearest, operands: Operands) -> Screened:
    """Screens all pairs; the rows of ``column_sums`` must be adjacent in memory."""
    column_sums = inputs.column_sums
    heads, tokens = column_sums.shape
    groups, block_size, head_dim = inputs.values.cache.shape[1:]
    totals = column_sums.new_empty(heads, tokens)
    screened = Screened(
        totals, torch.empty_like(totals), torch.empty_like(totals, dtype=torch.int8)
    )
    tile = _TOKENS[max(128, operands.padded_dim * operands.dtype.itemsize)]
    tile //= 2 if operands.precision == "tf32x3" else 1
    launch(
        _screen_kernel,
        (triton.cdiv(tokens, tile), groups),
        *value_arguments(inputs.values),
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
        EIGHT_BIT=eight_bit_format(inputs.values.cache),
        PRECISION=operands.precision,
        num_warps=4,
        num_stages=1,
    )
    return screened


@triton.jit(
    do_not_specialize=["num_tokens", "stride_head"],
    do_not_specialize_on_alignment=["block_table", "column_sums"],
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
    cached = load_cached(
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
