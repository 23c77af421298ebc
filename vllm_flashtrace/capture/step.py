"""Records one engine step: which rows of the batch belong to which trace, and their sums.

Invariant: a fault while recording fails the trace it concerns and nothing else; the step itself,
its other requests and the other traces go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_flashtrace.capture.trace import TargetRows, Trace
from vllm_flashtrace.core.column_sums import weighted_column_sums
from vllm_flashtrace.errors import TraceError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One request's place in a step.

    Attributes:
        req_id: The engine's request id.
        index: Row of the request in the batch (and in block tables).
        first_row: Its first row among the step's tokens.
        start: Absolute position of that row, i.e. tokens computed before this step.
        stop: Absolute position after its last row.
    """

    req_id: str
    index: int
    first_row: int
    start: int
    stop: int


@dataclass(slots=True)
class Segment:
    """A trace's target rows within a step.

    Attributes:
        rows: int64 ``[R]``, rows among the step's tokens.
        target: The same rows as absolute positions with their weights.
    """

    trace: Trace
    batch_row: BatchRow
    rows: torch.Tensor
    target: TargetRows


class StepRecorder:
    """Adds one step's target rows to their traces' accumulators."""

    def __init__(
        self,
        batch: Sequence[BatchRow],
        traces: dict[str, Trace],
        on_failure: Callable[[str, BaseException], None],
    ) -> None:
        self._on_failure = on_failure
        self.segments: list[Segment] = []
        for row in batch:
            trace = traces.get(row.req_id)
            if trace is None:
                continue
            try:
                target = trace.begin_chunk(row.start, row.stop)
            except TraceError as error:
                on_failure(row.req_id, error)
                continue
            self.segments.append(Segment(trace, row, target.offsets + row.first_row, target))

    def record_attention(
        self,
        layer: int,
        query: torch.Tensor,
        read_keys: Callable[[BatchRow, int], torch.Tensor],
        scale: float,
    ) -> None:
        """Adds ``c_h[j] += sum_i w_i alpha^h_ij`` of one layer.

        Args:
            layer: Layer index.
            query: ``[tokens, H, d]``, the step's queries as the attention kernel saw them.
            read_keys: Returns the float32 keys ``[length, G, d]`` of a request's first ``length``
                tokens, those of this step included.
            scale: Softmax scale of the layer.
        """

        def add(segment: Segment) -> None:
            seen = int(segment.target.positions[-1]) + 1
            weighted_column_sums(
                query[segment.rows].float(),
                read_keys(segment.batch_row, seen),
                segment.target.weights,
                segment.target.positions,
                scale,
                out=segment.trace.column_sums[layer],
            )

        self._each(add)

    def record_residual(self, layer: int, *addends: torch.Tensor) -> None:
        """Adds ``sum_i w_i x_prev_i`` to ``r`` and ``x``; ``x_prev`` is the sum of ``addends``."""

        def add(segment: Segment) -> None:
            for addend in addends:
                part = segment.target.weights @ addend[segment.rows].float()
                segment.trace.residual[layer] += part
                segment.trace.stream[layer] += part

        self._each(add)

    def record_attention_output(self, layer: int, output: torch.Tensor) -> None:
        """Adds what the attention block adds to the residual stream to ``x`` (= x_mid)."""

        def add(segment: Segment) -> None:
            segment.trace.stream[layer] += segment.target.weights @ output[segment.rows].float()

        self._each(add)

    def _each(self, add: Callable[[Segment], None]) -> None:
        for segment in list(self.segments):
            if segment.rows.numel() == 0:
                continue
            began = time.perf_counter()
            try:
                add(segment)
            except Exception as error:
                self.segments.remove(segment)
                self._on_failure(segment.batch_row.req_id, error)
            segment.trace.recording_seconds += time.perf_counter() - began
