"""Keeps a worker's traces from their first chunk to the pick-up of their results.

A trace is in exactly one place: recording, or finished with a result that waits for pick-up until
its time-to-live ends. It leaves the first when its request is finished or aborted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from vllm_flashtrace.base.errors import FlashTraceError, TraceError, UnsupportedModelError
from vllm_flashtrace.base.logs import log_unexpected, logger
from vllm_flashtrace.core.proximity import l1_proximity, token_shares
from vllm_flashtrace.trace.budget import AccumulatorBudget
from vllm_flashtrace.trace.wire import ModelPart, WireReport, tensor_bytes, tensor_of, unseal
from vllm_flashtrace.worker.step import BatchRow, Segment, StepRecorder, Trace

if TYPE_CHECKING:
    from vllm_flashtrace.worker.traced_model import TracedModel


class Recorder:
    """All traces of one worker.

    Attributes:
        budget: What their accumulators may take; None for no limit.
    """

    def __init__(
        self,
        model: TracedModel | None,
        result_ttl_seconds: float,
        budget: AccumulatorBudget | None = None,
        *,
        refusal: str | None = None,
    ) -> None:
        """Starts without a trace.

        Args:
            model: The worker's model; None where it cannot be traced.
            result_ttl_seconds: How long a result waits for pick-up.
            budget: What accumulators may take together; None for no limit.
            refusal: Why there is no model.
        """
        self._model = model
        self._refusal = refusal
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
        """Number of results that wait for pick-up."""
        return len(self._results)

    def register(
        self, req_id: str, sealed: bytes, num_prompt_tokens: int, adapter: int | None = None
    ) -> None:
        """Starts recording a new trace request; a bad spec becomes a failed result.

        A preempted request may come back as a new one: its trace goes on and starts again by
        itself, see :meth:`Trace.begin_chunk`.
        """
        self.expire()
        try:
            spec = unseal(sealed)
        except FlashTraceError as error:
            logger.warning("Request %s carries a trace spec that is refused: %s", req_id, error)
            return
        if req_id in self._traces and self._nonces.get(req_id) == spec.nonce:
            return
        self._nonces[req_id] = spec.nonce
        self._traces.pop(req_id, None)
        try:
            if self._model is None:
                raise UnsupportedModelError(self._refusal or "unknown")
            if spec.length != num_prompt_tokens:
                raise ValueError(f"spec is for {spec.length} tokens, not {num_prompt_tokens}")
            weights = spec.target_weights()
            if self.budget is not None:
                self.budget.check(weights.last + 1, self.accumulator_bytes)
            self._traces[req_id] = Trace(spec, weights, self._model, adapter)
        except Exception as error:
            self.fail(req_id, error)

    def begin_step(self, batch: Sequence[BatchRow]) -> StepRecorder | None:
        """The recorder of a step, or None when it computes no target row of any trace."""
        if self._model is None:
            return None
        step = StepRecorder(batch, self._traces, self._model, self.fail)
        return step if step.groups else None

    def finish_step(self, step: StepRecorder) -> None:
        """Runs the proximity pass of every trace whose last target row is recorded.

        Must be called while the step's KV blocks are still held by their requests.
        """
        step.check_complete()
        for segment in step.segments:
            req_id = segment.batch_row.req_id
            if segment.trace.complete and req_id in self._traces:
                try:
                    finished = _finish(segment, step.model)
                except Exception as error:
                    self.fail(req_id, error)
                else:
                    self._store(req_id, finished)

    def fail(self, req_id: str, error: BaseException) -> None:
        """Ends a trace with a reason; the request itself goes on."""
        self._store(req_id, _failure(f"request {req_id}", error))

    def drop(self, req_ids: Iterable[str]) -> None:
        """Forgets the accumulators of requests that finished or were aborted."""
        for req_id in req_ids:
            self._traces.pop(req_id, None)
            self._nonces.pop(req_id, None)

    def collect(self, nonce: str, denominators: bytes = b"") -> bytes:
        """Hands out a result, encoded; status ``missing`` when there is none.

        A rank that shares the heads with others first gives its totals, status ``partial``, and
        keeps the trace until it is called with the sums over all ranks. Every other answer is
        given once.

        Args:
            nonce: The trace's nonce.
            denominators: float64, see :meth:`FinishedTrace.report`; empty for the totals.
        """
        self.expire()
        stored = self._results.pop(nonce, None)
        if stored is None:
            return WireReport(status="missing").encode()
        report = stored.report
        if isinstance(report, WireReport):
            return report.encode()
        if denominators:
            sums = tensor_of(denominators, torch.float64)
            return self._answer(nonce, lambda: report.report(sums))
        if report.facts.part.ranks == 1:
            return self._answer(nonce, report.report)
        self._results[nonce] = stored
        return self._answer(nonce, report.totals)

    def discard(self, nonce: str) -> None:
        """Forgets a result that will not be picked up."""
        self._results.pop(nonce, None)

    def expire(self) -> None:
        """Drops results that were not picked up in time."""
        now = time.monotonic()
        for nonce in [n for n, stored in self._results.items() if stored.expires <= now]:
            del self._results[nonce]

    def _answer(self, nonce: str, report: Callable[[], WireReport]) -> bytes:
        try:
            return report().encode()
        except Exception as error:
            self._results.pop(nonce, None)
            return _failure(f"nonce {nonce}", error).encode()

    def _store(self, req_id: str, report: WireReport | FinishedTrace) -> None:
        self._traces.pop(req_id, None)
        nonce = self._nonces.pop(req_id, None)
        if nonce is not None:
            self._results[nonce] = _Stored(report, time.monotonic() + self._ttl)


@dataclass(frozen=True, slots=True)
class FinishedTrace:
    """A recorded trace, before its scores are made.

    On a GPU its numbers may still be under way when it is made, so that the engine's step goes on;
    `totals` and `report` wait for them.

    Attributes:
        facts: What is to be told of the trace beside its scores.
        sums: Its proximities; to be read after ``wait``.
        wait: Returns once the device has written ``sums`` and passed all marks.
        recorded: Mark at the end of the last recording step.
        ended: Mark after the proximities.
    """

    facts: TraceFacts
    sums: TraceSums
    wait: Callable[[], None]
    recorded: Any
    ended: Any

    def totals(self) -> WireReport:
        """The proximity of all tokens and of the residual per layer, for ranks to add up."""
        self.wait()
        self._check()
        return WireReport(
            status="partial",
            part=self.facts.part,
            totals=tensor_bytes(self.sums.tokens.double().sum(1), torch.float64),
            residual=tensor_bytes(self.sums.residual, torch.float64),
        )

    def report(self, denominators: Tensor | None = None) -> WireReport:
        """The scores ``e_j`` of each token, summed over the layers of this stage.

        ``e_j = sum_h prox(f_jh) / (sum_jh prox(f_jh) + prox(r))`` (section 3.2), where the
        denominator runs over the heads of all ranks and the numerator over those of this one.

        Args:
            denominators: float64, one per layer of the whole model; None where this rank has all
                the heads.

        Raises:
            TraceError: ``recording_failed`` when a proximity is not finite.
        """
        self.wait()
        self._check()
        tokens = self.sums.tokens.double()
        if denominators is None:
            denominators = tokens.sum(1) + self.sums.residual.double()
        else:
            denominators = self.facts.part.own(denominators)
        facts = self.facts
        behind = facts.length - tokens.shape[1]  # Nothing flows from behind the last target.
        shares = functional.pad(token_shares(tokens, denominators), (0, behind))
        return WireReport(
            status="completed",
            scores=tensor_bytes(shares.sum(0)),
            layer_scores=tensor_bytes(shares) if facts.layers else b"",
            num_layers=len(shares) if facts.layers else 0,
            recomputed_tokens=facts.recomputed_tokens,
            cached_tokens=facts.cached_tokens,
            restarts=facts.restarts,
            seconds=self._seconds(),
            part=facts.part,
        )

    def _check(self) -> None:
        finite = self.sums.tokens.sum(1).isfinite() & self.sums.residual.isfinite()
        if not bool(finite.all()):
            layer = self.facts.part.first_layer + int((~finite).nonzero()[0])
            raise TraceError("recording_failed", f"a proximity of layer {layer} is not finite")

    def _seconds(self) -> dict[str, float]:
        facts = self.facts
        recording = sum(facts.clock.seconds(*spent) for spent in facts.recordings)
        return {
            "prefill": max(0.0, facts.clock.seconds(facts.started, self.recorded) - recording),
            "recording": recording,
            "proximity": facts.clock.seconds(self.recorded, self.ended),
        }


@dataclass(frozen=True, slots=True)
class TraceFacts:
    """What is kept of a trace beside its proximities; see `Trace`."""

    length: int
    layers: bool
    recomputed_tokens: int
    cached_tokens: int
    restarts: int
    clock: Any
    started: Any
    recordings: list[tuple[Any, Any]]
    part: ModelPart

    @classmethod
    def of(cls, trace: Trace, part: ModelPart) -> TraceFacts:
        """Takes over from a trace of ``part`` of the model."""
        return cls(
            trace.spec.length,
            trace.spec.layers,
            trace.recomputed_tokens,
            trace.cached_tokens,
            trace.restarts,
            trace.clock,
            trace.started,
            trace.recordings,
            part,
        )


class TraceSums(NamedTuple):
    """Proximities of one trace on this worker, in host memory.

    Attributes:
        tokens: float32 ``[L, N]``, each token's proximity summed over this rank's heads.
        residual: float32 ``[L]``, the proximity of the residual, the same on every rank.
    """

    tokens: Tensor
    residual: Tensor


@dataclass(slots=True)
class _Stored:
    report: WireReport | FinishedTrace
    expires: float


def _finish(segment: Segment, model: TracedModel) -> FinishedTrace:
    """Runs the proximity pass over all layers."""
    trace = segment.trace
    recorded = trace.clock.mark()
    trace.complete_sums()
    layers = model.shape.num_layers
    tokens = torch.zeros(layers, trace.context, device=model.device)
    residual = torch.zeros(layers, device=model.device)
    for layer in range(layers):
        sums = trace.layer_sums(layer)
        tokens[layer] = model.token_proximity(
            layer,
            sums,
            segment.batch_row.block_table,
            trace.spec.exact_fraction,
            trace.adapter,
        )
        residual[layer] = l1_proximity(sums.residual, sums.stream)
    ended = trace.clock.mark()
    on_host, wait = to_host(tokens, residual)
    return FinishedTrace(TraceFacts.of(trace, model.part), on_host, wait, recorded, ended)


def to_host(tokens: Tensor, residual: Tensor) -> tuple[TraceSums, Callable[[], None]]:
    """Proximities in host memory, and a function that returns once they are there."""
    if tokens.device.type != "cuda":
        return TraceSums(tokens, residual), _nothing
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (tokens, residual)]
    for copy, source in zip(copies, (tokens, residual), strict=True):
        copy.copy_(source, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return TraceSums(*copies), arrived.synchronize


def _nothing() -> None:
    pass


def _failure(what: str, error: BaseException) -> WireReport:
    if isinstance(error, FlashTraceError):
        code, message = error.code, error.message
        logger.debug("Trace of %s failed: %s", what, error)  # Logged where it is picked up.
    else:
        code, message = "recording_failed", f"{type(error).__name__}: {error}"
        log_unexpected(f"the trace of {what}", error)
    return WireReport(status="failed", code=code, message=message)
