"""Keeps a worker's traces from their first chunk to the pick-up of their results.

Invariant: a trace is in exactly one place — recording, or finished with a report that waits for
pick-up until its time-to-live ends — and leaves both when its request is finished or aborted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_flashtrace.accumulator_budget import AccumulatorBudget
from vllm_flashtrace.capture.step import BatchRow, Segment, StepModel, StepRecorder
from vllm_flashtrace.capture.trace import Trace
from vllm_flashtrace.core.proximity import OutputProjection
from vllm_flashtrace.core.scores import layer_scores
from vllm_flashtrace.errors import FlashTraceError
from vllm_flashtrace.wire import WireReport, tensor_bytes, unseal

logger = logging.getLogger(__name__)


class TracedModel(StepModel, Protocol):
    """What the recorder needs to know of the model on this worker."""

    @property
    def device(self) -> torch.device:
        """Where accumulators live."""

    def read_values(self, layer: int, block_ids: list[int], length: int) -> torch.Tensor:
        """float32 values ``[length, G, d]`` of a request, valid until the next read."""

    def end_step(self) -> None:
        """Returns memory that only a step with traces needs."""

    def output_projection(self, layer: int) -> OutputProjection:
        """``W_O`` of a layer."""


@dataclass(slots=True)
class _Stored:
    data: bytes
    expires: float


class Recorder:
    """All traces of one worker."""

    def __init__(
        self,
        model: TracedModel,
        result_ttl_seconds: float,
        budget: AccumulatorBudget | None = None,
    ) -> None:
        self._model = model
        self.budget = budget
        self._ttl = result_ttl_seconds
        self._traces: dict[str, Trace] = {}
        self._nonces: dict[str, str] = {}
        self._results: dict[str, _Stored] = {}

    @property
    def active_requests(self) -> frozenset[str]:
        """Ids of the requests that are being recorded."""
        return frozenset(self._traces)

    @property
    def accumulator_bytes(self) -> int:
        """Memory held by accumulators."""
        return sum(trace.nbytes for trace in self._traces.values())

    @property
    def waiting_results(self) -> int:
        """Results that nobody has picked up yet."""
        return len(self._results)

    def register(self, req_id: str, sealed: bytes, num_prompt_tokens: int) -> None:
        """Starts recording a new trace request; a bad spec becomes a failed result."""
        self.expire()
        try:
            spec = unseal(sealed)
        except FlashTraceError as error:
            logger.warning("Request %s carries a trace spec that is refused: %s", req_id, error)
            return
        self._nonces[req_id] = spec.nonce
        try:
            if spec.length != num_prompt_tokens:
                raise ValueError(f"spec is for {spec.length} tokens, not {num_prompt_tokens}")
            weights = spec.target_weights()
            if self.budget is not None:
                self.budget.check(weights.last + 1, self.accumulator_bytes)
            self._traces[req_id] = Trace(spec, weights, self._model.shape, self._model.device)
        except Exception as error:
            self.fail(req_id, error)

    def begin_step(self, batch: Sequence[BatchRow]) -> StepRecorder | None:
        """The recorder of a step, or None when it computes no target row of any trace."""
        step = StepRecorder(batch, self._traces, self._model, self.fail)
        return step if step.segments else None

    def finish_step(self, step: StepRecorder) -> None:
        """Runs the proximity pass of every trace whose last target row is recorded.

        Must be called while the step's KV blocks are still held by their requests.
        """
        step.check_complete()
        for segment in step.segments:
            req_id = segment.batch_row.req_id
            if segment.trace.complete and req_id in self._traces:
                try:
                    report = self._report(segment)
                except Exception as error:
                    self.fail(req_id, error)
                else:
                    self._store(req_id, report)

    def fail(self, req_id: str, error: BaseException) -> None:
        """Ends a trace with a reason; the request itself goes on."""
        if isinstance(error, FlashTraceError):
            code, message = error.code, error.message
            logger.warning("Trace of request %s failed: %s", req_id, error)
        else:
            code, message = "recording_failed", f"{type(error).__name__}: {error}"
            logger.warning("Trace of request %s failed: %s", req_id, error, exc_info=error)
        self._store(req_id, WireReport(status="failed", code=code, message=message))

    def drop(self, req_ids: Iterable[str]) -> None:
        """Forgets the accumulators of requests that finished or were aborted."""
        for req_id in req_ids:
            self._traces.pop(req_id, None)
            self._nonces.pop(req_id, None)

    def collect(self, nonce: str) -> bytes:
        """Hands out and forgets a result, encoded; status ``missing`` when there is none."""
        self.expire()
        stored = self._results.pop(nonce, None)
        return stored.data if stored is not None else WireReport(status="missing").encode()

    def expire(self) -> None:
        """Drops results that nobody picked up in time."""
        now = time.monotonic()
        for nonce in [n for n, stored in self._results.items() if stored.expires <= now]:
            del self._results[nonce]

    def _store(self, req_id: str, report: WireReport) -> None:
        self._traces.pop(req_id, None)
        nonce = self._nonces.pop(req_id, None)
        if nonce is not None:
            self._results[nonce] = _Stored(report.encode(), time.monotonic() + self._ttl)

    def _report(self, segment: Segment) -> WireReport:
        trace = segment.trace
        began = time.monotonic()
        per_layer = torch.zeros(self._model.shape.num_layers, trace.context)
        for layer in range(self._model.shape.num_layers):
            projection = self._model.output_projection(layer)
            per_layer[layer] = layer_scores(
                trace.layer_sums(layer),
                self._model.read_values(layer, segment.block_ids, trace.context),
                projection.weight,
                exact_fraction=trace.spec.exact_fraction,
                column_norms=projection.column_norms,
            )
        scores = torch.zeros(trace.spec.length)
        scores[: trace.context] = per_layer.sum(0)
        layers = torch.zeros(0)
        if trace.spec.layers:
            layers = torch.zeros(self._model.shape.num_layers, trace.spec.length)
            layers[:, : trace.context] = per_layer
        now = time.monotonic()
        started = trace.started if trace.started is not None else trace.created
        return WireReport(
            status="completed",
            scores=tensor_bytes(scores),
            layer_scores=tensor_bytes(layers),
            num_layers=layers.shape[0] if trace.spec.layers else 0,
            recomputed_tokens=trace.recomputed_tokens,
            cached_tokens=trace.cached_tokens,
            restarts=trace.restarts,
            seconds={
                "prefill": began - started - trace.recording_seconds,
                "recording": trace.recording_seconds,
                "proximity": now - began,
            },
        )
