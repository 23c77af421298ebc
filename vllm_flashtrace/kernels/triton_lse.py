"""First pass over attention: the log-sum-exp of every target row and head, from a paged K cache.

A query vector is loaded once and stays; a key tile is shared by all query heads of its key/value
head. Few rows over many keys are cut along the keys, and the parts joined in order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_flashtrace.kernels.paged_attention import AttentionInputs
from vllm_flashtrace.kernels.triton_operands import (
    LAYER,
    LN2,
    LOG2E,
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
    """Queries (rows times heads that share a key) and keys of a step of a program."""

    queries: int
    keys: int
    warps: int
    stages: int


# By bytes of an operand and padded head size. Products of float32 come out of registers, of which
# larger tiles would need more than there are.
_TILES = {
    (2, 64): Tile(128, 64, 4, 3),
    (2, 128): Tile(128, 64, 4, 3),
    (2, 256): Tile(64, 32, 4, 2),
    (4, 64): Tile(64, 32, 8, 2),
    (4, 128): Tile(32, 32, 8, 2),
    (4, 256): Tile(32, 32, 8, 2),
}
_FEWEST_QUERIES = 16
_JOINED = 256


def triton_lse(inputs: AttentionInputs) -> Tensor:
    """Triton form of `paged_lse`."""
    with torch.cuda.device_of(inputs.query):
        batch = LayerBatch.of_one(inputs, 0)
        first = FirstPass.plan(batch)
        return first.run(batch, first.buffer(batch), weighted=False)[0].t()


class FirstPass(NamedTuple):
    """How the first pass over layers that are alike is cut.

    Attributes:
        queries: Queries of a program.
        tile: The other numbers of its tile.
        work: What there is to do, for each layer.
    """

    queries: int
    tile: Tile
    work: Work

    @classmethod
    def plan(cls, batch: LayerBatch) -> FirstPass:
        """By the target rows and what the layers have in common."""
        rows, tile = batch.rows, _TILES[batch.operands.tile_key]
        shared = rows.num_heads // rows.num_kv_heads
        queries = next_power_of_2(min(rows.longest * shared, tile.queries))
        queries = max(queries, next_power_of_2(shared), _FEWEST_QUERIES)
        alike = batch.alike
        work = rows.on_device.row_tiles(queries // shared, tile.keys, alike.window, alike.chunk)
        return cls(queries, tile, work)

    def floats(self, rows: int, heads: int) -> int:
        """Numbers that a layer takes at most: the result's, and those of each part."""
        parts = self.work.slots if self.work.slots > 1 else 0
        return _aligned(rows * heads) + _aligned(parts * rows * heads)

    def buffer(self, batch: LayerBatch) -> Tensor:
        """Memory of its own for all layers."""
        rows = batch.rows
        count = len(batch.layers) * self.floats(len(rows), rows.num_heads)
        return torch.empty(count, dtype=torch.float32, device=batch.query.device)

    def run(self, batch: LayerBatch, memory: Tensor, *, weighted: bool = True) -> Tensor:
        """Launches it.

        With ``s_i`` the scale of a row, `weighted` gives offsets of ``w_i s_i alpha_ij``.

        Args:
            batch: The layers.
            memory: float32, at least `floats` for each layer.
            weighted: Whether to give what turns a logit into a weighted attention weight:
                ``w_i alpha_ij = 2 ** (logit_ij / ln 2 - offset_i)``, ``offset = lse / ln 2 -
                log2 w``; else the log-sum-exp.

        Returns:
            float32 ``[layers, H, R]``, within `memory`: rows are adjacent, because they are read a
            tile at a time.
        """
        rows, slots, tables = batch.rows, self.work.slots, batch.rows.on_device
        scaled = batch.scales is not None
        # Without scales the address is not read.
        factors = (batch.scales if scaled else tables.log_weights, batch.scales_stride)
        shape = (len(batch.layers), rows.num_heads, len(rows))
        count = math.prod(shape)
        result = parts = memory[:count].view(shape)
        if slots > 1:
            first = _aligned(count)
            parts = memory[first : first + slots * count].fill_(float("-inf"))
        launch(
            _lse_kernel,
            (len(self.work.items), rows.num_kv_heads, len(batch.layers)),
            *batch.arguments,
            tables.log_weights,
            *factors,
            self.work.items,
            parts,
            len(rows),
            rows.num_heads,
            int(slots > 1),
            **batch.constants,
            HAS_SINKS=batch.alike.has_sinks,
            WEIGHTED=weighted,
            HAS_SCALES=scaled,
            QUERIES=self.queries,
            KEYS=self.tile.keys,
            num_warps=self.tile.warps,
            num_stages=self.tile.stages,
        )
        if slots > 1:
            launch(
                _join_kernel,
                (cdiv(count, _JOINED),),
                parts,
                tables.log_weights,
                *factors,
                batch.table,
                result,
                count,
                len(rows),
                rows.num_heads,
                slots,
                WEIGHTED=weighted,
                HAS_SCALES=scaled,
                COUNT=_JOINED,
                num_warps=4,
            )
        return result


def _aligned(floats: int) -> int:
    """Behind so many numbers an address is again one that kernels are compiled for."""
    return cdiv(floats, 4) * 4


@triton.jit
def _finished(lse, log_weight, WEIGHTED: tl.constexpr):
    """What a log-sum-exp to base 2 is handed out as."""
    return lse - log_weight if WEIGHTED else lse * LN2


@triton.jit(do_not_specialize=["stride_scales", "num_rows", "num_heads", "is_part"])
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
    log_weights,
    scales,
    stride_scales,
    items,
    parts,
    num_rows,
    num_heads,
    is_part,
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
    WEIGHTED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
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
                tokens < last_key,
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
    if is_part == 0:
        log_weight = tl.load(log_weights + own_rows, mask=valid, other=0.0)
        if HAS_SCALES:
            own_scales = scales + layer * stride_scales + own_rows
            log_weight += tl.log2(tl.load(own_scales, mask=valid, other=1.0))
        lse = _finished(lse, log_weight, WEIGHTED)
    place = split.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    offsets = (place * num_heads + heads) * num_rows + own_rows
    tl.store(parts + offsets, lse, mask=valid)


@triton.jit(do_not_specialize=["stride_scales", "count", "num_rows", "num_heads", "num_parts"])
def _join_kernel(
    parts,
    log_weights,
    scales,
    stride_scales,
    layers,
    result,
    count,
    num_rows,
    num_heads,
    num_parts,
    WEIGHTED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Joins the parts of some rows, heads and layers, the one of the first keys first."""
    places = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    valid = places < count
    part = parts + places
    lse = tl.full([COUNT], float("-inf"), tl.float32)
    for _ in range(num_parts):
        other = tl.load(part, mask=valid, other=0.0)
        larger = tl.maximum(lse, other)
        base = tl.where(larger == float("-inf"), 0.0, larger)
        total = tl.exp2(lse - base) + tl.exp2(other - base)
        # Neither part saw a key, or a NaN, which a maximum may drop, came with one.
        lse = tl.where(total > 0, base + tl.log2(tl.where(total > 0, total, 1.0)), lse + other)
        part += count
    row = places % num_rows
    log_weight = tl.load(log_weights + row, mask=valid, other=0.0)
    if HAS_SCALES:
        in_launch = places // num_rows // num_heads
        layer = tl.load(layers + in_launch * LAYER, mask=valid, other=0)
        log_weight += tl.log2(tl.load(scales + layer * stride_scales + row, mask=valid, other=1.0))
    tl.store(result + places, _finished(lse, log_weight, WEIGHTED), mask=valid)
