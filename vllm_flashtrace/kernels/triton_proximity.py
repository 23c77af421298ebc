"""Exact L1 proximities from the paged V cache, on the GPU, for all layers and traces at once.

The scheme of `core.proximity` in two passes: one over all (token, head) pairs, which knows the
overshoot at the eight nearest coordinates (`triton_screen`), and one over all coordinates for the
pairs that reach further. On real text these are a few in a hundred, so going from 8 coordinates
straight to all costs less than a stage in between would. Both work in place of the column sums;
then the heads are added up.

The host never waits for the device: launches are sized for all pairs, and a program finds those of
its window of tokens that need the second pass by itself. No result depends on the order in which
programs run, nor on other layers and traces, so the same input gives the same bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_flashtrace.kernels.paged_proximity import ProximityLayer, ProximityTrace
from vllm_flashtrace.kernels.target_rows import touching_sums
from vllm_flashtrace.kernels.triton_operands import launch, load_cached
from vllm_flashtrace.kernels.triton_rows import cdiv
from vllm_flashtrace.kernels.triton_screen import (
    ITEM,
    WINDOW_WORDS,
    WORD_BITS,
    WORD_POWERS,
    LayerKind,
    Nearest,
    Tables,
    block_table_of,
    cache_of,
    column_sums_of,
    first_item_of,
    index_of,
    nearest_bytes,
    nearest_coordinates,
    pair_bounds,
    residual_of,
    results_of,
    screen_pairs,
    stream_of,
    tokens_of,
    weight_of,
)

SCRATCH_BYTES = 128 << 20
"""Layers are taken in chunks that need no more memory than this beside the accumulators.

All layers of a model are one chunk but for many traces that end in the same step: a layer of 32
heads of 128 and 4,096 coordinates takes 0.5 MiB, and 26 KiB for each trace.
"""

_PARTS, _COORDINATES, _SHARES = 256, 1024, 128


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


def triton_proximities(layers: Sequence[ProximityLayer], traces: Sequence[ProximityTrace]) -> None:
    """Triton form of `replace_by_proximities`: seven launches, copies included.

    As many again for layers of another kind, and six for each further chunk of layers.
    """
    kinds: dict[LayerKind, list[ProximityLayer]] = defaultdict(list)
    for layer in layers:
        kinds[LayerKind.of(layer)].append(layer)
    with torch.cuda.device_of(traces[0].sums.column_sums):
        tables = [Tables.copy(kind, alike, traces) for kind, alike in kinds.items()]
        with touching_sums():
            for table in tables:
                _proximities(table, traces)


def triton_sum_shares(
    proximities: Tensor, denominators: Tensor, scores: Tensor, *, keep: bool
) -> None:
    """Triton form of `sum_shares`: one launch."""
    layers, tokens = proximities.shape
    with torch.cuda.device_of(proximities):
        launch(
            _sum_shares_kernel,
            (cdiv(len(scores), _SHARES),),
            proximities,
            denominators,
            scores,
            layers,
            tokens,
            len(scores),
            proximities.stride(0),
            int(keep),
            TOKENS=_SHARES,
            num_warps=4,
        )


def _proximities(tables: Tables, traces: Sequence[ProximityTrace]) -> None:
    per_layer = nearest_bytes(tables.kind, len(traces)) + 8 * len(tables.items)
    most = max(1, min(tables.num_layers, SCRATCH_BYTES // per_layer))
    for first in range(0, tables.num_layers, most):
        count = min(most, tables.num_layers - first)
        nearest = nearest_coordinates(tables, first, count)
        for place, trace in enumerate(traces):
            if 0 < trace.exact_fraction < 1:
                _set_thresholds(tables, place, trace, first, count, nearest)
        screen_pairs(tables, first, count, nearest)
        _complete_pairs(tables, first, count)
        _sum_up(tables, first, count)


def _set_thresholds(
    tables: Tables,
    place: int,
    trace: ProximityTrace,
    first_layer: int,
    layers: int,
    nearest: Nearest,
) -> None:
    """Leaves pairs of one trace outside `exact_fraction` with what `screen_pairs` knows of them."""
    bounds = trace.sums.column_sums.new_empty(tables.kind.heads, trace.tokens)
    for layer in range(layers):
        pair_bounds(tables, place, first_layer, layer, nearest, bounds)
        tables.thresholds[first_layer + layer, place] = _threshold(bounds, trace.exact_fraction)


def _threshold(bounds: Tensor, fraction: float) -> Tensor:
    """The smallest of the largest bounds that together hold `fraction` of their total.

    Masses are counted in whole units, 2^61 to the total: a parallel sum of integers is the same in
    any order, which one of floats is not.
    """
    ranked = bounds.flatten().nan_to_num(nan=0.0).clamp_(min=0).sort(descending=True).values
    # Relative to the largest, so that no scale leaves the range of float32.
    shares = ranked / ranked[:1].clamp(min=torch.finfo(torch.float32).tiny)
    total = shares.sum(dtype=torch.float64).clamp_(min=1)
    mass = (shares * (2.0**61 / total)).to(torch.int64).cumsum(0)
    last = torch.searchsorted(mass, (fraction * mass[-1:].double()).to(torch.int64))
    return ranked.gather(0, last.clamp_(max=len(ranked) - 1)).squeeze(0)


def _complete_pairs(tables: Tables, first_layer: int, layers: int) -> None:
    """Replaces the negated column sums that `screen_pairs` left by the pairs' proximities.

    The product of values and ``W_O`` exists only in registers, tile by tile.
    """
    kind = tables.kind
    tile = _TILES[kind.operands.tile_key]
    launch(
        _complete_kernel,
        (len(tables.windows), kind.heads, layers),
        tables.traces,
        tables.layers,
        tables.scales,
        tables.windows,
        first_layer,
        kind.hidden,
        *kind.cache[1],
        *kind.weight[1],
        PAIRS=tile.pairs,
        COORDINATES=tile.coordinates,
        **kind.value_constants(),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _sum_up(tables: Tables, first_layer: int, layers: int) -> None:
    """Adds up the heads of every token, the tokens of every layer, and the residual's proximity."""
    kind = tables.kind
    parts = torch.empty(layers, len(tables.items), dtype=torch.float64, device=tables.traces.device)
    launch(
        _sum_heads_kernel,
        (len(tables.items), layers),
        tables.traces,
        tables.layers,
        tables.items,
        parts,
        first_layer,
        kind.heads,
        TOKENS=kind.tokens,
        num_warps=4,
    )
    launch(
        _totals_kernel,
        (tables.num_traces, layers),
        tables.traces,
        tables.layers,
        parts,
        first_layer,
        len(tables.items),
        kind.hidden,
        TOKENS=kind.tokens,
        PARTS=_PARTS,
        COORDINATES=_COORDINATES,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["first_layer"])
def _complete_kernel(
    traces,
    layers,
    scales,
    windows,
    first_layer,
    hidden,
    stride_block,
    stride_group,
    stride_slot,
    stride_dim,
    stride_row,
    stride_column,
    PAIRS: tl.constexpr,
    COORDINATES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WEIGHT: tl.constexpr,
    WEIGHT_ALIGNMENT: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STORED: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    CACHE_ALIGNMENT: tl.constexpr,
    OPERANDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A window of one head's tokens: loops over tiles of its pairs, and over the coordinates."""
    item = windows + tl.program_id(0) * ITEM
    trace, start = tl.load(item), tl.load(item + 1)
    head = tl.program_id(1)
    layer = first_layer + tl.program_id(2)
    index = index_of(layers, layer)
    column_sums = column_sums_of(traces, trace, index, head) + start
    own_words, own_bits = tl.arange(0, WINDOW_WORDS), tl.arange(0, WORD_BITS)
    window = own_words[:, None] * WORD_BITS + own_bits[None, :]
    inside = window < tokens_of(traces, trace) - start
    marked = (tl.load(column_sums + window, mask=inside, other=0.0) < 0).to(tl.int32)
    words = tl.sum(marked << own_bits[None, :], axis=1)
    numbers = tl.sum(marked, axis=1)
    ends = tl.cumsum(numbers, axis=0)
    count = tl.sum(numbers, axis=0)

    cache = cache_of(layers, layer, STORED, CACHE_ALIGNMENT)
    weight = weight_of(layers, layer, WEIGHT, WEIGHT_ALIGNMENT)
    stream = stream_of(traces, trace, index)
    block_table = block_table_of(traces, trace)
    value_scale = tl.load(scales + layer)
    dims = tl.arange(0, PADDED_DIM)
    columns = (head * HEAD_DIM + dims).to(tl.int64) * stride_column
    for first in range(0, count, PAIRS):
        # The pair of each rank: its word by bisection of the numbers of pairs, then its bit.
        ranks = first + tl.arange(0, PAIRS)
        valid = ranks < count
        word = tl.zeros([PAIRS], tl.int32)
        for power in tl.static_range(WORD_POWERS):
            middle = word + (WINDOW_WORDS >> (power + 1))
            word = tl.where(tl.gather(ends, middle - 1, axis=0) <= ranks, middle, word)
        ranks -= tl.gather(ends - numbers, word, axis=0)
        bits = tl.gather(words, word, axis=0)
        bits_up_to = tl.cumsum((bits[:, None] >> own_bits[None, :]) & 1, axis=1)
        bit = tl.sum((bits_up_to <= ranks[:, None]).to(tl.int32), axis=1)
        places = word * WORD_BITS + bit

        values = load_cached(
            cache,
            block_table,
            stride_block,
            stride_group,
            stride_slot,
            stride_dim,
            head // SHARED,
            start + places,
            valid,
            HEAD_DIM,
            PADDED_DIM,
            BLOCK_SIZE,
            EIGHT_BIT,
        ).to(OPERANDS)
        factor = -tl.load(column_sums + places, mask=valid, other=0.0) * value_scale
        proximity = tl.zeros([PAIRS], tl.float32)
        for some in range(0, hidden, COORDINATES):
            coordinates = some + tl.arange(0, COORDINATES)
            known = coordinates < hidden
            x = tl.load(stream + coordinates, mask=known, other=0.0)
            rows = coordinates.to(tl.int64)[:, None] * stride_row + columns[None, :]
            mask = known[:, None] & (dims < HEAD_DIM)[None, :]
            w = tl.load(weight + rows, mask=mask, other=0.0).to(OPERANDS)
            aligned = tl.dot(values, tl.trans(w), input_precision=PRECISION)
            aligned = aligned * tl.where(x < 0, -1.0, 1.0)[None, :] * factor[:, None]
            size = tl.abs(x)[None, :]
            proximity += tl.sum(tl.minimum(aligned, 2 * size - aligned), axis=1)
        # Every thread that shares a column sum has it by now.
        tl.debug_barrier()
        tl.store(column_sums + places, tl.maximum(proximity, 0.0), mask=valid)


@triton.jit(do_not_specialize=["first_layer"])
def _sum_heads_kernel(traces, layers, items, parts, first_layer, heads, TOKENS: tl.constexpr):
    """A tile of tokens: heads added in order."""
    item = items + tl.program_id(0) * ITEM
    trace = tl.load(item)
    tokens = tl.load(item + 1) + tl.arange(0, TOKENS)
    valid = tokens < tokens_of(traces, trace)
    slot = tl.program_id(1)
    index = index_of(layers, first_layer + slot)
    own = column_sums_of(traces, trace, index, 0) + tokens
    proximities = tl.zeros([TOKENS], tl.float32)
    for head in range(heads):
        sums = column_sums_of(traces, trace, index, head) + tokens
        proximities += tl.load(sums, mask=valid, other=0.0)
    part = tl.sum(proximities.to(tl.float64), axis=0)
    # Every thread that shares a column sum has it by now.
    tl.debug_barrier()
    tl.store(own, proximities, mask=valid)
    tl.store(parts + slot * tl.num_programs(0) + tl.program_id(0), part)


@triton.jit(do_not_specialize=["first_layer", "num_items"])
def _totals_kernel(
    traces,
    layers,
    parts,
    first_layer,
    num_items,
    hidden,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    COORDINATES: tl.constexpr,
):
    """One trace and layer: adds up its tiles, and ``prox(r)`` as `core.l1_proximity` does."""
    trace, slot = tl.program_id(0), tl.program_id(1)
    index = index_of(layers, first_layer + slot)
    count = tl.cdiv(tokens_of(traces, trace), TOKENS)
    own = parts + slot * num_items + first_item_of(traces, trace)
    sums = tl.zeros([PARTS], tl.float64)
    for first in range(0, count, PARTS):
        some = first + tl.arange(0, PARTS)
        sums += tl.load(own + some, mask=some < count, other=0.0)

    stream = stream_of(traces, trace, index)
    residual = residual_of(traces, trace, index)
    aligned_sums = tl.zeros([COORDINATES], tl.float64)
    for first in range(0, hidden, COORDINATES):
        coordinates = first + tl.arange(0, COORDINATES)
        inside = coordinates < hidden
        x = tl.load(stream + coordinates, mask=inside, other=0.0)
        r = tl.load(residual + coordinates, mask=inside, other=0.0)
        aligned = tl.where(x < 0, -r, r)
        past = 2 * tl.abs(x) - aligned
        # Not a minimum, which would drop a NaN.
        aligned_sums += tl.where(aligned < past, aligned, past).to(tl.float64)
    proximity = tl.sum(aligned_sums, axis=0)
    totals, proximities = results_of(traces, trace)
    tl.store(totals + index, tl.sum(sums, axis=0))
    tl.store(proximities + index, tl.where(proximity < 0, 0.0, proximity))


@triton.jit(
    do_not_specialize=["num_layers", "num_tokens", "length", "stride_layer", "keep"],
    do_not_specialize_on_alignment=["denominators"],
)
def _sum_shares_kernel(
    proximities,
    denominators,
    scores,
    num_layers,
    num_tokens,
    length,
    stride_layer,
    keep,
    TOKENS: tl.constexpr,
):
    """A tile of tokens: layers added in order."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = tokens < num_tokens
    sums = tl.zeros([TOKENS], tl.float64)
    own = proximities + tokens
    for layer in range(num_layers):
        denominator = tl.load(denominators + layer)
        factor = tl.where(denominator > 0, 1 / denominator, 0.0)
        shares = tl.load(own, mask=inside, other=0.0).to(tl.float64) * factor
        sums += shares
        if keep != 0:
            tl.store(own, shares.to(tl.float32), mask=inside)
        own += stride_layer
    tl.store(scores + tokens, sums.to(tl.float32), mask=tokens < length)
