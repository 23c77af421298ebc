"""Second pass over attention: weighted column sums from a paged K cache.

A key tile is loaded once and stays for all rows and query heads that see it, and only its program
writes where its sums go. Rows are cut only where there are too few key tiles; the parts are then
added in order. So the same input gives the same bits, of all but the mass, see `RowSegment`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_flashtrace.kernels.paged_attention import AttentionInputs, KeptQueries, LayerKeys
from vllm_flashtrace.kernels.target_rows import touching_sums
from vllm_flashtrace.kernels.triton_lse import FirstPass, Offsets
from vllm_flashtrace.kernels.triton_operands import (
    LAYER,
    LayerBatch,
    launch,
    load_cached,
    load_layer,
    load_queries,
    load_vectors,
    masked_logits,
    shaped_logits,
    unit_of,
    widen,
)
from vllm_flashtrace.kernels.triton_rows import (
    REDUCTION,
    SEGMENT,
    WORK,
    Work,
    next_power_of_2,
)


class Tile(NamedTuple):
    """Keys of a program and rows of a step of it.

    Attributes:
        keys: Keys.
        rows: Rows, a multiple of 16.
        warps: Warps of a program.
        stages: Tiles of queries in flight.
        registers: Of a thread at most; None for no limit of ours.
    """

    keys: int
    rows: int
    warps: int
    stages: int
    registers: int | None = None


# By bytes of an operand and padded head size. Products of float32 come out of registers, of which
# larger tiles would need more than there are. With 168 registers three programs of four warps share
# a multiprocessor of an H100, so that one's products run beside another's exponentials; no more
# than that is needed in the loops over rows. Heads of 256 have no shared memory for a third.
_TILES = {
    (2, 64): Tile(128, 64, 4, 2, 168),
    (2, 128): Tile(128, 64, 4, 2, 168),
    (2, 256): Tile(64, 64, 4, 2),
    (4, 64): Tile(64, 32, 8, 2),
    (4, 128): Tile(32, 32, 8, 2),
    (4, 256): Tile(32, 32, 8, 2),
}
_FEWEST_ROWS = 16


def triton_column_sums(inputs: AttentionInputs, layer: int) -> None:
    """Triton form of `paged_column_sums`."""
    with torch.cuda.device_of(inputs.query):
        batch = LayerBatch.of_one(inputs, layer)
        first, second = FirstPass.plan(batch), SecondPass.plan(batch)
        offsets = first.run(batch, first.buffer(batch))
        second.run(batch, offsets, second.buffer(batch))


def triton_kept_column_sums(kept: KeptQueries, layers: Sequence[LayerKeys]) -> None:
    """Triton form of `add_kept_column_sums`.

    Takes no memory but the room beside the queries, unless that is too little for one layer; where
    it is too little for all layers at once, they take turns.
    """
    rows, begun = kept.rows, False
    with torch.cuda.device_of(kept.queries):
        for batch in LayerBatch.of_kept(kept, layers):
            first, second = FirstPass.plan(batch), SecondPass.plan(batch)
            floats = first.floats(rows)
            of_a_layer = floats + second.floats(rows.num_heads)
            at_once, room = len(kept.room) // of_a_layer, kept.room
            if not at_once:
                at_once, room = 1, kept.room.new_empty(of_a_layer)
            for start in range(0, len(batch.layers), at_once):
                part = batch.part(start, start + at_once)
                # What fails now has not touched the sums only if nothing has before.
                with touching_sums() if begun else nullcontext():
                    end = len(part.layers) * floats
                    second.run(part, first.run(part, room[:end]), room[end:])
                begun = True


class SecondPass(NamedTuple):
    """How the second pass over layers that are alike is cut.

    Attributes:
        rows: Rows of a step of a program.
        tile: The other numbers of its tile.
        work: What there is to do, for each layer.
    """

    rows: int
    tile: Tile
    work: Work

    @classmethod
    def plan(cls, batch: LayerBatch) -> SecondPass:
        """By the target rows and what the layers have in common."""
        rows, tile = batch.rows, _TILES[batch.operands.tile_key]
        row_tile = max(_FEWEST_ROWS, min(tile.rows, next_power_of_2(rows.longest)))
        alike = batch.alike
        work = rows.on_device.key_tiles(tile.keys, row_tile, alike.window, alike.chunk)
        return cls(row_tile, tile, work)

    def floats(self, heads: int) -> int:
        """Numbers that a layer takes: those of each part."""
        return self.work.slots * heads * self.tile.keys

    def buffer(self, batch: LayerBatch) -> Tensor:
        """Memory of its own for all layers."""
        count = len(batch.layers) * self.floats(batch.rows.num_heads)
        return torch.empty(max(1, count), dtype=torch.float32, device=batch.query.device)

    def run(self, batch: LayerBatch, offsets: Offsets, memory: Tensor) -> None:
        """Launches it.

        Args:
            batch: The layers.
            offsets: As `FirstPass.run` gives them.
            memory: float32, at least `floats` for each layer.

        Raises:
            SumsTouchedError: See `paged_column_sums`.
        """
        rows, tables, work = batch.rows, batch.rows.on_device, self.work
        launch(
            _column_sums_kernel,
            (len(work.items), rows.num_kv_heads, len(batch.layers)),
            *batch.arguments,
            *offsets,
            work.items,
            memory,
            len(rows),
            rows.num_heads,
            len(rows.segments),
            work.slots,
            **batch.constants,
            KEYS=self.tile.keys,
            ROWS=self.rows,
            num_warps=self.tile.warps,
            num_stages=self.tile.stages,
            maxnreg=self.tile.registers,
        )
        if work.slots:
            with touching_sums():
                launch(
                    _add_parts_kernel,
                    (len(work.reductions), rows.num_heads, len(batch.layers)),
                    work.reductions,
                    tables.segments,
                    batch.table,
                    memory,
                    work.slots,
                    KEYS=self.tile.keys,
                    num_warps=4,
                )


@triton.jit(do_not_specialize=["num_rows", "num_heads", "num_segments", "num_slots"])
def _column_sums_kernel(
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
    offsets,
    masses,
    items,
    parts,
    num_rows,
    num_heads,
    num_segments,
    num_slots,
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
    OPERANDS: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile of a segment's keys in a layer, all query heads of one key/value head, some rows."""
    item = items + tl.program_id(0) * WORK
    group = tl.program_id(1)
    segment, first_row, last_row = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    first_key, last_key, slot = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
    layer, cache, _, slopes, scale, soft_cap = load_layer(layers, CACHED, ALIGNED)
    query += layer * stride_layer
    entry = segments + segment * SEGMENT
    # Steps need no mask from the first row that sees all keys of the tile to the last whole step.
    full_row = last_row
    if WINDOW == 0 and CHUNK == 0 and not HAS_ALIBI:
        unseen = tl.load(item + 6) - first_row
        full_row = tl.minimum(first_row + tl.cdiv(unseen, ROWS) * ROWS, last_row)
    full_steps = (last_row - full_row) // ROWS
    rest = full_row + full_steps * ROWS
    masked_steps = tl.cdiv(full_row - first_row, ROWS) + tl.cdiv(last_row - rest, ROWS)

    tokens = first_key + tl.arange(0, KEYS)
    in_tile = tokens < last_key
    k = load_cached(
        cache,
        tl.load(entry + 7).to(tl.pointer_type(tl.int32)),
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
    steps = tl.arange(0, ROWS)
    places = steps * stride_row  # In 32 bits, which `load_queries` can't know to be enough.
    for shared in range(SHARED):
        head = group * SHARED + shared
        slope = tl.load(slopes + head) if HAS_ALIBI else 0.0
        in_launch = tl.program_id(2).to(tl.int64) * num_heads + head
        head_offsets = offsets + in_launch * num_rows
        # Rows that one thread has are summed at once, see `_added`, the others at the end.
        sums = tl.zeros([ROWS // 16, 8, KEYS], tl.float32)
        own_query = query + head * stride_head + full_row.to(tl.int64) * stride_row
        own_offsets = head_offsets + full_row
        for _step in range(full_steps):
            stored = load_vectors(own_query, places, 1, None, HEAD_DIM, PADDED_DIM)
            q = widen(stored, EIGHT_BIT_QUERY).to(OPERANDS)
            dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            logits = shaped_logits(dots, scale, soft_cap, HAS_CAP)
            offset = tl.load(own_offsets + steps)
            sums = _added(sums, logits * unit - offset[:, None], ROWS, KEYS)
            own_query += ROWS * stride_row
            own_offsets += ROWS
        for step in range(masked_steps):
            first = first_row + step * ROWS
            own_rows = tl.where(first < full_row, first, rest) + steps
            valid = own_rows < last_row
            q = load_queries(
                query,
                stride_row,
                stride_head,
                own_rows,
                head,
                valid,
                HEAD_DIM,
                PADDED_DIM,
                EIGHT_BIT_QUERY,
            ).to(OPERANDS)
            dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            own_positions = tl.load(positions + own_rows, mask=valid, other=-1)
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
            offset = tl.load(head_offsets + own_rows, mask=valid, other=float("inf"))
            sums = _added(sums, logits * unit - offset[:, None], ROWS, KEYS)
        column_sums = tl.sum(tl.reshape(sums, [ROWS // 2, KEYS]), axis=0)
        _add_to_mass(
            items,
            segments,
            layers,
            masses,
            head,
            num_heads,
            num_segments,
            tl.where(in_tile, column_sums, 0.0),
        )
        if slot < 0:
            _add_to_sums(entry, layer, head, tokens, in_tile, column_sums)
        else:
            place = in_launch * num_slots + slot
            tl.store(parts + place * KEYS + tl.arange(0, KEYS), column_sums)


@triton.jit
def _added(sums, logits, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Adds weights of rows to sums ``[ROWS // 16, 8, KEYS]``; logits to base 2, offsets deducted.

    Of a product of sixteen-bit operands a thread has the rows ``i`` and ``i + 8`` of every sixteen.
    """
    weights = tl.reshape(tl.exp2(logits), [ROWS // 16, 2, 8, KEYS])
    return sums + tl.sum(weights, axis=1)


@triton.jit(do_not_specialize=["num_slots"])
def _add_parts_kernel(reductions, segments, layers, parts, num_slots, KEYS: tl.constexpr):
    """A key tile of one head and layer: adds its parts, the one of the first rows first."""
    reduction = reductions + tl.program_id(0) * REDUCTION
    head = tl.program_id(1)
    segment, first_key, last_key = (
        tl.load(reduction),
        tl.load(reduction + 1),
        tl.load(reduction + 2),
    )
    first_slot, slots = tl.load(reduction + 3), tl.load(reduction + 4)
    layer = tl.load(layers + tl.program_id(2) * LAYER)
    in_launch = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + head
    places = tl.arange(0, KEYS)
    part = parts + (in_launch * num_slots + first_slot) * KEYS + places
    column_sums = tl.zeros([KEYS], tl.float32)
    for _ in range(slots):
        column_sums += tl.load(part)
        part += KEYS
    tokens = first_key + places
    entry = segments + segment * SEGMENT
    _add_to_sums(entry, layer, head, tokens, tokens < last_key, column_sums)


@triton.jit
def _add_to_sums(entry, layer, head, tokens, valid, column_sums):
    """Adds to one head's column sums of a segment; no other program may write to them."""
    address = tl.load(entry).to(tl.pointer_type(tl.float32))
    address += layer * tl.load(entry + 1) + head * tl.load(entry + 2)
    before = tl.load(address + tokens, mask=valid, other=0.0)
    tl.store(address + tokens, before + column_sums, mask=valid)


@triton.jit
def _add_to_mass(items, segments, layers, masses, head, num_heads, num_segments, column_sums):
    """Adds a piece's sums, and with the first piece of a segment what those of all must be.

    It loads all that it needs again: the loops in front of it have no register to spare.
    """
    item = items + tl.program_id(0) * WORK
    segment = tl.load(item)
    entry = segments + segment * SEGMENT
    mass = tl.load(entry + 10)
    if mass != 0:
        layer = tl.load(layers + tl.program_id(2) * LAYER)
        of_head = mass.to(tl.pointer_type(tl.float32)) + layer * tl.load(entry + 11) + 3 * head
        if tl.load(item - WORK, mask=tl.program_id(0) > 0, other=-1) != segment:
            in_segment = tl.program_id(2).to(tl.int64) * num_segments + segment
            expected = masses + 2 * (in_segment * num_heads + head)
            tl.store(of_head, tl.load(of_head) + tl.load(expected))
            tl.store(of_head + 1, tl.load(of_head + 1) + tl.load(expected + 1))
        # In no order, since it only serves a check.
        tl.atomic_add(of_head + 2, tl.sum(column_sums, axis=0))
