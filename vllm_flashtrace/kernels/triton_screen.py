"""The first pass of the proximity: every (token, head) pair, and which need a second look.

`nearest_coordinates` reads ``W_O`` and finds, per head, the direction of the total alignment and
the coordinates that are easiest to overshoot. `screen_pairs` then goes over the V cache once: a
value vector is loaded once for all query heads that share it. A pair's proximity takes the place of
its column sum, and a pair that needs a second look has its column sum negated, so nothing as large
as the column sums is stored beside them.

Every launch is for several layers of one kind and all traces. Where their tensors are stands in
tables, see `Tables`; all else that kernels need to know of a layer is a constant of its kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from vllm_flashtrace.kernels.paged_proximity import ProximityLayer, ProximityTrace
from vllm_flashtrace.kernels.triton_operands import (
    Operands,
    eight_bit_format,
    launch,
    load_cached,
    stored_type,
)
from vllm_flashtrace.kernels.triton_rows import (
    cdiv,
    counted,
    next_power_of_2,
    numbers_of_sums,
    to_device,
)

PIECES, NEAREST = tl.constexpr(3), tl.constexpr(8)
"""Rows that together are the total direction; coordinates with an overshoot for every pair."""

DIRECTIONS = tl.constexpr(16)
"""Rows of a head's directions: pieces, nearest, zeros up to what a matrix product takes."""

WORD_POWERS, WINDOW_WORDS, WORD_BITS = tl.constexpr(7), tl.constexpr(2**7), tl.constexpr(32)
"""A window of tokens, of which one program takes the pairs that need a second look, by bits."""

TRACE, LAYER, ITEM = tl.constexpr(12), tl.constexpr(3), tl.constexpr(2)
"""Numbers of a trace, a layer and an item of work in `Tables`."""

# Where a trace's numbers are: addresses and the strides of layers and heads.
_COLUMN_SUMS, _RESIDUAL, _STREAM = tl.constexpr(0), tl.constexpr(3), tl.constexpr(5)
_TOTALS, _RESIDUAL_PROXIMITY = tl.constexpr(7), tl.constexpr(8)
_BLOCK_TABLE, _TOKENS_OF_TRACE, _FIRST_ITEM = tl.constexpr(9), tl.constexpr(10), tl.constexpr(11)

_ALIGNMENT = 16

# Numbers of a tile of the weight that a program of the first kernels loads at a time.
_WEIGHT_TILE = 8192

# Rounding of the reach must never hide a coordinate.
_REACH_SLACK = tl.constexpr(1 + 1e-5)

# Tokens of a program by bytes of a head's row of operands; half as many where products of float32
# are taken in parts, which need twice the shared memory. 99 KiB of it suffice.
_TOKENS = {128: 128, 256: 128, 512: 64, 1024: 64}


class LayerKind(NamedTuple):
    """What layers must have in common to share a launch.

    Attributes:
        heads: Query heads.
        hidden: Size of the residual stream.
        cache: Type, strides and ``(G, block_size, d)`` of the value cache.
        weight: Type and strides of ``W_O``.
        alignment: Bytes that divide the addresses of both.
    """

    heads: int
    hidden: int
    cache: tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]
    weight: tuple[torch.dtype, tuple[int, ...]]
    alignment: tuple[int, int]

    @classmethod
    def of(cls, layer: ProximityLayer) -> Self:
        """The kind of one layer."""
        cache, weight = layer.cache, layer.weight
        return cls(
            layer.heads,
            layer.hidden,
            (cache.dtype, cache.stride(), tuple(cache.shape[1:])),
            (weight.dtype, weight.stride()),
            (_alignment(cache), _alignment(weight)),
        )

    @property
    def operands(self) -> Operands:
        """How rows of values and columns of the weight are multiplied."""
        return Operands.choose(self.cache[0], self.weight[0], self.cache[2][2])

    @property
    def tokens(self) -> int:
        """Tokens of an item of work."""
        operands = self.operands
        tile = _TOKENS[max(128, operands.padded_dim * operands.dtype.itemsize)]
        return tile // (2 if operands.precision == "tf32x3" else 1)

    def weight_constants(self) -> dict[str, Any]:
        """What kernels over the weight take last."""
        return {
            "HEAD_DIM": self.cache[2][2],
            "PADDED_DIM": self.operands.padded_dim,
            "WEIGHT": stored_type(self.weight[0]),
            "WEIGHT_ALIGNMENT": self.alignment[1],
        }

    def value_constants(self) -> dict[str, Any]:
        """What kernels over values take last, besides."""
        (dtype, _, (groups, block_size, _)), operands = self.cache, self.operands
        return {
            **self.weight_constants(),
            "SHARED": self.heads // groups,
            "BLOCK_SIZE": block_size,
            "STORED": stored_type(dtype),
            "EIGHT_BIT": eight_bit_format(dtype),
            "CACHE_ALIGNMENT": self.alignment[0],
            "OPERANDS": operands.triton_type,
            "PRECISION": operands.precision,
        }


def _alignment(tensor: Tensor) -> int:
    return _ALIGNMENT if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """Where the tensors of layers and traces are, on the device.

    Attributes:
        kind: Of all layers.
        num_layers: Number of layers.
        spans: The first item of each trace, and the number of all.
        traces: int64 ``[S, 12]``: address of the column sums, strides of layers and heads; address
            and stride of layers of the residual, and of the stream; addresses of the totals, the
            residual's proximities and the block table; number of tokens; the first item.
        layers: int64 ``[L, 3]``: addresses of values and weight, place in the accumulators.
        scales: float32 ``[L]``, factors on the values.
        thresholds: float32 ``[L, S]``: pairs with a smaller bound get no second look.
        items: int32 ``[T, 2]``: a trace and the first of up to `LayerKind.tokens` tokens.
        windows: The same for windows of ``WINDOW_WORDS * WORD_BITS`` tokens.
    """

    kind: LayerKind
    num_layers: int
    spans: Sequence[int]
    traces: Tensor
    layers: Tensor
    scales: Tensor
    thresholds: Tensor
    items: Tensor
    windows: Tensor

    @classmethod
    def copy(
        cls, kind: LayerKind, layers: Sequence[ProximityLayer], traces: Sequence[ProximityTrace]
    ) -> Self:
        """Copies the tables to the device, in one piece and without waiting."""
        tokens = np.array([trace.tokens for trace in traces])
        items, spans = _items(tokens, kind.tokens)
        windows, _ = _items(tokens, WINDOW_WORDS.value * WORD_BITS.value)
        fractions = np.array([trace.exact_fraction for trace in traces])
        thresholds = np.where(fractions > 0, 0.0, np.inf).astype(np.float32)
        numbers = [_numbers(t, first) for t, first in zip(traces, spans, strict=False)]
        places = [
            (layer.cache.data_ptr(), layer.weight.data_ptr(), layer.index) for layer in layers
        ]
        tables: list[NDArray[Any]] = [
            np.array(numbers, np.int64),
            np.array(places, np.int64),
            np.array([layer.scale for layer in layers], np.float32),
            np.tile(thresholds, (len(layers), 1)),
            items,
            windows,
        ]
        device = traces[0].sums.column_sums.device
        return cls(kind, len(layers), spans, *to_device(tables, device))

    @property
    def num_traces(self) -> int:
        """Number of traces."""
        return len(self.traces)


def _items(tokens: NDArray[np.int64], size: int) -> tuple[NDArray[np.int32], list[int]]:
    """Every trace's tokens in pieces, and where each trace's pieces begin and all end."""
    pieces = cdiv(tokens, size)
    trace, piece = counted(pieces)
    items = np.stack([trace, piece * size], 1).astype(np.int32)
    return items, [0, *pieces.cumsum().tolist()]


def _numbers(trace: ProximityTrace, first_item: int) -> list[int]:
    return [
        *numbers_of_sums(trace.sums),
        trace.totals.data_ptr(),
        trace.residual.data_ptr(),
        trace.block_table.data_ptr(),
        trace.tokens,
        first_item,
    ]


@dataclass(frozen=True, slots=True, eq=False)
class Nearest:
    """Per head the direction of the total alignment and the coordinates easiest to overshoot.

    The place of a layer, a trace and a head is ``(layer * S + trace) * H + head``, layers counted
    from the first of the chunk.

    Attributes:
        pieces: ``[places, 3, padded d]`` in the type of the matrix products. The sum of the three
            times `powers` is ``W_O^h s``, whose product with a value vector is the alignment over
            all coordinates: sixteen bits three times hold a float32.
        powers: float32 ``[places]``, powers of two; NaN where an input of the head is not finite.
        coordinates: int32 ``[places, 16]``: rows 3 to 10 are the nearest coordinates, -1 where
            there is none and in other rows.
        limits: float32 ``[places]``, the reach past which a ninth coordinate can overshoot.
    """

    pieces: Tensor
    powers: Tensor
    coordinates: Tensor
    limits: Tensor

    @classmethod
    def empty(cls, tables: Tables, layers: int) -> Self:
        """Memory for a chunk of so many layers."""
        operands, device = tables.kind.operands, tables.traces.device
        places = layers * tables.num_traces * tables.kind.heads
        return cls(
            torch.empty(
                places, PIECES.value, operands.padded_dim, dtype=operands.dtype, device=device
            ),
            torch.empty(places, device=device),
            torch.empty(places, DIRECTIONS.value, dtype=torch.int32, device=device),
            torch.empty(places, device=device),
        )

    def __iter__(self) -> Any:
        return iter((self.pieces, self.powers, self.coordinates, self.limits))


def nearest_bytes(kind: LayerKind, traces: int) -> int:
    """What `nearest_coordinates` allocates for one layer."""
    operands = kind.operands
    place = PIECES.value * operands.padded_dim * operands.dtype.itemsize + 4 * DIRECTIONS.value + 8
    return kind.heads * (4 * kind.hidden + traces * place)


def nearest_coordinates(tables: Tables, first_layer: int, layers: int) -> Nearest:
    """Finds the nearest coordinates of every head of a chunk of layers, for every trace."""
    kind, padded_dim = tables.kind, tables.kind.operands.padded_dim
    norms = torch.empty(layers, kind.heads, kind.hidden, device=tables.traces.device)
    rows = _WEIGHT_TILE // padded_dim
    launch(
        _norms_kernel,
        (cdiv(kind.hidden, rows), kind.heads, layers),
        tables.layers,
        norms,
        first_layer,
        kind.hidden,
        *kind.weight[1],
        ROWS=rows,
        **kind.weight_constants(),
        num_warps=4,
    )
    nearest = Nearest.empty(tables, layers)
    padded_hidden = next_power_of_2(kind.hidden)
    launch(
        _nearest_kernel,
        (kind.heads, tables.num_traces, layers),
        tables.traces,
        tables.layers,
        norms,
        *nearest,
        first_layer,
        kind.hidden,
        *kind.weight[1],
        ROWS=_WEIGHT_TILE // padded_dim,
        PADDED_HIDDEN=padded_hidden,
        **kind.weight_constants(),
        num_warps=8 if padded_hidden <= 8192 else 16,
    )
    return nearest


def screen_pairs(tables: Tables, first_layer: int, layers: int, nearest: Nearest) -> None:
    """Replaces the column sums of all pairs of a chunk of layers.

    By the pair's proximity, NaN where an input of the pair is not finite or its column sum is
    negative; or, where more coordinates can overshoot than are known, by the negated column sum.
    """
    _screen(tables, nearest, 0, len(tables.items), first_layer, 0, layers, None)


def pair_bounds(
    tables: Tables, trace: int, first_layer: int, layer: int, nearest: Nearest, bounds: Tensor
) -> None:
    """Writes the bounds of one trace's pairs in one layer of a chunk; changes no sums.

    Args:
        tables: The tables.
        trace: The trace.
        first_layer: First layer of the chunk.
        layer: The layer, counted from there.
        nearest: Of the chunk.
        bounds: float32 ``[H, N]``: gets the sum over all coordinates of ``s_i z_i``, NaN where an
            input of the pair is not finite or its column sum is negative.
    """
    first, last = tables.spans[trace : trace + 2]
    _screen(tables, nearest, first, last - first, first_layer, layer, 1, bounds)


def _screen(
    tables: Tables,
    nearest: Nearest,
    first_item: int,
    items: int,
    first_layer: int,
    skipped: int,
    layers: int,
    bounds: Tensor | None,
) -> None:
    kind = tables.kind
    launch(
        _screen_kernel,
        (items, kind.cache[2][0], layers),
        tables.traces,
        tables.layers,
        tables.scales,
        tables.thresholds,
        tables.items,
        *nearest,
        tables.thresholds if bounds is None else bounds,
        first_item,
        first_layer,
        skipped,
        tables.num_traces,
        int(bounds is not None),
        *kind.cache[1],
        *kind.weight[1],
        TOKENS=kind.tokens,
        **kind.value_constants(),
        num_warps=4,
        num_stages=1,
    )


@triton.jit
def stream_of(traces, trace, index):
    """Where a trace's stream in a layer is."""
    numbers = traces + trace * TRACE + _STREAM
    return tl.load(numbers).to(tl.pointer_type(tl.float32)) + index * tl.load(numbers + 1)


@triton.jit
def residual_of(traces, trace, index):
    """Where a trace's residual in a layer is."""
    numbers = traces + trace * TRACE + _RESIDUAL
    return tl.load(numbers).to(tl.pointer_type(tl.float32)) + index * tl.load(numbers + 1)


@triton.jit
def results_of(traces, trace):
    """Where a trace's totals and the proximities of its residual go."""
    numbers = traces + trace * TRACE
    totals = tl.load(numbers + _TOTALS).to(tl.pointer_type(tl.float64))
    return totals, tl.load(numbers + _RESIDUAL_PROXIMITY).to(tl.pointer_type(tl.float64))


@triton.jit
def column_sums_of(traces, trace, index, head):
    """Where a trace's column sums of a head in a layer are."""
    numbers = traces + trace * TRACE + _COLUMN_SUMS
    offset = index * tl.load(numbers + 1) + head * tl.load(numbers + 2)
    return tl.load(numbers).to(tl.pointer_type(tl.float32)) + offset


@triton.jit
def block_table_of(traces, trace):
    """Where a trace's block table is."""
    return tl.load(traces + trace * TRACE + _BLOCK_TABLE).to(tl.pointer_type(tl.int32))


@triton.jit
def tokens_of(traces, trace):
    """How many tokens a trace has."""
    return tl.load(traces + trace * TRACE + _TOKENS_OF_TRACE).to(tl.int32)


@triton.jit
def first_item_of(traces, trace):
    """The first item of a trace."""
    return tl.load(traces + trace * TRACE + _FIRST_ITEM)


@triton.jit
def cache_of(layers, layer, TYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Where a layer's values are."""
    address = tl.load(layers + layer * LAYER).to(tl.pointer_type(TYPE))
    return tl.multiple_of(address, ALIGNMENT)


@triton.jit
def weight_of(layers, layer, TYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Where a layer's ``W_O`` is."""
    address = tl.load(layers + layer * LAYER + 1).to(tl.pointer_type(TYPE))
    return tl.multiple_of(address, ALIGNMENT)


@triton.jit
def index_of(layers, layer):
    """A layer's place in the accumulators."""
    return tl.load(layers + layer * LAYER + 2)


@triton.jit(do_not_specialize=["first_layer"])
def _norms_kernel(
    layers,
    norms,
    first_layer,
    hidden,
    stride_row,
    stride_column,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WEIGHT: tl.constexpr,
    WEIGHT_ALIGNMENT: tl.constexpr,
):
    """Some coordinates of one head."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    inside = rows < hidden
    dims = tl.arange(0, PADDED_DIM)
    weight = weight_of(layers, first_layer + tl.program_id(2), WEIGHT, WEIGHT_ALIGNMENT)
    columns = (head * HEAD_DIM + dims).to(tl.int64) * stride_column
    places = rows.to(tl.int64)[:, None] * stride_row + columns[None, :]
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    w = tl.load(weight + places, mask=mask, other=0.0).to(tl.float32)
    first = (tl.program_id(2) * tl.num_programs(1) + head).to(tl.int64) * hidden
    tl.store(norms + first + rows, tl.sqrt(tl.sum(w * w, axis=1)), mask=inside)


@triton.jit(do_not_specialize=["first_layer"])
def _nearest_kernel(
    traces,
    layers,
    column_norms,
    pieces,
    powers,
    nearest,
    limits,
    first_layer,
    hidden,
    stride_row,
    stride_column,
    ROWS: tl.constexpr,
    PADDED_HIDDEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WEIGHT: tl.constexpr,
    WEIGHT_ALIGNMENT: tl.constexpr,
):
    """One head: sums up its direction; takes the smallest limit `NEAREST` times, keeps the next."""
    head, trace, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    layer = first_layer + slot
    stream = stream_of(traces, trace, index_of(layers, layer))
    weight = weight_of(layers, layer, WEIGHT, WEIGHT_ALIGNMENT)
    place = ((slot * tl.num_programs(1) + trace) * tl.num_programs(0) + head).to(tl.int64)
    dims = tl.arange(0, PADDED_DIM)
    in_head = dims < HEAD_DIM
    columns = (head * HEAD_DIM + dims).to(tl.int64) * stride_column

    sums = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for first in range(0, hidden, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = rows < hidden
        x = tl.load(stream + rows, mask=inside, other=0.0)
        places = rows.to(tl.int64)[:, None] * stride_row + columns[None, :]
        mask = inside[:, None] & in_head[None, :]
        w = tl.load(weight + places, mask=mask, other=0.0).to(tl.float32)
        sums += tl.where(x < 0, -1.0, 1.0)[:, None] * w
    total = tl.sum(sums, axis=0)
    # A power of two near the largest entry keeps the pieces within the range of float16.
    largest = tl.max(tl.abs(total), axis=0)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) / 256
    power = tl.where((power > 0) & (power < float("inf")), power, 1.0)
    remainder = tl.div_rn(total, power)
    for piece in tl.static_range(PIECES):
        rounded = remainder.to(pieces.dtype.element_ty)
        remainder -= rounded.to(tl.float32)
        tl.store(pieces + (place * PIECES + piece) * PADDED_DIM + dims, rounded)

    coordinates = tl.arange(0, PADDED_HIDDEN)
    inside = coordinates < hidden
    size = tl.abs(tl.load(stream + coordinates, mask=inside, other=0.0))
    row = (slot * tl.num_programs(0) + head).to(tl.int64) * hidden
    norms = tl.load(column_norms + row + coordinates, mask=inside, other=0.0)
    # What is not a number fails every comparison.
    finite = (size < float("inf")) & (norms < float("inf"))
    wrong = tl.sum((~finite).to(tl.int32), axis=0)
    wrong += tl.sum((~(tl.abs(total) < float("inf"))).to(tl.int32), axis=0)
    distances = tl.where(norms > 0, tl.div_rn(size, norms), float("inf"))
    distances = tl.where(distances < float("inf"), distances, float("inf"))
    directions = tl.arange(0, DIRECTIONS)
    found = tl.full([DIRECTIONS], -1, tl.int32)
    for number in tl.static_range(PIECES, PIECES + NEAREST):
        distance = tl.min(distances, axis=0)
        coordinate = tl.argmin(distances, axis=0)
        # Else no coordinate is left, or its column is zero.
        taken = tl.where(distance < float("inf"), coordinate, -1)
        found = tl.where(directions == number, taken, found)
        distances = tl.where(coordinates == coordinate, float("inf"), distances)
    tl.store(nearest + place * DIRECTIONS + directions, found)
    tl.store(limits + place, tl.min(distances, axis=0))
    tl.store(powers + place, tl.where(wrong > 0, float("nan"), power))


@triton.jit(do_not_specialize=["first_item", "first_layer", "skipped", "num_traces", "bounds_only"])
def _screen_kernel(
    traces,
    layers,
    scales,
    thresholds,
    items,
    pieces,
    powers,
    nearest,
    limits,
    bounds,
    first_item,
    first_layer,
    skipped,
    num_traces,
    bounds_only,
    stride_block,
    stride_group,
    stride_slot,
    stride_dim,
    stride_row,
    stride_column,
    TOKENS: tl.constexpr,
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
    """A tile of tokens for the query heads of one key/value head."""
    item = items + (first_item + tl.program_id(0)) * ITEM
    trace = tl.load(item)
    tokens = tl.load(item + 1) + tl.arange(0, TOKENS)
    num_tokens = tokens_of(traces, trace)
    valid = tokens < num_tokens
    group = tl.program_id(1)
    slot = skipped + tl.program_id(2)
    layer = first_layer + slot
    index = index_of(layers, layer)
    value_scale = tl.load(scales + layer)
    cached = load_cached(
        cache_of(layers, layer, STORED, CACHE_ALIGNMENT),
        block_table_of(traces, trace),
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
    values = cached.to(OPERANDS)
    dims = tl.arange(0, PADDED_DIM)
    rows = tl.arange(0, DIRECTIONS)
    stream = stream_of(traces, trace, index)
    weight = weight_of(layers, layer, WEIGHT, WEIGHT_ALIGNMENT)
    least = tl.load(thresholds + layer * num_traces + trace)
    heads = tl.num_programs(1) * SHARED
    for shared in range(SHARED):
        head = group * SHARED + shared
        place = ((slot * num_traces + trace) * heads + head).to(tl.int64)
        piece = (place * PIECES + rows)[:, None] * PADDED_DIM + dims[None, :]
        packed = tl.load(pieces + piece, mask=(rows < PIECES)[:, None], other=0.0)
        coordinate = tl.load(nearest + place * DIRECTIONS + rows)
        near = coordinate >= 0
        # Nothing overshoots an infinite size.
        x = tl.load(stream + coordinate, mask=near, other=float("inf"))
        columns = (head * HEAD_DIM + dims).to(tl.int64) * stride_column
        w = tl.load(
            weight + coordinate.to(tl.int64)[:, None] * stride_row + columns[None, :],
            mask=near[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        ).to(tl.float32)
        w = tl.where((x < 0)[:, None], -w, w).to(OPERANDS)
        packed = tl.where((rows < PIECES)[:, None], packed, w)
        sums = column_sums_of(traces, trace, index, head) + tokens
        factor = tl.load(sums, mask=valid, other=0.0)
        aligned = tl.dot(values, tl.trans(packed), input_precision=PRECISION)
        aligned *= (factor * value_scale)[:, None]
        total = tl.sum(tl.where((rows < PIECES)[None, :], aligned, 0.0), axis=1)
        total *= tl.load(powers + place)
        known = tl.sum(tl.maximum(aligned - tl.abs(x)[None, :], 0.0), axis=1)
        reach = factor * lengths
        # What is not a number fails every comparison.
        fine = (factor >= 0) & (reach < float("inf")) & (tl.abs(total) < float("inf"))
        total = tl.where(fine, total, float("nan"))
        if bounds_only != 0:
            bound = bounds + head.to(tl.int64) * num_tokens + tokens
            tl.store(bound, total, mask=valid)
        else:
            proximity = total - 2 * known
            # Not a maximum, which would drop a NaN.
            proximity = tl.where(proximity < 0, 0.0, proximity)
            further = (reach > tl.load(limits + place)) & (total > 0) & (total >= least)
            # Every thread that shares a column sum has it by now.
            tl.debug_barrier()
            tl.store(sums, tl.where(further, -factor, proximity), mask=valid)
