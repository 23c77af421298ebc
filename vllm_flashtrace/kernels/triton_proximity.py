"""Exact L1 proximities from the paged V cache, on the GPU.

The scheme of `core.proximity` in two passes: one over all (token, head) pairs, which knows the
overshoot at the eight nearest coordinates (`triton_screen`), and one over all coordinates for the
pairs that reach further. On real text these are a few in a hundred, so going from 8 coordinates
straight to all costs less than a stage in between would.

The host never waits for the device: launches are sized for all pairs, and programs past the count
of a head leave at once. No result depends on the order in which programs run, so the same input
gives the same bits.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_flashtrace.kernels.paged_proximity import ProximityInputs
from vllm_flashtrace.kernels.triton_operands import (
    Operands,
    as_compiled_for,
    eight_bit_format,
    launch,
    load_cached,
    value_arguments,
)
from vllm_flashtrace.kernels.triton_screen import Screened, nearest_coordinates, screen_pairs

_SELECT_TOKENS = 4096


class _Tile(NamedTuple):
    pairs: int
    coordinates: int
    warps: int
    stages: int


# By bytes of an operand and padded head size. Shared memory stays below 99 KiB, the least of any
# GPU in question, and lets two programs share a multiprocessor of an H100. Tiles of float32 are
# small: its products are taken from registers, or in parts that need twice the memory.
_TILES = {
    (2, 64): _Tile(128, 128, 8, 3),
    (2, 128): _Tile(128, 128, 8, 2),
    (2, 256): _Tile(64, 64, 4, 2),
    (4, 64): _Tile(64, 32, 4, 2),
    (4, 128): _Tile(32, 32, 4, 2),
    (4, 256): _Tile(32, 32, 8, 2),
}


def triton_proximity(inputs: ProximityInputs, exact_fraction: float = 1.0) -> Tensor:
    """Triton form of `proximity`."""
    column_sums = inputs.column_sums
    if column_sums.shape[1] == 0:
        return column_sums.new_empty(0)
    inputs = dataclasses.replace(
        inputs,
        column_sums=column_sums if column_sums.stride(1) == 1 else column_sums.contiguous(),
        column_norms=as_compiled_for(inputs.column_norms.contiguous()),
        stream=as_compiled_for(inputs.stream.contiguous()),
    )
    cache = inputs.values.cache
    operands = Operands.choose(cache.dtype, inputs.weight.dtype, cache.shape[3])
    with torch.cuda.device_of(column_sums):
        nearest = nearest_coordinates(inputs, operands)
        screened = screen_pairs(inputs, nearest, operands)
        if exact_fraction > 0:
            _complete_overshoot(screened, exact_fraction, inputs, operands)
        return screened.sum_over_heads()


def _complete_overshoot(
    screened: Screened, exact_fraction: float, inputs: ProximityInputs, operands: Operands
) -> None:
    """Replaces the known overshoot by the whole one where more coordinates can overshoot.

    The product of values and ``W_O`` exists only in registers, tile by tile.

    Args:
        screened: All pairs; `overshoot` is changed in place.
        exact_fraction: Above 0. Below 1, pairs outside this share of the bounds' total are left.
        inputs: The layer's tensors, all but the cache and the weight contiguous.
        operands: How rows of values and columns of the weight are multiplied.
    """
    column_sums, weight = inputs.column_sums, inputs.weight
    heads, tokens = column_sums.shape
    groups, block_size, head_dim = inputs.values.cache.shape[1:]
    pairs = column_sums.new_empty(heads, tokens, dtype=torch.int32)
    counts = column_sums.new_empty(heads, dtype=torch.int32)
    launch(
        _select_kernel,
        (heads,),
        screened.totals,
        screened.further,
        _threshold(screened.totals, exact_fraction),
        pairs,
        counts,
        tokens,
        TOKENS=_SELECT_TOKENS,
        num_warps=8,
    )
    tile = _TILES[operands.tile_key]
    launch(
        _overshoot_kernel,
        (triton.cdiv(tokens, tile.pairs), heads),
        *value_arguments(inputs.values),
        column_sums,
        weight,
        inputs.stream,
        pairs,
        counts,
        screened.overshoot,
        tokens,
        weight.shape[0],
        column_sums.stride(0),
        *weight.stride(),
        SHARED=heads // groups,
        PAIRS=tile.pairs,
        COORDINATES=tile.coordinates,
        HEAD_DIM=head_dim,
        PADDED_DIM=operands.padded_dim,
        BLOCK_SIZE=block_size,
        EIGHT_BIT=eight_bit_format(inputs.values.cache),
        OPERANDS=operands.triton_type,
        PRECISION=operands.precision,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _threshold(totals: Tensor, fraction: float) -> Tensor:
    """The smallest of the largest bounds that together hold `fraction` of their total, ``[1]``.

    Masses are counted in whole units, 2^61 to the total: a parallel sum of integers is the same in
    any order, which one of floats is not.
    """
    if fraction == 1:
        return totals.new_zeros(1)
    bounds = totals.flatten().nan_to_num(nan=0.0).clamp_(min=0)
    ranked = bounds.sort(descending=True).values
    # Relative to the largest, so that no scale leaves the range of float32.
    shares = ranked / ranked[:1].clamp(min=torch.finfo(torch.float32).tiny)
    total = shares.sum(dtype=torch.float64).clamp_(min=1)
    mass = (shares * (2.0**61 / total)).to(torch.int64).cumsum(0)
    last = torch.searchsorted(mass, (fraction * mass[-1:].double()).to(torch.int64))
    return ranked.gather(0, last.clamp_(max=len(ranked) - 1))


@triton.jit(do_not_specialize=["num_tokens"])
def _select_kernel(totals, further, threshold, pairs, counts, num_tokens, TOKENS: tl.constexpr):
    """One head: lists its tokens that reach further and count, in order."""
    head = tl.program_id(0)
    first = head.to(tl.int64) * num_tokens
    least = tl.load(threshold)
    count = 0
    for start in range(0, num_tokens, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        valid = tokens < num_tokens
        reaches = tl.load(further + first + tokens, mask=valid, other=0)
        total = tl.load(totals + first + tokens, mask=valid, other=0.0)
        chosen = ((reaches != 0) & (total >= least)).to(tl.int32)
        places = first + count + tl.cumsum(chosen, axis=0) - 1
        tl.store(pairs + places, tokens, mask=chosen != 0)
        count += tl.sum(chosen, axis=0)
    tl.store(counts + head, count)


@triton.jit(
    do_not_specialize=["num_tokens", "stride_head"],
    do_not_specialize_on_alignment=["block_table", "column_sums"],
)
def _overshoot_kernel(
    cache,
    block_table,
    value_scale,
    stride_block,
    stride_group,
    stride_slot,
    stride_dim,
    column_sums,
    weight,
    stream,
    pairs,
    counts,
    overshoot,
    num_tokens,
    hidden,
    stride_head,
    stride_row,
    stride_column,
    SHARED: tl.constexpr,
    PAIRS: tl.constexpr,
    COORDINATES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    OPERANDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of one head's listed pairs: loops over the coordinates."""
    head = tl.program_id(1)
    listed = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    count = tl.load(counts + head)
    if tl.program_id(0) * PAIRS >= count:
        return
    valid = listed < count
    first = head.to(tl.int64) * num_tokens
    tokens = tl.load(pairs + first + listed, mask=valid, other=0)
    values = load_cached(
        cache,
        block_table,
        stride_block,
        stride_group,
        stride_slot,
        stride_dim,
        head // SHARED,
        tokens,
        valid,
        HEAD_DIM,
        PADDED_DIM,
        BLOCK_SIZE,
        EIGHT_BIT,
    ).to(OPERANDS)
    factor = tl.load(column_sums + head.to(tl.int64) * stride_head + tokens, mask=valid, other=0.0)
    factor *= value_scale
    dims = tl.arange(0, PADDED_DIM)
    columns = (head * HEAD_DIM + dims).to(tl.int64) * stride_column
    sums = tl.zeros([PAIRS], tl.float32)
    for start in range(0, hidden, COORDINATES):
        coordinates = start + tl.arange(0, COORDINATES)
        inside = coordinates < hidden
        x = tl.load(stream + coordinates, mask=inside, other=0.0)
        places = coordinates.to(tl.int64)[:, None] * stride_row + columns[None, :]
        mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
        w = tl.load(weight + places, mask=mask, other=0.0).to(OPERANDS)
        aligned = tl.dot(values, tl.trans(w), input_precision=PRECISION)
        aligned = aligned * tl.where(x < 0, -1.0, 1.0)[None, :] * factor[:, None]
        sums += tl.sum(tl.maximum(aligned - tl.abs(x)[None, :], 0.0), axis=1)
    tl.store(overshoot + first + tokens, sums, mask=valid)
