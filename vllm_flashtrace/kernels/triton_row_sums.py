"""Weighted sums of the residual stream over target rows, and their sizes, on the GPU.

One program sums all rows of a segment for its coordinates, in order, and only it adds to them. So
the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_flashtrace.kernels.target_rows import PagedRows
from vllm_flashtrace.kernels.triton_operands import as_compiled_for, launch
from vllm_flashtrace.kernels.triton_rows import SEGMENT, cdiv

# Few coordinates make many programs; many rows at a time keep memory busy.
_ROWS, _COLUMNS = 64, 32

# Coordinates of a row that are squared at a time.
_COLUMNS_AT_ONCE = 1024

# Where a segment's entry of `SEGMENT` holds an address and a layer stride.
_RESIDUAL, _STREAM = tl.constexpr(3), tl.constexpr(5)


def triton_inverse_rms(rows: PagedRows, vectors: Tensor, epsilon: float, out: Tensor) -> None:
    """Triton form of `paged_attention.inverse_rms`; one launch."""
    vectors = as_compiled_for(vectors)
    with torch.cuda.device_of(vectors):
        launch(
            _inverse_rms_kernel,
            (len(rows),),
            vectors,
            vectors.stride(0),
            rows.on_device.rows,
            out,
            vectors.shape[1],
            float(epsilon),
            COLUMNS=_COLUMNS_AT_ONCE,
            num_warps=4,
        )


def triton_row_sums(
    rows: PagedRows,
    layer: int,
    *,
    residual: Tensor | None = None,
    stream: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    """Triton form of `paged_attention.add_row_sums`; one launch."""
    given = [as_compiled_for(x) for x in (residual, stream) if x is not None]
    hidden = given[0].shape[1]
    with torch.cuda.device_of(given[0]):
        tables = rows.on_device
        launch(
            _row_sums_kernel,
            (len(rows.segments), cdiv(hidden, _COLUMNS)),
            given[0],
            given[0].stride(0),
            given[-1],
            given[-1].stride(0),
            tables.rows,
            tables.weights,
            tables.weights if scales is None else as_compiled_for(scales),
            tables.segments,
            hidden,
            layer,
            int(residual is None),
            BOTH=len(given) == 2,
            HAS_SCALES=scales is not None,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["layer", "to_stream"])
def _row_sums_kernel(
    stream,
    stride_token,
    other,
    stride_other,
    rows,
    weights,
    scales,
    segments,
    hidden,
    layer,
    to_stream,
    BOTH: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some coordinates of a segment's sum ``r`` or ``x``; of both, of two streams."""
    entry = segments + tl.program_id(0) * SEGMENT
    first_row, last_row = tl.load(entry + 8).to(tl.int32), tl.load(entry + 9).to(tl.int32)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < hidden
    added = tl.zeros([ROWS, COLUMNS], tl.float32)
    added_other = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(first_row, last_row, ROWS):
        own_rows = first + tl.arange(0, ROWS)
        valid = own_rows < last_row
        weight = tl.load(weights + own_rows, mask=valid, other=0.0)[:, None]
        if HAS_SCALES:
            weight *= tl.load(scales + own_rows, mask=valid, other=0.0)[:, None]
        places = tl.load(rows + own_rows, mask=valid, other=0).to(tl.int64)[:, None]
        mask = valid[:, None] & inside[None, :]
        x = tl.load(stream + places * stride_token + columns[None, :], mask=mask, other=0.0)
        if BOTH:
            y = tl.load(other + places * stride_other + columns[None, :], mask=mask, other=0.0)
            added_other += y.to(tl.float32) * weight
        added += x.to(tl.float32) * weight
    if BOTH:
        _add_to_sums(entry + _RESIDUAL, layer, columns, inside, tl.sum(added, axis=0))
        _add_to_sums(entry + _STREAM, layer, columns, inside, tl.sum(added_other, axis=0))
    else:
        place = _RESIDUAL + to_stream * (_STREAM - _RESIDUAL)
        _add_to_sums(entry + place, layer, columns, inside, tl.sum(added, axis=0))


@triton.jit
def _inverse_rms_kernel(
    vectors, stride_token, rows, result, hidden, epsilon, COLUMNS: tl.constexpr
):
    """One row."""
    row = tl.program_id(0)
    vectors += tl.load(rows + row).to(tl.int64) * stride_token
    squares = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, hidden, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        x = tl.load(vectors + columns, mask=columns < hidden, other=0.0).to(tl.float32)
        squares += x * x
    mean = tl.sum(squares, axis=0) / hidden
    tl.store(result + row, 1 / tl.sqrt(mean + epsilon))


@triton.jit
def _add_to_sums(entry, layer, columns, valid, row_sums):
    address = tl.load(entry).to(tl.pointer_type(tl.float32)) + layer * tl.load(entry + 1)
    before = tl.load(address + columns, mask=valid, other=0.0)
    tl.store(address + columns, before + row_sums, mask=valid)
