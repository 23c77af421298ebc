"""Target rows of traces that are recorded in one call, and what is done with them in each layer.

`RowGroup`        adds them to the sums of any number of traces
`KeptGroup`       keeps those of one trace as they are, see `KeptRows`
`HeadsGroup`, `KeptHeadsGroup`   the same of attention alone, for weights of heads
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.kernels import (
    KeptQueries,
    PagedRows,
    RowSegment,
    add_row_sums,
    touching_sums,
)
from vllm_flashtrace.kernels.paged_attention import check_lse
from vllm_flashtrace.worker.clock import Clock, Pieces
from vllm_flashtrace.worker.kept_rows import KeptRows, row_factors
from vllm_flashtrace.worker.recorded_trace import Trace
from vllm_flashtrace.worker.step_rows import BatchRow, StepRows
from vllm_flashtrace.worker.traced_model import TracedModel


@dataclass(frozen=True, slots=True)
class Segment:
    """A trace's target rows within a step."""

    trace: Trace
    batch_row: BatchRow
    row_segment: RowSegment


def row_group(segments: list[Segment], model: TracedModel) -> RowGroup:
    """Readies segments for recording: of traces that keep rows one, or any number of others."""
    rows = model.plan_rows([segment.row_segment for segment in segments])
    kept, heads = segments[0].trace.rows, segments[0].trace.spec.heads
    if kept is None and heads:
        return HeadsGroup(segments, rows, model.clock)
    if kept is None:
        scales = None
        if model.normed:
            scales = _new_scales(model.shape.num_layers, len(rows), model.device)
        return RowGroup(segments, rows, model.clock, scales, _unscaled(segments, model))
    [segment] = segments
    return (KeptHeadsGroup if heads else KeptGroup)(segment, rows, model.clock, kept)


def _unscaled(segments: Sequence[Segment], model: TracedModel) -> RowGroup | None:
    """Those whose column sums are also added up without factors on the weights, or None."""
    own = [
        replace(segment, row_segment=replace(segment.row_segment, sums=sums, mass=None))
        for segment in segments
        if (sums := segment.trace.unscaled) is not None
    ]
    if not own:
        return None
    rows = model.plan_rows([segment.row_segment for segment in own])
    return RowGroup(own, rows, model.clock)


class RowGroup(StepRows):
    """Segments that are recorded in one call.

    Attributes:
        segments: The segments.
        scales: float32 ``[L, R]``, the factors on the rows' weights that layers have, where their
            blocks are normed; else None. Four bytes a row and layer.
        waiting: ``[R, H, d]``, a layer's queries that wait for these factors, or None.
        waiting_lse: float32 ``[H, R]``, their log-sum-exp, if it was told.
        gates: float32 ``[H, R]`` or ``[H, d, R]``, the gates of the layer that is being recorded,
            see `OutputGate`, or None.
        unscaled: Those whose column sums are also wanted without the factors, see `Trace`.
    """

    def __init__(
        self,
        segments: list[Segment],
        rows: PagedRows,
        clock: Clock,
        scales: Tensor | None = None,
        unscaled: RowGroup | None = None,
    ) -> None:
        """Begins to time their recording."""
        super().__init__(rows, [segment.batch_row.block_tables for segment in segments])
        self.segments = segments
        self.scales = scales
        self.waiting: Tensor | None = None
        self.waiting_lse: Tensor | None = None
        self.gates: Tensor | None = None
        self.unscaled = unscaled
        self._clock = clock
        self._pieces = Pieces(clock)
        for segment in segments:
            segment.trace.recording.include(self._pieces)

    def run(self, add: Callable[[RowGroup], None], timed: bool) -> None:
        """Calls ``add`` with the group, and counts the time if it returns and is to be timed."""
        if not timed:
            add(self)
            return
        began = self._clock.mark()
        add(self)
        self._pieces.add(began, self._clock.mark())

    def keep(self, kept: KeptQueries | None) -> None:
        """Lets queries wait for the end of the step."""
        self.kept = kept
        if kept is not None:
            kept.scales = self.scales

    def take_over(self, group: RowGroup, index: int) -> None:
        """Goes on alone with one segment of a group, from where the group is."""
        if self.scales is not None and group.scales is not None:
            self.scales.copy_(group.rows.of_segment(group.scales, index))
        if group.gates is not None:
            self.gates = group.rows.of_segment(group.gates, index)
        if group.waiting is not None:
            first = group.rows.first_row(index)
            self.waiting = group.waiting[first : first + len(self.rows)]
        if group.waiting_lse is not None:
            self.waiting_lse = group.rows.of_segment(group.waiting_lse, index)
        if group.kept is not None:
            self.keep(group.kept.of_segment(index, self.rows))

    def take_gates(self, model: TracedModel, layer: int, hidden_states: Tensor) -> None:
        """Computes the gates with which the layer's column sums are added."""
        self.gates = model.row_gates(layer, self.rows, hidden_states)

    def add_attention(
        self, model: TracedModel, layer: int, query: Tensor, lse: Tensor | None
    ) -> None:
        """Adds a layer's column sums, or lets its queries wait for what else they need."""
        heads = model.heads_of(layer, query)
        if self.unscaled is None:
            self._add_attention(model, layer, heads, lse)
            return
        model.add_column_sums(layer, heads, self.unscaled, self.unscaled.rows, None, lse)
        with touching_sums():
            self._add_attention(model, layer, heads, lse)

    def _add_attention(
        self, model: TracedModel, layer: int, heads: Tensor, lse: Tensor | None
    ) -> None:
        if self.kept is not None and self.kept.keep(layer, heads, lse):
            return
        if self.scales is None:
            model.add_column_sums(layer, heads, self, self.rows, self.gates, lse)
        else:  # The memory of the step's queries may be used again before the block has run.
            self.waiting = _picked(heads, self.rows)
            self.waiting_lse = None if lse is None else lse.index_select(1, self.rows.places)

    def scale_rows(self, model: TracedModel, layer: int, output: Tensor) -> None:
        """Finds the rows' factors in a layer, and adds the column sums that wait for them."""
        assert self.scales is not None
        scales = _of_layer(self.scales, layer)
        model.row_scales(layer, self.rows, output, scales)
        if self.waiting is not None:
            factors = row_factors(scales, self.gates)
            rows, lse = self.rows.in_a_row, self.waiting_lse
            model.add_column_sums(layer, self.waiting, self, rows, factors, lse)
            self.waiting = self.waiting_lse = None

    def add_block(self, layer: int, output: Tensor) -> None:
        """Adds what a block gives to the norm behind it."""
        assert self.scales is not None
        self.add_rows(layer, stream=output, scales=_of_layer(self.scales, layer))

    def add_rows(
        self,
        layer: int,
        *,
        residual: Tensor | None = None,
        stream: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        """See `kernels.add_row_sums`."""
        add_row_sums(self.rows, layer, residual=residual, stream=stream, scales=scales)

    def add_kept_rows(self, kept: KeptRows) -> None:
        """Adds the stream of kept rows, with the weights of a hop, to the sums of all layers."""
        for layer, (residual, stream) in enumerate(zip(kept.residual, kept.stream, strict=True)):
            if kept.scales is None:
                self.add_rows(layer, residual=residual, stream=stream)
            else:
                self.add_rows(layer, residual=residual)
                self.add_rows(layer, stream=stream, scales=kept.scales_of(layer, self.rows))


class KeptGroup(RowGroup):
    """A segment whose rows are kept as they are, see `KeptRows`; nothing is added yet."""

    def __init__(self, segment: Segment, rows: PagedRows, clock: Clock, kept: KeptRows) -> None:
        """As `RowGroup`."""
        super().__init__([segment], rows, clock)
        self._kept = kept
        self._place = kept.place_of(segment.row_segment.positions)

    def take_gates(self, model: TracedModel, layer: int, hidden_states: Tensor) -> None:
        """Keeps the gates."""
        assert self._kept.gates is not None
        gates = model.row_gates(layer, self.rows, hidden_states)
        self._kept.gates[layer, ..., self._place] = gates

    def add_attention(
        self, model: TracedModel, layer: int, query: Tensor, lse: Tensor | None
    ) -> None:
        """Keeps the queries, and their log-sum-exp."""
        self._keep(self._kept.queries, layer, model.heads_of(layer, query))
        if self._kept.lse is None:
            return
        if lse is None:
            self._kept.lse_told = False
        else:
            check_lse(lse, self.rows)
            where = self.rows.adjacent
            picked = lse[:, self.rows.places if where is None else where]
            self._kept.lse[layer, :, self._place] = picked

    def scale_rows(self, model: TracedModel, layer: int, output: Tensor) -> None:
        """Keeps the rows' factors."""
        assert self._kept.scales is not None
        # Where they are kept need not be an address that kernels are compiled for.
        scales = torch.empty(len(self.rows), dtype=torch.float32, device=output.device)
        model.row_scales(layer, self.rows, output, scales)
        _of_layer(self._kept.scales, layer)[self._place] = scales

    def add_block(self, layer: int, output: Tensor) -> None:
        """Keeps what the block gives to the norm behind it."""
        self._keep(self._kept.stream, layer, output)

    def add_rows(
        self,
        layer: int,
        *,
        residual: Tensor | None = None,
        stream: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        """Keeps the rows of the stream."""
        if residual is not None:
            self._keep(self._kept.residual, layer, residual)
        if stream is not None:
            self._keep(self._kept.stream, layer, stream)

    def _keep(self, kept: Tensor, layer: int, rows: Tensor) -> None:
        where = self.rows.adjacent
        kept[layer, self._place] = rows[self.rows.places if where is None else where]


class _AttentionAlone:
    """Of traces with `TraceSpec.heads`: no factors on the weights of rows, and no stream."""

    def take_gates(self, model: TracedModel, layer: int, hidden_states: Tensor) -> None:
        """See `RowGroup`."""

    def scale_rows(self, model: TracedModel, layer: int, output: Tensor) -> None:
        """See `RowGroup`."""

    def add_block(self, layer: int, output: Tensor) -> None:
        """See `RowGroup`."""

    def add_rows(self, layer: int, **rows: Tensor | None) -> None:
        """See `RowGroup`."""


class HeadsGroup(_AttentionAlone, RowGroup):
    """Segments of whose rows nothing but the attention is recorded."""


class KeptHeadsGroup(_AttentionAlone, KeptGroup):
    """A segment of whose rows the queries are kept, and nothing else."""


def _of_layer(scales: Tensor | None, layer: int) -> Tensor:
    if scales is None:
        raise TraceError("recording_failed", "the norm behind a block was not expected")
    return scales[layer]


def _picked(heads: Tensor, rows: PagedRows) -> Tensor:
    """A copy of the target rows' queries, in a row."""
    # Eight-bit floats cannot be indexed.
    stored = heads.view(torch.uint8) if heads.itemsize == 1 else heads
    return stored.index_select(0, rows.places).view(heads.dtype)


def _new_scales(layers: int, rows: int, device: torch.device) -> Tensor:
    """``[L, R]``; each layer's begin at an address that kernels are compiled for."""
    padded = -(-rows // 4) * 4
    with torch.inference_mode(False):  # They are written to with and without.
        return torch.empty(layers, padded, dtype=torch.float32, device=device)[:, :rows]
