"""Records one engine step: which rows of the batch belong to which trace, and their sums.

Invariant: a fault while recording fails the traces it concerns and nothing else; the step itself,
its other requests and the other traces go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.kernels import Accumulators, PagedRows, RowSegment, add_row_sums
from vllm_flashtrace.worker.clock import Clock
from vllm_flashtrace.worker.trace import ModelShape, Trace


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One request's place in a step.

    Attributes:
        req_id: The engine's request id.
        first_row: Its first row among the step's tokens.
        start: Absolute position of that row, i.e. tokens computed before this step.
        stop: Absolute position after its last row.
        block_table: int32, ids of the request's KV blocks as the attention kernel counts them, on
            the step's device.
    """

    req_id: str
    first_row: int
    start: int
    stop: int
    block_table: torch.Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """A trace's target rows within a step."""

    trace: Trace
    batch_row: BatchRow
    row_segment: RowSegment


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Segments that one call records; what fails it fails all their traces."""

    segments: list[Segment]
    rows: PagedRows


class StepModel(Protocol):
    """What recording needs to know of the model on this worker."""

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model."""

    @property
    def batched(self) -> bool:
        """Whether one call records all segments of a step, or each has its own."""

    def clock(self) -> Clock:
        """Times the device's work."""

    def plan_rows(self, segments: Sequence[Segment]) -> PagedRows:
        """Readies target rows for recording; made once per step and used for every layer."""

    def add_column_sums(self, layer: int, query: torch.Tensor, group: RowGroup) -> None:
        """Adds ``c_h[j] += sum_i w_i alpha^h_ij`` of one layer to the group's traces.

        Args:
            layer: Layer index.
            query: ``[tokens, H, d]``, the step's queries as the attention kernel saw them.
            group: The target rows.
        """


class StepRecorder:
    """Adds one step's target rows to their traces' accumulators."""

    def __init__(
        self,
        batch: Sequence[BatchRow],
        traces: dict[str, Trace],
        model: StepModel,
        on_failure: Callable[[str, BaseException], None],
    ) -> None:
        self._model = model
        self._on_failure = on_failure
        self._residuals = 0
        self._attentions = 0
        self.groups: list[RowGroup] = []
        segments = []
        for row in batch:
            if row.req_id in traces and (segment := self._begin(traces[row.req_id], row)):
                segments.append(segment)
        for members in [segments] if model.batched else [[segment] for segment in segments]:
            self._plan(members)

    @property
    def segments(self) -> list[Segment]:
        """The target rows that are still being recorded."""
        return [segment for group in self.groups for segment in group.segments]

    def record_attention(self, layer: int, query: torch.Tensor) -> None:
        """Adds one layer's column sums; arguments as `StepModel.add_column_sums`."""
        self._attentions += 1
        self._each(lambda group: self._model.add_column_sums(layer, query, group))

    def record_residual(self, residual: torch.Tensor) -> None:
        """Adds ``sum_i w_i x_prev_i`` to ``r`` or ``sum_i w_i x_mid_i`` to ``x`` of a layer.

        The stream is seen twice per layer, before and after the attention block's output has been
        added to it, in this order.

        Args:
            residual: ``[tokens, D]``.
        """
        layer, after = divmod(self._residuals, 2)
        self._residuals += 1
        self._each(
            lambda group: add_row_sums(
                residual, group.rows, layer, "stream" if after else "residual"
            )
        )

    def check_complete(self) -> None:
        """Fails the step's traces unless every layer was seen exactly once."""
        layers = self._model.shape.num_layers
        if self._attentions == layers and self._residuals == 2 * layers:
            return
        message = (
            f"of {layers} layers {self._attentions} attention calls and {self._residuals} of "
            f"{2 * layers} residual streams were seen"
        )
        error = TraceError("recording_incomplete", message)
        for group in list(self.groups):
            self._fail(group.segments, error)
        self.groups.clear()

    def _begin(self, trace: Trace, row: BatchRow) -> Segment | None:
        try:
            target = trace.begin_chunk(row.start, row.stop)
            if target.offsets.numel() == 0:
                return None
            sums = Accumulators(trace.column_sums, trace.residual, trace.stream)
            rows = RowSegment(
                target.offsets + row.first_row,
                target.positions,
                target.weights,
                row.block_table,
                sums,
            )
            return Segment(trace, row, rows)
        except Exception as error:
            self._on_failure(row.req_id, error)
            return None

    def _plan(self, segments: list[Segment]) -> None:
        if not segments:
            return
        try:
            self.groups.append(RowGroup(segments, self._model.plan_rows(segments)))
        except Exception as error:
            self._fail(segments, error)

    def _each(self, add: Callable[[RowGroup], None]) -> None:
        for group in list(self.groups):
            clock = self._model.clock()
            began = clock.mark()
            try:
                add(group)
            except Exception as error:
                self.groups.remove(group)
                self._fail(group.segments, error)
            else:
                spent = (began, clock.mark())
                for segment in group.segments:
                    segment.trace.recordings.append(spent)

    def _fail(self, segments: Sequence[Segment], error: BaseException) -> None:
        for segment in segments:
            self._on_failure(segment.batch_row.req_id, error)
