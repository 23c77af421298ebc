"""Records one engine step: which rows of the batch belong to which trace, and their sums.

Invariant: a fault while recording fails the trace it concerns and nothing else; the step itself,
its other requests and the other traces go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_flashtrace.capture.trace import ModelShape, Trace
from vllm_flashtrace.core.column_sums import TargetRowBlocks, as_slice
from vllm_flashtrace.errors import TraceError


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
        rows: Rows among the step's tokens; a slice where they are adjacent.
        weights: float32 ``[R]``, their target weights.
        blocks: The same rows, ready for the attention sums.
        block_ids: KV blocks of the request up to the end of the step.
    """

    trace: Trace
    batch_row: BatchRow
    rows: torch.Tensor | slice
    weights: torch.Tensor
    blocks: TargetRowBlocks
    block_ids: list[int]


class StepModel(Protocol):
    """What recording needs to know of the model on this worker."""

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model."""

    def block_ids(self, row: BatchRow) -> list[int]:
        """Ids of the KV blocks that hold a request's tokens up to the end of the step."""

    def read_keys(self, layer: int, block_ids: list[int], length: int) -> torch.Tensor:
        """float32 keys ``[G, d, length]`` of a request's first tokens, valid until the next read.

        The caller may overwrite them.
        """

    def softmax_scale(self, layer: int) -> float:
        """Factor on the dot products of a layer."""


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
        self.segments: list[Segment] = []
        for row in batch:
            trace = traces.get(row.req_id)
            if trace is None:
                continue
            try:
                self._begin(trace, row)
            except Exception as error:
                on_failure(row.req_id, error)

    def _begin(self, trace: Trace, row: BatchRow) -> None:
        target = trace.begin_chunk(row.start, row.stop)
        if target.offsets.numel() == 0:
            return
        shape, rows = self._model.shape, target.offsets + row.first_row
        blocks = TargetRowBlocks(
            target.weights, target.positions, shape.num_heads, shape.num_kv_heads, rows=rows
        )
        block_ids = self._model.block_ids(row)
        segment = Segment(trace, row, as_slice(rows), target.weights, blocks, block_ids)
        self.segments.append(segment)

    def record_attention(self, layer: int, query: torch.Tensor) -> None:
        """Adds ``c_h[j] += sum_i w_i alpha^h_ij`` of one layer.

        Args:
            layer: Layer index.
            query: ``[tokens, H, d]``, the step's queries as the attention kernel saw them.
        """
        self._attentions += 1

        def add(segment: Segment) -> None:
            segment.blocks.add(
                query,
                self._model.read_keys(layer, segment.block_ids, segment.blocks.columns),
                self._model.softmax_scale(layer),
                segment.trace.column_sums[layer],
            )

        self._each(add)

    def record_residual(self, update: torch.Tensor, residual: torch.Tensor) -> None:
        """Adds ``sum_i w_i x_prev_i`` to ``r``, ``sum_i w_i x_mid_i`` to ``x`` of the next layer.

        Args:
            update: ``[tokens, D]``, ``x_mid - x_prev``: what the attention block adds.
            residual: ``[tokens, D]``, ``x_prev``.
        """
        layer = self._residuals
        self._residuals += 1

        def add(segment: Segment) -> None:
            before = segment.weights @ residual[segment.rows].float()
            segment.trace.residual[layer] += before
            segment.trace.stream[layer] += before
            segment.trace.stream[layer] += segment.weights @ update[segment.rows].float()

        self._each(add)

    def check_complete(self) -> None:
        """Fails the step's traces unless every layer was seen exactly once."""
        layers = self._model.shape.num_layers
        if self._attentions == self._residuals == layers:
            return
        message = (
            f"of {layers} layers {self._attentions} attention calls and {self._residuals} "
            "residual streams were seen"
        )
        for segment in self.segments:
            self._on_failure(segment.batch_row.req_id, TraceError("recording_incomplete", message))
        self.segments.clear()

    def _each(self, add: Callable[[Segment], None]) -> None:
        for segment in list(self.segments):
            began = time.perf_counter()
            try:
                add(segment)
            except Exception as error:
                self.segments.remove(segment)
                self._on_failure(segment.batch_row.req_id, error)
            segment.trace.recording_seconds += time.perf_counter() - began
