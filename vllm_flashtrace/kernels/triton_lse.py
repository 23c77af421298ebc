"""First pass over attention: the log-sum-exp of every target row and head, from a paged K cache.

A query vector is loaded once and stays; a key tile is shared by all query heads of its key/value
head. Few rows over many keys are cut along the keys, and the parts joined in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_flashtrace.kernels.paged_attention import AttentionInputs
from vllm_flashtrace.kernels.triton_operands import (
    LN2,
    LOG2E,
    Operands,
    attention_arguments,
    attention_constants,
    launch,
    load_cached,
    load_queries,
    masked_logits,
    shaped_logits,
    unit_of,
    window_of,
)
from vllm_flashtrace.kernels.triton_rows import WORK


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
    return _launch(inputs, weighted=False).t()


def row_offsets(inputs: AttentionInputs) -> Tensor:
    """What turns a logit into a weighted attention weight: ``lse / ln 2 - log2 w``.

    Returns:
        float32 ``[H, R]``, contiguous: ``w_i alpha_ij = 2 ** (logit_ij / ln 2 - offset_i)``.
    """
    return _launch(inputs, weighted=True)


def _launch(inputs: AttentionInputs, *, weighted: bool) -> Tensor:
    """``[H, R]``: rows are adjacent, because they are read a tile at a time."""
    query, rows, form = inputs.query, inputs.rows, inputs.form
    operands = Operands.of_attention(inputs)
    tile = _TILES[operands.tile_key]
    shared = rows.num_heads // rows.num_kv_heads
    longest = max(len(segment.rows) for segment in rows.segments)
    queries = triton.next_power_of_2(min(longest * shared, tile.queries))
    queries = max(queries, triton.next_power_of_2(shared), _FEWEST_QUERIES)
    with torch.cuda.device_of(query):
        tables = rows.on_device
        work = tables.row_tiles(queries // shared, tile.keys, window_of(form))
        result = query.new_empty(rows.num_heads, len(rows), dtype=torch.float32)
        parts = result
        if work.slots > 1:
            parts = result.new_full((work.slots, *result.shape), float("-inf"))
        launch(
            _lse_kernel,
            (len(work.items), rows.num_kv_heads),
            *attention_arguments(inputs),
            tables.log_weights if form.sinks is None else form.sinks,
            tables.log_weights,
            work.items,
            parts,
            len(rows),
            rows.num_heads,
            int(work.slots > 1),
            **attention_constants(inputs, operands),
            HAS_SINKS=form.sinks is not None,
            WEIGHTED=weighted,
            QUERIES=queries,
            KEYS=tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if work.slots > 1:
            launch(
                _join_kernel,
                (triton.cdiv(result.numel(), _JOINED),),
                parts,
                tables.log_weights,
                result,
                result.numel(),
                len(rows),
                work.slots,
                WEIGHTED=weighted,
                COUNT=_JOINED,
                num_warps=4,
            )
        return result


@triton.jit
def _finished(lse, log_weight, WEIGHTED: tl.constexpr):
    """What a log-sum-exp to base 2 is handed out as."""
    return lse - log_weight if WEIGHTED else lse * LN2


@triton.jit(do_not_specialize=["num_rows", "num_heads", "is_part"])
def _lse_kernel(
    query,
    stride_token,
    stride_head,
    stride_query_dim,
    cache,
    stride_block,
    stride_group,
    stride_slot,
    stride_dim,
    block_tables,
    stride_table,
    rows,
    positions,
    slopes,
    scale,
    soft_cap,
    sinks,
    log_weights,
    items,
    parts,
    num_rows,
    num_heads,
    is_part,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    EIGHT_BIT_QUERY: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    OPERANDS: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Some rows of a segment, all query heads of one key/value head, a part of the keys."""
    item = items + tl.program_id(0) * WORK
    group = tl.program_id(1)
    segment, first_row, last_row = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    first_key, last_key, split = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)

    places = tl.arange(0, QUERIES)
    own_rows = first_row + places // SHARED
    heads = group * SHARED + places % SHARED
    valid = own_rows < last_row
    own_positions = tl.load(positions + own_rows, mask=valid, other=-1)
    q = load_queries(
        query,
        stride_token,
        stride_head,
        stride_query_dim,
        tl.load(rows + own_rows, mask=valid, other=0),
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
    table = block_tables + segment.to(tl.int64) * stride_table
    # Whole tiles of keys that all rows see need no mask.
    masked_key = first_key
    if WINDOW == 0 and not HAS_ALIBI:
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
                distances = own_positions[:, None] - tokens[None, :]
                logits = masked_logits(
                    dots, distances, slope, scale, soft_cap, WINDOW, HAS_CAP, HAS_ALIBI
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
        lse = _finished(lse, log_weight, WEIGHTED)
    offsets = (split.to(tl.int64) * num_heads + heads) * num_rows + own_rows
    tl.store(parts + offsets, lse, mask=valid)


@triton.jit(do_not_specialize=["count", "num_rows", "num_parts"])
def _join_kernel(
    parts,
    log_weights,
    result,
    count,
    num_rows,
    num_parts,
    WEIGHTED: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Joins the parts of some rows and heads, the one of the first keys first."""
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
    log_weight = tl.load(log_weights + places % num_rows, mask=valid, other=0.0)
    tl.store(result + places, _finished(lse, log_weight, WEIGHTED), mask=valid)
