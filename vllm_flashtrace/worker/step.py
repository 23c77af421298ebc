"""One engine step: which rows of the batch belong to which trace, and their sums.

Time as the device spends it: marks set between pieces of work, and the seconds between them.

On a GPU the host runs ahead, so a mark there is a CUDA event, whose time is known once the device
has passed it.

The accumulators of one trace while its request is prefilled.

Invariant: after any number of chunks, restarts and preemptions, the accumulators hold each target
position exactly once, or the trace has failed. They cost O(layers * heads * context) floats.

Records one engine step: which rows of the batch belong to which trace, and their sums.

Invariant: a fault while recording fails the traces it concerns and nothing else; the step itself,
its other requests and the other traces go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.core.proximity import LayerSums
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.kernels import Accumulators, PagedRows, RowSegment, add_row_sums
from vllm_flashtrace.trace.budget import ModelShape
from vllm_flashtrace.trace.wire import TraceSpec


class Clock(Protocol):
    """Marks points in a device's work."""

    def mark(self) -> Any:
        """A mark after all work queued so far; never waits."""

    def seconds(self, start: Any, stop: Any) -> float:
        """Seconds between two marks; the device must have passed both."""


class HostClock:
    """The clock of a device on which work is done when the call returns."""

    def mark(self) -> float:
        """The time now."""
        return time.perf_counter()

    def seconds(self, start: float, stop: float) -> float:
        """The difference."""
        return stop - start


class CudaClock:
    """The clock of the current CUDA stream."""

    def mark(self) -> torch.cuda.Event:
        """An event on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        """The time between two events that the device has passed."""
        return start.elapsed_time(stop) / 1000


@dataclass(frozen=True, slots=True)
class TargetRows:
    """Target positions that one chunk computes.

    Attributes:
        offsets: int64 ``[R]``, rows of the chunk.
        positions: int64 ``[R]``, absolute positions.
        weights: float32 ``[R]``.
    """

    offsets: torch.Tensor
    positions: torch.Tensor
    weights: torch.Tensor


class Trace:
    """One trace request's sums, ``c``, ``r`` and ``x`` of every layer (arXiv 2602.01914, 3.2)."""

    def __init__(
        self,
        spec: TraceSpec,
        weights: TargetWeights,
        shape: ModelShape,
        device: torch.device,
        clock: Clock | None = None,
        adapter: int | None = None,
    ) -> None:
        self.spec = spec
        self.adapter = adapter
        self.target = weights.normalised()
        self.context = self.target.last + 1
        self.next_position = 0
        self.cached_tokens = 0
        self.recomputed_tokens = 0
        self.restarts = 0
        self.clock: Clock = clock if clock is not None else HostClock()
        self.started: Any = None
        self.recordings: list[tuple[Any, Any]] = []
        layers, heads, hidden = shape.num_layers, shape.num_heads, shape.hidden_size
        zeros = partial(torch.zeros, dtype=torch.float32, device=device)
        self.column_sums = zeros(layers, heads, self.context)
        self.residual = zeros(layers, hidden)
        self.stream = zeros(layers, hidden)

    @property
    def nbytes(self) -> int:
        """Size of the accumulators in bytes."""
        return self.column_sums.nbytes + self.residual.nbytes + self.stream.nbytes

    @property
    def complete(self) -> bool:
        """Whether every target position has been recorded."""
        return self.next_position >= self.context

    def begin_chunk(self, start: int, stop: int) -> TargetRows:
        """Notes that positions ``[start, stop)`` are about to be computed.

        A request that is preempted starts again from a prefix-cache hit, which for a trace ends at
        or before its first target: everything recorded so far is then dropped.

        Raises:
            TraceError: ``recording_gap`` when target positions were computed unseen.
        """
        if self.started is None:
            self.started = self.clock.mark()
        if start != self.next_position:
            if start > self.target.first:
                raise TraceError(
                    "recording_gap",
                    f"positions {self.next_position} to {start} were computed without recording",
                )
            self._restart(start)
        inside = (self.target.positions >= start) & (self.target.positions < stop)
        positions = self.target.positions[inside]
        self.next_position = stop
        self.recomputed_tokens += stop - start
        return TargetRows(positions - start, positions, self.target.weights[inside])

    def layer_sums(self, layer: int) -> LayerSums:
        """The three sums of one layer."""
        return LayerSums(self.column_sums[layer], self.residual[layer], self.stream[layer])

    def _restart(self, start: int) -> None:
        self.restarts += self.next_position > 0
        self.column_sums.zero_()
        self.residual.zero_()
        self.stream.zero_()
        self.cached_tokens = start
        self.recomputed_tokens = 0


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
