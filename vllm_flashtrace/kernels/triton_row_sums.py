"""Weighted sums of the residual stream over target rows, on the GPU.

Only one program adds to a coordinate of a segment's sum; many rows are summed in chunks whose parts
are then added in order. So the same input gives the same bits.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_flashtrace.kernels.target_rows import PagedRows, touching_sums
from vllm_flashtrace.kernels.triton_operands import as_compiled_for, launch
from vllm_flashtrace.kernels.triton_rows import REDUCTION, SUMS, WORK

_CHUNK_ROWS, _ROWS, _COLUMNS = 128, 16, 128

# Where a segment's entry of `SUMS` holds an address and a layer stride.
_PLACE = {"residual": 3, "stream": 5}


def triton_row_sums(
    residual: Tensor, rows: PagedRows, layer: int, to: Literal["residual", "stream"]
) -> None:
    """Triton form of `paged_attention.add_row_sums`."""
    residual = as_compiled_for(residual)
    hidden = residual.shape[1]
    with torch.cuda.device_of(residual):
        tables = rows.on_device
        work = tables.row_chunks(_CHUNK_ROWS)
        parts = tables.weights.new_empty(max(1, work.slots), hidden)
        columns = triton.cdiv(hidden, _COLUMNS)
        launch(
            _row_sums_kernel,
            (len(work.items), columns),
            residual,
            *residual.stride(),
            tables.rows,
            tables.weights,
            work.items,
            tables.sums,
            parts,
            hidden,
            layer,
            _PLACE[to],
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            num_warps=4,
        )
        if work.slots:
            with touching_sums():
                launch(
                    _add_parts_kernel,
                    (len(work.reductions), columns),
                    work.reductions,
                    tables.sums,
                    parts,
                    hidden,
                    layer,
                    _PLACE[to],
                    COLUMNS=_COLUMNS,
                    num_warps=4,
                )


@triton.jit(do_not_specialize=["layer", "place"])
def _row_sums_kernel(
    residual,
    stride_token,
    stride_column,
    rows,
    weights,
    items,
    sums,
    parts,
    hidden,
    layer,
    place,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some rows of a segment and some coordinates."""
    item = items + tl.program_id(0) * WORK
    segment, first_row, last_row = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    slot = tl.load(item + 5)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < hidden
    added = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(first_row, last_row, ROWS):
        own_rows = first + tl.arange(0, ROWS)
        valid = own_rows < last_row
        places = tl.load(rows + own_rows, mask=valid, other=0).to(tl.int64) * stride_token
        offsets = places[:, None] + columns[None, :] * stride_column
        x = tl.load(residual + offsets, mask=valid[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weights + own_rows, mask=valid, other=0.0)
        added += x.to(tl.float32) * weight[:, None]
    row_sums = tl.sum(added, axis=0)
    if slot < 0:
        _add_to_sums(sums, segment, layer, columns, inside, row_sums, place)
    else:
        tl.store(parts + slot.to(tl.int64) * hidden + columns, row_sums, mask=inside)


@triton.jit(do_not_specialize=["layer", "place"])
def _add_parts_kernel(reductions, sums, parts, hidden, layer, place, COLUMNS: tl.constexpr):
    """Some coordinates of a segment: adds its parts, the one of the first rows first."""
    reduction = reductions + tl.program_id(0) * REDUCTION
    segment = tl.load(reduction)
    first_slot, slots = tl.load(reduction + 3), tl.load(reduction + 4)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < hidden
    part = parts + first_slot.to(tl.int64) * hidden + columns
    row_sums = tl.zeros([COLUMNS], tl.float32)
    for _ in range(slots):
        row_sums += tl.load(part, mask=inside, other=0.0)
        part += hidden
    _add_to_sums(sums, segment, layer, columns, inside, row_sums, place)


@triton.jit
def _add_to_sums(sums, segment, layer, columns, valid, row_sums, place):
    entry = sums + segment * SUMS + place
    address = tl.load(entry).to(tl.pointer_type(tl.float32)) + layer * tl.load(entry + 1)
    before = tl.load(address + columns, mask=valid, other=0.0)
    tl.store(address + columns, before + row_sums, mask=valid)
