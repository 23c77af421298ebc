"""Second pass over attention: weighted column sums from a paged K cache.

A key tile is loaded once and stays for all rows and query heads that see it, and only its program
writes where its sums go. Rows are cut only where there are too few key tiles; the parts are then
added in order. So the same input gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_flashtrace.kernels.paged_attention import AttentionInputs
from vllm_flashtrace.kernels.target_rows import touching_sums
from vllm_flashtrace.kernels.triton_operands import (
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
from vllm_flashtrace.kernels.triton_rows import REDUCTION, SUMS, WORK


class Tile(NamedTuple):
    """Keys of a program and rows of a step of it."""

    keys: int
    rows: int
    warps: int
    stages: int


# By bytes of an operand and padded head size. Products of float32 come out of registers, of which
# larger tiles would need more than there are.
_TILES = {
    (2, 64): Tile(128, 64, 4, 3),
    (2, 128): Tile(128, 64, 4, 3),
    (2, 256): Tile(64, 64, 4, 2),
    (4, 64): Tile(64, 32, 8, 2),
    (4, 128): Tile(32, 32, 8, 2),
    (4, 256): Tile(32, 32, 8, 2),
}
_FEWEST_ROWS = 16


def triton_column_sums(inputs: AttentionInputs, layer: int, offsets: Tensor) -> None:
    """Triton form of `paged_column_sums`.

    Args:
        inputs: The layer's tensors.
        layer: Layer of the accumulators.
        offsets: float32 ``[H, R]``, as `triton_lse.row_offsets` gives them.
    """
    query, rows = inputs.query, inputs.rows
    operands = Operands.of_attention(inputs)
    tile = _TILES[operands.tile_key]
    longest = max(len(segment.rows) for segment in rows.segments)
    row_tile = max(_FEWEST_ROWS, min(tile.rows, triton.next_power_of_2(longest)))
    with torch.cuda.device_of(query):
        tables = rows.on_device
        work = tables.key_tiles(tile.keys, row_tile, window_of(inputs.form))
        parts = offsets.new_empty(max(1, work.slots), rows.num_heads, tile.keys)
        launch(
            _column_sums_kernel,
            (len(work.items), rows.num_kv_heads),
            *attention_arguments(inputs),
            offsets,
            work.items,
            tables.sums,
            parts,
            layer,
            len(rows),
            rows.num_heads,
            **attention_constants(inputs, operands),
            KEYS=tile.keys,
            ROWS=row_tile,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if work.slots:
            with touching_sums():
                launch(
                    _add_parts_kernel,
                    (len(work.reductions), rows.num_heads),
                    work.reductions,
                    tables.sums,
                    parts,
                    layer,
                    KEYS=tile.keys,
                    num_warps=4,
                )


@triton.jit(do_not_specialize=["layer", "num_rows", "num_heads"])
def _column_sums_kernel(
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
    offsets,
    items,
    sums,
    parts,
    layer,
    num_rows,
    num_heads,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    EIGHT_BIT_QUERY: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    OPERANDS: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile of a segment's keys, all query heads of one key/value head, some rows."""
    item = items + tl.program_id(0) * WORK
    group = tl.program_id(1)
    segment, first_row, last_row = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    first_key, last_key, slot = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
    # Rows from here on see all keys of the tile and need no mask.
    full_row = last_row
    if WINDOW == 0 and not HAS_ALIBI:
        unseen = tl.load(item + 6) - first_row
        full_row = tl.minimum(first_row + tl.cdiv(unseen, ROWS) * ROWS, last_row)

    tokens = first_key + tl.arange(0, KEYS)
    in_tile = tokens < last_key
    k = load_cached(
        cache,
        block_tables + segment.to(tl.int64) * stride_table,
        stride_block,
        stride_group,
        stride_slot,
        stride_dim,
        group,
        tokens,
        in_tile,
        HEAD_DIM,
        PADDED_DIM,
        BLOCK_SIZE,
        EIGHT_BIT,
    ).to(OPERANDS)
    unit = unit_of(scale, HAS_CAP, HAS_ALIBI)
    for shared in range(SHARED):
        head = group * SHARED + shared
        slope = tl.load(slopes + head) if HAS_ALIBI else 0.0
        head_offsets = offsets + head.to(tl.int64) * num_rows
        # Summed over rows only at the end: the tile's sums stay where its products are.
        added = tl.zeros([KEYS, ROWS], tl.float32)
        for masked in tl.static_range(2):
            begin = first_row if masked else full_row
            end = full_row if masked else last_row
            for first in range(begin, end, ROWS):
                own_rows = first + tl.arange(0, ROWS)
                valid = own_rows < last_row
                q = load_queries(
                    query,
                    stride_token,
                    stride_head,
                    stride_query_dim,
                    tl.load(rows + own_rows, mask=valid, other=0),
                    head,
                    valid,
                    HEAD_DIM,
                    PADDED_DIM,
                    EIGHT_BIT_QUERY,
                ).to(OPERANDS)
                dots = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                if masked:
                    own_positions = tl.load(positions + own_rows, mask=valid, other=-1)
                    distances = own_positions[None, :] - tokens[:, None]
                    logits = masked_logits(
                        dots, distances, slope, scale, soft_cap, WINDOW, HAS_CAP, HAS_ALIBI
                    )
                else:
                    logits = shaped_logits(dots, scale, soft_cap, HAS_CAP)
                offset = tl.load(head_offsets + own_rows, mask=valid, other=float("inf"))
                added += tl.exp2(logits * unit - offset[None, :])
        column_sums = tl.sum(added, axis=1)
        if slot < 0:
            _add_to_sums(sums, segment, layer, head, tokens, in_tile, column_sums)
        else:
            place = (slot.to(tl.int64) * num_heads + head) * KEYS
            tl.store(parts + place + tl.arange(0, KEYS), column_sums)


@triton.jit(do_not_specialize=["layer"])
def _add_parts_kernel(reductions, sums, parts, layer, KEYS: tl.constexpr):
    """A key tile of one head: adds its parts, the one of the first rows first."""
    reduction = reductions + tl.program_id(0) * REDUCTION
    head = tl.program_id(1)
    segment, first_key, last_key = (
        tl.load(reduction),
        tl.load(reduction + 1),
        tl.load(reduction + 2),
    )
    first_slot, slots = tl.load(reduction + 3), tl.load(reduction + 4)
    num_heads = tl.num_programs(1)
    places = tl.arange(0, KEYS)
    part = parts + (first_slot.to(tl.int64) * num_heads + head) * KEYS + places
    column_sums = tl.zeros([KEYS], tl.float32)
    for _ in range(slots):
        column_sums += tl.load(part)
        part += num_heads * KEYS
    tokens = first_key + places
    _add_to_sums(sums, segment, layer, head, tokens, tokens < last_key, column_sums)


@triton.jit
def _add_to_sums(sums, segment, layer, head, tokens, valid, column_sums):
    """Adds to one head's column sums of a segment; no other program may write to them."""
    entry = sums + segment * SUMS
    address = tl.load(entry).to(tl.pointer_type(tl.float32))
    address += layer * tl.load(entry + 1) + head * tl.load(entry + 2)
    before = tl.load(address + tokens, mask=valid, other=0.0)
    tl.store(address + tokens, before + column_sums, mask=valid)
