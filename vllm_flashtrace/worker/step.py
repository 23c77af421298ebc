"""Records one engine step: adds the target rows in its batch to the sums of their traces.

A request may be prefilled in several chunks, be preempted and start again; its `Trace` holds the
sums between steps. A fault while recording fails the traces it concerns and nothing else: the step,
its other requests and the other traces go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.core.proximity import LayerSums
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.kernels import Accumulators, PagedRows, RowSegment, add_row_sums
from vllm_flashtrace.trace.wire import TraceSpec

if TYPE_CHECKING:
    from vllm_flashtrace.worker.traced_model import TracedModel


class StepRecorder:
    """Adds one step's target rows to their traces' sums.

    Attributes:
        model: The model that runs the step.
        groups: The target rows that are still being recorded.
    """

    def __init__(
        self,
        batch: Sequence[BatchRow],
        traces: dict[str, Trace],
        model: TracedModel,
        on_failure: Callable[[str, BaseException], None],
    ) -> None:
        """Finds the target rows.

        Args:
            batch: The step's requests.
            traces: The traces that are being recorded, by request id.
            model: The model that runs the step.
            on_failure: Called with the request id of a trace that failed, and why.
        """
        self.model = model
        self._on_failure = on_failure
        self._updates = 0
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
        """Adds one layer's column sums; arguments as `TracedModel.add_column_sums`."""
        self._attentions += 1
        self._each(lambda group: self.model.add_column_sums(layer, query, group))

    def record_update(self, update: torch.Tensor, residual: torch.Tensor) -> None:
        """Adds ``sum_i w_i x_prev_i`` to ``r`` of a layer, and what leads from ``r`` to ``x``.

        Args:
            update: ``[tokens, D]``, what the attention block adds to the stream.
            residual: ``[tokens, D]``, the stream in front of it.
        """
        layer = self._updates
        self._updates += 1

        def add(group: RowGroup) -> None:
            add_row_sums(residual, group.rows, layer, "residual")
            add_row_sums(update, group.rows, layer, "stream")
            for segment in group.segments:
                segment.trace.stream_lacks_residual = True

        self._each(add)

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
        layers = self.model.shape.num_layers
        # Each layer is seen in one of two ways, see `taps`.
        streams = {(layers, 0), (0, 2 * layers)}
        if self._attentions == layers and (self._updates, self._residuals) in streams:
            return
        message = (
            f"of {layers} layers {self._attentions} attention calls, {self._updates} updates and "
            f"{self._residuals} residual streams were seen"
        )
        error = TraceError("recording_incomplete", message)
        for group in list(self.groups):
            self._fail(group.segments, error)
        self.groups.clear()

    def _begin(self, trace: Trace, row: BatchRow) -> Segment | None:
        try:
            rows = trace.begin_chunk(row)
            return None if rows is None else Segment(trace, row, rows)
        except Exception as error:
            self._on_failure(row.req_id, error)
            return None

    def _plan(self, segments: list[Segment]) -> None:
        if not segments:
            return
        try:
            rows = self.model.plan_rows([segment.row_segment for segment in segments])
            self.groups.append(RowGroup(segments, rows))
        except Exception as error:
            self._fail(segments, error)

    def _each(self, add: Callable[[RowGroup], None]) -> None:
        for group in list(self.groups):
            clock = self.model.clock
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


class Trace:
    """One trace request's sums ``c``, ``r`` and ``x`` of every layer, while it is prefilled.

    Invariant: the sums hold each target position up to ``next_position`` exactly once, whatever the
    chunks, restarts and preemptions; `begin_chunk` fails the trace where that cannot be kept.

    Attributes:
        spec: What was asked for.
        adapter: Id of the LoRA adapter that the request is computed with, or None.
        target: Weights that sum to 1.
        context: Number of tokens up to the last target.
        next_position: Where the next chunk is expected to begin.
        cached_tokens: Tokens that came from the prefix cache.
        recomputed_tokens: Tokens prefilled.
        restarts: How often recording began again after a preemption.
        started: Mark before the first chunk, or None.
        recordings: Marks before and after each piece of recording.
        clock: Sets and reads those marks.
        sums: float32 ``[L, H, context]``, ``[L, D]`` and ``[L, D]``.
        stream_lacks_residual: Whether ``x`` still is what the blocks add, without ``r``.
    """

    def __init__(
        self,
        spec: TraceSpec,
        weights: TargetWeights,
        model: TracedModel,
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
        self.stream_lacks_residual = False
        self.clock = model.clock
        self.started: Any = None
        self.recordings: list[tuple[Any, Any]] = []
        shape = model.shape
        layers, heads, hidden = shape.num_layers, shape.num_heads, shape.hidden_size
        zeros = partial(torch.zeros, dtype=torch.float32, device=model.device)
        self.sums = Accumulators(
            zeros(layers, heads, self.context), zeros(layers, hidden), zeros(layers, hidden)
        )

    @property
    def nbytes(self) -> int:
        """Size of the accumulators in bytes."""
        return sum(accumulator.nbytes for accumulator in self.sums)

    @property
    def complete(self) -> bool:
        """Whether every target position has been recorded."""
        return self.next_position >= self.context

    def begin_chunk(self, row: BatchRow) -> RowSegment | None:
        """The target rows of a chunk that is about to be computed, or None if it has none.

        A request that is preempted starts again from a prefix-cache hit, which for a trace ends at
        or before its first target: everything recorded so far is then dropped.

        Raises:
            TraceError: ``recording_gap`` when target positions were computed unseen.
        """
        if self.started is None:
            self.started = self.clock.mark()
        if row.start != self.next_position:
            if row.start > self.target.first:
                raise TraceError(
                    "recording_gap",
                    f"positions {self.next_position} to {row.start} were computed without "
                    "recording",
                )
            self._restart(row.start)
        self.next_position = row.stop
        self.recomputed_tokens += row.stop - row.start
        positions = self.target.positions
        inside = (positions >= row.start) & (positions < row.stop)
        if not inside.any():
            return None
        positions = positions[inside]
        return RowSegment(
            rows=positions - row.start + row.first_row,
            positions=positions,
            weights=self.target.weights[inside],
            block_table=row.block_table,
            sums=self.sums,
        )

    def complete_sums(self) -> None:
        """Makes ``x`` of all layers the sums of the stream behind the blocks; once, at the end."""
        if self.stream_lacks_residual:
            self.sums.stream.add_(self.sums.residual)
            self.stream_lacks_residual = False

    def layer_sums(self, layer: int) -> LayerSums:
        """The three sums of one layer; see `complete_sums`."""
        return LayerSums(*(accumulator[layer] for accumulator in self.sums))

    def _restart(self, start: int) -> None:
        self.restarts += self.next_position > 0
        for accumulator in self.sums:
            accumulator.zero_()
        self.cached_tokens = start
        self.recomputed_tokens = 0


@dataclass(frozen=True, slots=True)
class Segment:
    """A trace's target rows within a step."""

    trace: Trace
    batch_row: BatchRow
    row_segment: RowSegment


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Segments that are recorded in one call: what fails it fails all their traces."""

    segments: list[Segment]
    rows: PagedRows
