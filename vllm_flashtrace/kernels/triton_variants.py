"""Compiles every variant of the kernels that traces of a layer can launch, before the first does.

Triton compiles a kernel anew for other constants and types, and for pointers and integers that are
a multiple of 16 or 1 where others were not. What differs between steps and traces must therefore
leave all of that alone, or choose among few variants: the tile of the kernels over attention
follows the number of rows, everything else is the layer's. The host code runs here as it runs for a
trace, on target rows that lead it to each of its choices; nothing is launched, no tensor is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vllm_flashtrace.core.attention import AttentionForm
from vllm_flashtrace.kernels.paged_attention import AttentionInputs
from vllm_flashtrace.kernels.paged_proximity import ProximityLayer, ProximityTrace
from vllm_flashtrace.kernels.target_rows import Accumulators, PagedRows, RowSegment
from vllm_flashtrace.kernels.triton_column_sums import triton_column_sums
from vllm_flashtrace.kernels.triton_proximity import triton_proximities, triton_sum_shares
from vllm_flashtrace.kernels.triton_row_sums import triton_inverse_rms, triton_row_sums

# More rows and more keys than any tile or chunk holds.
_MOST = 256


@dataclass(frozen=True, slots=True, eq=False)
class LayerTensors:
    """What the kernels read of one layer; only types, shapes, strides and addresses matter.

    Attributes:
        query: ``[1, H, d]``, contiguous, of the type in which queries reach the kernels.
        keys: ``[num_blocks, G, block_size, d]``, see `AttentionInputs`.
        values: The same, see `ProximityLayer`.
        stream: ``[1, D]``, contiguous, of the residual stream's type.
        weights: ``W_O`` in every type that traces use, ``[D, H*d]`` each.
        form: How the layer makes logits.
        scaled: Whether the rows' weights have factors of the layer, see `AttentionInputs`.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    stream: Tensor
    weights: Sequence[Tensor]
    form: AttentionForm
    scaled: bool = False


def target_rows_of_every_kind(layer: LayerTensors) -> list[PagedRows]:
    """Target rows that lead the host code to each choice it has; the same for alike layers."""
    rows = [list(range(2**power)) for power in range(_MOST.bit_length())]
    # Keys of few rows, and rows of few keys, are cut into parts.
    rows += [[0, _MOST - 1], [0] * _MOST]
    return [_one_trace(layer, positions) for positions in rows]


def launch_every_variant(layer: LayerTensors, kinds: Sequence[PagedRows]) -> None:
    """Makes every launch that traces of the layer can make; to be called within `compiling`.

    Args:
        layer: The layer.
        kinds: See `target_rows_of_every_kind`.
    """
    heads, (_, hidden) = kinds[0].num_heads, layer.stream.shape
    floats = partial(torch.empty, dtype=torch.float32, device=layer.stream.device)
    for rows in kinds:
        scales = floats(len(rows)) if layer.scaled else None
        inputs = AttentionInputs(layer.query, layer.keys, rows, layer.form, scales)
        triton_column_sums(inputs, 0)
    # With a log-sum-exp that is told, one kernel is another.
    scales = floats(len(kinds[0])) if layer.scaled else None
    told = AttentionInputs(
        layer.query, layer.keys, kinds[0], layer.form, scales, floats(heads, kinds[0].tokens)
    )
    triton_column_sums(told, 0)
    triton_row_sums(kinds[0], 0, residual=layer.stream)
    if layer.scaled:
        scales = floats(len(kinds[0]))
        triton_inverse_rms(kinds[0], layer.stream, 1e-6, scales)
        triton_row_sums(kinds[0], 0, stream=layer.stream, scales=scales)
    else:
        triton_row_sums(kinds[0], 0, residual=layer.stream, stream=layer.stream)
    totals, residual = floats(2, 1, dtype=torch.float64)
    trace = ProximityTrace(
        sums=Accumulators(floats(1, heads, 1), floats(1, hidden), floats(1, hidden)),
        block_table=torch.zeros(1, dtype=torch.int32, device=layer.stream.device),
        totals=totals,
        residual=residual,
    )
    for weight in layer.weights:
        triton_proximities([ProximityLayer(0, layer.values, weight)], [trace])
    triton_sum_shares(trace.sums.column_sums[:, 0], totals, floats(1), keep=False)


def _one_trace(layer: LayerTensors, positions: list[int]) -> PagedRows:
    heads, groups, block_size = layer.query.shape[1], layer.keys.shape[1], layer.keys.shape[2]
    device, count = layer.query.device, len(positions)
    shapes = ((1, heads, _MOST), (1, 1), (1, 1))
    sums = [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
    segment = RowSegment(
        rows=torch.zeros(count, dtype=torch.int64),
        positions=torch.tensor(positions),
        weights=torch.ones(count),
        block_table=torch.zeros(-(-_MOST // block_size), dtype=torch.int32, device=device),
        sums=Accumulators(*sums),
    )
    return PagedRows.build([segment], heads, groups, device)
