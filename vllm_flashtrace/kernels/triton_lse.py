"""First pass over attention: the log-sum-exp of every target row and head, from a paged K cache.

A query vector is loaded once and stays; a key tile is shared by all query heads of its key/value
head. Few rows over many keys are cut along the keys, and the parts joined in order. Where the
engine's own attention has told it, there is no pass: it only gets the weights of the rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_flashtrace.kernels.paged_attention import AttentionInputs
from vllm_flashtrace.kernels.target_rows import PagedRows
from vllm_flashtrace.kernels.triton_operands import (
    LAYER,
    LN2,
    LOG2E,
    GivenLse,
    LayerBatch,
    launch,
    load_cached,
    load_layer,
    load_queries,
    masked_logits,
    shaped_logits,
    unit_of,
)
from vllm_flashtrace.kernels.triton_rows import SEGMENT, WORK, Work, cdiv, next_power_of_2


class Tile(NamedTuple):
    """Queries (rows times heads that share a key) and keys of a step of a program.

    The other numbers are those of the column sums' tiles.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


# By bytes of an operand and padded head size. Products of float32 come out of registers, of which
# larger tiles would need more than there are. With these registers three programs share a
# multiprocessor of an H100, or four for heads of 64.
_TILES = {
    (2, 64): Tile(128, 64, 4, 3, 128),
    (2, 128): Tile(128, 64, 4, 3, 168),
    (2, 256): Tile(64, 32, 4, 2),
    (4, 64): Tile(64, 32, 8, 2),
    (4, 128): Tile(32, 32, 8, 2),
    (4, 256): Tile(32, 32, 8, 2),
}
_FEWEST_QUERIES = 16
_JOINED = 512


def triton_lse(inputs: AttentionInputs) -> Tensor:
    """Triton form of `paged_lse`."""
    with torch.cuda.device_of(inputs.query):
        batch = LayerBatch.of_one(inputs, 0)
        first = FirstPass.plan(batch)
        return first.run(batch, first.buffer(batch), weighted=False).offsets[0].t()


class Offsets(NamedTuple):
    """What the second pass is told of rows.

    Attributes:
        offsets: float32 ``[layers, H, R]``, what turns a logit into a weighted attention weight:
            ``w_i s_i alpha_ij = 2 ** (logit_ij / ln 2 - offset_i)``, ``offset = lse / ln 2 - log2(w
            s)``, with ``s_i`` the scale of a row.
        masses: float32 ``[layers, S, H, 2]``, what is added to the first two numbers of each
            segment's `RowSegment.mass`.
    """

    offsets: Tensor
    masses: Tensor


class FirstPass(NamedTuple):
    """How the first pass over layers that are alike is cut.

    Attributes:
        queries: Queries of a program.
        tile: The other numbers of its tile.
        work: What there is to do, for each layer; None where the log-sum-exp is given.
    """

    queries: int
    tile: Tile
    work: Work | None

    @classmethod
    def plan(cls, batch: LayerBatch) -> FirstPass:
        """By the target rows and what the layers have in common."""
        rows, tile = batch.rows, _TILES[batch.operands.tile_key]
        if batch.lse is not None:
            return cls(0, tile, None)
        shared = rows.num_heads // rows.num_kv_heads
        queries = next_power_of_2(min(rows.longest * shared, tile.queries))
        queries = max(queries, next_power_of_2(shared), _FEWEST_QUERIES)
        alike = batch.alike
        work = rows.on_device.row_tiles(queries // shared, tile.keys, alike.window, alike.chunk)
        return cls(queries, tile, work)

    def floats(self, rows: PagedRows) -> int:
        """Numbers that a layer takes at most: the results', and those of each part."""
        count, masses = len(rows) * rows.num_heads, 2 * len(rows.segments) * rows.num_heads
        return _aligned(count) + _aligned(masses) + _aligned(self._parts * count)

    @property
    def _parts(self) -> int:
        return self.work.slots if self.work is not None and self.work.slots > 1 else 0

    def buffer(self, batch: LayerBatch) -> Tensor:
        """Memory of its own for all layers."""
        count = len(batch.layers) * self.floats(batch.rows)
        return torch.empty(count, dtype=torch.float32, device=batch.query.device)

    def run(self, batch: LayerBatch, memory: Tensor, *, weighted: bool = True) -> Offsets:
        """Launches it.

        Args:
            batch: The layers.
            memory: float32, at least `floats` for each layer.
            weighted: Whether to give offsets and masses; else the log-sum-exp stands in the place
                of the offsets.

        Returns:
            Both within `memory`: rows are adjacent, because they are read a tile at a time.
        """
        rows, tables = batch.rows, batch.rows.on_device
        layers, heads, segments = len(batch.layers), rows.num_heads, len(rows.segments)
        count, masses = layers * heads * len(rows), 2 * layers * segments * heads
        first = _aligned(count)
        result = Offsets(
            memory[:count].view(layers, heads, -1),
            memory[first : first + masses].view(layers, segments, heads, 2),
        )
        given, parts, scaled = batch.lse, self._parts, batch.scales is not None
        if given is None:
            lse = result.offsets
            if parts:
                first += _aligned(masses)
                lse = memory[first : first + parts * count].fill_(float("-inf"))
            self._launch(batch, lse)
            given = GivenLse(lse, 0, heads * len(rows), len(rows))
        launch(
            _offsets_kernel,
            (segments, heads, layers),
            *given,
            count,
            max(1, parts),
            tables.log_weights,
            # Without scales the address is not read.
            batch.scales if scaled else tables.log_weights,
            batch.scales_stride,
            batch.table,
            tables.segments,
            *result,
            len(rows),
            GIVEN=batch.lse is not None,
            WEIGHTED=weighted,
            HAS_SCALES=scaled,
            HAS_SINKS=batch.alike.has_sinks,
            COUNT=_JOINED,
            num_warps=4,
        )
        return result

    def _launch(self, batch: LayerBatch, lse: Tensor) -> None:
        """Computes the log-sum-exp to base 2, or its parts ``[parts, layers, H, R]``."""
        assert self.work is not None
        rows = batch.rows
        launch(
            _lse_kernel,
            (len(self.work.items), rows.num_kv_heads, len(batch.layers)),
            *batch.arguments,
            self.work.items,
            lse,
            len(rows),
            rows.num_heads,
            **batch.constants,
            HAS_SINKS=batch.alike.has_sinks,
            QUERIES=self.queries,
            KEYS=self.tile.keys,
            num_warps=self.tile.warps,
            num_stages=self.tile.stages,
            maxnreg=self.tile.registers,
        )


def _aligned(floats: int) -> int:
    """Behind so many numbers an address is again one that kernels are compiled for."""
    return cdiv(floats, 4) * 4


@triton.jit(do_not_specialize=["num_rows", "num_heads"])
def _lse_kernel(
    query,
    stride_layer,
    stride_row,
    stride_head,
    stride_block,
    stride_group,
    stride_slot,
    stride_dim,
    layers,
    segments,
    positions,
    items,
    parts,
    num_rows,
    num_heads,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CACHED: tl.constexpr,
    ALIGNED: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    EIGHT_BIT_QUERY: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    OPERANDS: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Some rows of a segment, all query heads of one key/value head, a part of a layer's keys."""
    item = items + tl.program_id(0) * WORK
    group = tl.program_id(1)
    segment, first_row, last_row = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    first_key, last_key, split = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
    layer, cache, sinks, slopes, scale, soft_cap = load_layer(layers, CACHED, ALIGNED)

    places = tl.arange(0, QUERIES)
    own_rows = first_row + places // SHARED
    heads = group * SHARED + places % SHARED
    valid = own_rows < last_row
    own_positions = tl.load(positions + own_rows, mask=valid, other=-1)
    q = load_queries(
        query + layer * stride_layer,
        stride_row,
        stride_head,
        own_rows,
        heads,
        valid,
        HEAD_DIM,
        PADDED_DIM,
        EIGHT_BIT_QUERY,
    ).to(OPERANDS)
    slope = tl.load(slopes + heads)[:, None] if HAS_ALIBI else 0.0
    unit = unit_of(scale, HAS_CAP, HAS_ALIBI)

    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    if HAS_SINKS:
        if split == 0:
            largest = tl.load(sinks + heads) * LOG2E
            total += 1.0
    table = tl.load(segments + segment * SEGMENT + 7).to(tl.pointer_type(tl.int32))
    # Whole tiles of keys that all rows see need no mask.
    masked_key = first_key
    if WINDOW == 0 and CHUNK == 0 and not HAS_ALIBI:
        seen = tl.minimum(tl.load(positions + first_row) + 1, last_key) - first_key
        masked_key = first_key + tl.maximum(seen, 0) // KEYS * KEYS
    for masked in tl.static_range(2):
        begin = masked_key if masked else first_key
        end = last_key if masked else masked_key
        for start in range(begin, end, KEYS):
            tokens = start + tl.arange(0, KEYS)
            k = load_cached(
                cache,
                table,
                stride_block,
                stride_group,
                stride_slot,
                stride_dim,
                group,
                tokens,
                tokens < last_key if masked else None,
                HEAD_DIM,
                PADDED_DIM,
                BLOCK_SIZE,
                EIGHT_BIT,
            ).to(OPERANDS)
            dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if masked:
                logits = masked_logits(
                    dots,
                    own_positions[:, None],
                    tokens[None, :],
                    slope,
                    scale,
                    soft_cap,
                    WINDOW,
                    CHUNK,
                    HAS_CAP,
                    HAS_ALIBI,
                )
            else:
                logits = shaped_logits(dots, scale, soft_cap, HAS_CAP)
            larger = tl.maximum(largest, tl.max(logits, axis=1) * unit)
            # A row that has seen no key yet has nothing to scale.
            base = tl.where(larger == float("-inf"), 0.0, larger)
            total *= tl.exp2(largest - base)
            total += tl.sum(tl.exp2(logits * unit - base[:, None]), axis=1)
            largest = larger
    lse = largest + tl.log2(tl.where(total == 0, 1.0, total))
    place = split.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    offsets = (place * num_heads + heads) * num_rows + own_rows
    tl.store(parts + offsets, lse, mask=valid)


@triton.jit(
    do_not_specialize=[
        "first",
        "stride_layer",
        "stride_head",
        "stride_part",
        "num_parts",
        "stride_scales",
        "num_rows",
    ]
)
def _offsets_kernel(
    lse,
    first,
    stride_layer,
    stride_head,
    stride_part,
    num_parts,
    log_weights,
    scales,
    stride_scales,
    layers,
    segments,
    offsets,
    masses,
    num_rows,
    GIVEN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """The rows of a segment in a head and layer, parts joined, the one of the first keys first.

    What is given is to base e and lies by the layer's number, what was computed by its place.
    """
    segment, head, in_launch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head_of_launch = in_launch.to(tl.int64) * tl.num_programs(1) + head
    entry = segments + segment * SEGMENT
    first_row, last_row = tl.load(entry + 8).to(tl.int32), tl.load(entry + 9).to(tl.int32)
    layer = tl.load(layers + in_launch * LAYER)
    place = layer if GIVEN else in_launch.to(tl.int64)
    own = lse + first + place * stride_layer + head.to(tl.int64) * stride_head
    sink = 0.0
    if HAS_SINKS:
        sinks = tl.load(layers + in_launch * LAYER + 2).to(tl.pointer_type(tl.float32))
        sink = tl.load(sinks + head) * LOG2E
    weights = tl.zeros([COUNT], tl.float32)
    sunk = tl.zeros([COUNT], tl.float32)
    for begin in range(first_row, last_row, COUNT):
        rows = begin + tl.arange(0, COUNT)
        valid = rows < last_row
        joined = tl.full([COUNT], float("-inf"), tl.float32)
        part = own + rows
        for _ in range(num_parts):
            other = tl.load(part, mask=valid, other=0.0)
            if GIVEN:
                other *= LOG2E
            larger = tl.maximum(joined, other)
            base = tl.where(larger == float("-inf"), 0.0, larger)
            total = tl.exp2(joined - base) + tl.exp2(other - base)
            # Neither part saw a key, or a NaN, which a maximum may drop, came with one.
            found = base + tl.log2(tl.where(total > 0, total, 1.0))
            joined = tl.where(total > 0, found, joined + other)
            part += stride_part
        if WEIGHTED:
            log_weight = tl.load(log_weights + rows, mask=valid, other=float("-inf"))
            if HAS_SCALES:
                own_scales = scales + layer * stride_scales + rows
                log_weight += tl.log2(tl.load(own_scales, mask=valid, other=1.0))
            joined -= log_weight
            weights += tl.exp2(log_weight)
            if HAS_SINKS:
                sunk += tl.where(valid, tl.exp2(sink - joined), 0.0)
        else:
            joined *= LN2
        tl.store(offsets + head_of_launch * num_rows + rows, joined, mask=valid)
    if WEIGHTED:
        in_segment = in_launch.to(tl.int64) * tl.num_programs(0) + segment
        mass = masses + 2 * (in_segment * tl.num_programs(1) + head)
        total_weight = tl.sum(weights, axis=0)
        tl.store(mass, total_weight - tl.sum(sunk, axis=0))
        tl.store(mass + 1, total_weight)
