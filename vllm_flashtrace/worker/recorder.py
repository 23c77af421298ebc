"""Keeps a worker's traces from their first chunk to the pick-up of their results.

A trace is in exactly one place: recording, or finished with a result that waits for pick-up until
its time-to-live ends. It leaves the first when its request is finished or aborted. Results of
requests for log-probabilities wait for pick-up here too; see `log_probs`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from vllm_flashtrace.base.errors import FlashTraceError, TraceError, UnsupportedModelError
from vllm_flashtrace.base.logs import log_unexpected, logger
from vllm_flashtrace.kernels import SumsTouchedError
from vllm_flashtrace.trace.budget import AccumulatorBudget
from vllm_flashtrace.trace.wire import ScoreSpec, WireReport, unseal
from vllm_flashtrace.worker.finish import Measured, measure, run_hops, score
from vllm_flashtrace.worker.host_buffers import HostBuffers
from vllm_flashtrace.worker.recorded_trace import Trace
from vllm_flashtrace.worker.reports import FinishedLogProbs, FinishedTrace
from vllm_flashtrace.worker.row_groups import Segment
from vllm_flashtrace.worker.step import StepRecorder
from vllm_flashtrace.worker.step_rows import BatchRow
from vllm_flashtrace.worker.traced_model import TracedModel

# Where accumulators have no limit.
_SPARE_BYTES = 256 << 20

Finished: TypeAlias = FinishedTrace | FinishedLogProbs


class Recorder:
    """All traces of one worker.

    Attributes:
        budget: What their accumulators may take; None for no limit.
        buffers: Where their results are on the host.
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
        self._stored_as: dict[str, str] = {}
        self._measured: dict[str, Measured] = {}
        self._results: dict[str, _Stored] = {}
        self._came_back: deque[tuple[str, _Stored]] = deque()
        device = torch.device("cpu") if model is None else model.device
        self.buffers = HostBuffers(device, self._evict)

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
        self._take_back()
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
        if isinstance(spec, ScoreSpec):
            return
        if req_id in self._traces and self._nonces.get(req_id) == spec.nonce:
            return
        self.expect(req_id, spec.nonce)
        self._traces.pop(req_id, None)
        try:
            if self._model is None:
                raise UnsupportedModelError(self._refusal or "unknown")
            if spec.length != num_prompt_tokens:
                raise ValueError(f"spec is for {spec.length} tokens, not {num_prompt_tokens}")
            if self.budget is not None:
                rows = spec.kept_rows
                if rows and not self.budget.bytes_per_row:
                    raise TraceError("recording_failed", "this worker runs each hop by itself")
                self.budget.check(
                    spec.last_target + 1,
                    self.accumulator_bytes,
                    rows,
                    attention=spec.attention,
                )
            self._traces[req_id] = Trace(spec, self._model, adapter)
        except Exception as error:
            self.fail(req_id, error)

    def expect(self, req_id: str, nonce: str) -> None:
        """Notes under which nonce a request's result is to wait."""
        self._nonces[req_id] = nonce

    def begin_step(self, batch: Sequence[BatchRow]) -> StepRecorder | None:
        """The recorder of a step, or None when it computes no target row of any trace."""
        if self._model is None:
            return None
        step = StepRecorder(batch, self._traces, self._model, self.fail)
        return step if step.groups else None

    def finish_step(self, step: StepRecorder) -> None:
        """Ends a step's recording, and runs the proximity pass of each trace that is complete.

        Must be called while the step's KV blocks are still held by their requests; `score_finished`
        must follow.
        """
        step.flush()
        step.check_complete()
        step.note_adapters()
        finished = [
            segment
            for segment in step.segments
            if segment.trace.complete and segment.batch_row.req_id in self._traces
        ]
        summed = [segment for segment in finished if segment.trace.rows is None]
        self._measured.update(measure(summed, step.model, self.fail))
        for segment in finished:
            if segment.trace.rows is not None:
                self._run_hops(segment, step.model)

    def _run_hops(self, segment: Segment, model: TracedModel) -> None:
        req_id = segment.batch_row.req_id
        try:
            finished = run_hops(segment, model, self.buffers, self._spare_bytes())
        except Exception as error:
            cause = error.__cause__ if isinstance(error, SumsTouchedError) else None
            self.fail(req_id, cause or error)
        else:
            self.store(req_id, finished)

    def _spare_bytes(self) -> int:
        """What the hops of a trace may take for a moment; on other devices they take nothing more.

        Within the limit of all accumulators: no trace begins meanwhile.
        """
        if self._model is None or self._model.device.type != "cpu":
            return 0
        if self.budget is None:
            return _SPARE_BYTES
        return self.budget.limit_bytes - self.accumulator_bytes

    def totals(self, req_id: str) -> Tensor | None:
        """The proximity of all tokens, float64 ``[L]``, of a trace that `finish_step` measured."""
        measured = self._measured.get(req_id)
        return None if measured is None else measured.totals

    def score_finished(self, totals: Mapping[str, Tensor] | None = None) -> None:
        """Makes the scores of the traces that `finish_step` measured; does not wait for them.

        Args:
            totals: Of each trace, what `totals` gives, summed over the ranks that share the heads;
                None where this rank has all of them.
        """
        for req_id, measured in list(self._measured.items()):
            try:
                if self._model is None or (totals is not None and req_id not in totals):
                    raise TraceError(
                        "recording_failed", "the trace ended in another step than was scheduled"
                    )
                shared = None if totals is None else totals[req_id]
                model = self._model
                finished = score(measured, shared, model.part, self.buffers, model.first_head)
            except Exception as error:
                self.fail(req_id, error)
            else:
                self.store(req_id, finished)

    def fail(self, req_id: str, error: BaseException) -> None:
        """Ends a trace with a reason; the request itself goes on."""
        self.store(req_id, _failure(f"request {req_id}", error))

    def hand_out(self, req_ids: Iterable[str]) -> HandOut | None:
        """Takes out the results of requests that a step finishes; None if they have none."""
        results = {
            req_id: (nonce, self._results.pop(nonce))
            for req_id in req_ids
            if (nonce := self._stored_as.pop(req_id, None)) in self._results
        }
        return HandOut(results, self._came_back) if results else None

    def drop(self, req_ids: Iterable[str]) -> None:
        """Forgets the accumulators of requests that finished or were aborted."""
        for req_id in req_ids:
            self._traces.pop(req_id, None)
            self._nonces.pop(req_id, None)
            self._stored_as.pop(req_id, None)

    def collect(self, nonce: str) -> bytes:
        """Hands out a result, encoded; status ``missing`` when there is none.

        Never waits for the device: while a result is on its way to the host, the answer is
        ``pending``. Every other answer is given once.
        """
        self.expire()
        stored = self._results.get(nonce)
        if stored is None:
            return WireReport(status="missing").encode()
        answer = stored.encode(nonce)
        if answer is None:
            return WireReport(status="pending").encode()
        self.discard(nonce)
        return answer

    def discard(self, nonce: str) -> None:
        """Forgets a result that will not be picked up."""
        stored = self._results.pop(nonce, None)
        if stored is not None and not isinstance(stored.result, WireReport):
            self.buffers.give_back(stored.result.copied)

    def expire(self) -> None:
        """Drops results that were not picked up in time."""
        self._take_back()
        now = time.monotonic()
        for nonce in [n for n, stored in self._results.items() if stored.expires <= now]:
            self.discard(nonce)

    def _take_back(self) -> None:
        while self._came_back:
            nonce, stored = self._came_back.popleft()
            self._results[nonce] = stored
            if stored.sent:
                self.discard(nonce)

    def _evict(self) -> bool:
        """Gives up the result that has waited longest; False if none waits."""
        if self._came_back:
            self._take_back()
            return True
        for nonce, stored in self._results.items():
            if not isinstance(stored.result, WireReport):
                self.buffers.give_back(stored.result.copied)
                error = TraceError(
                    "result_missing",
                    "the result waited for so long that others needed its room on the host",
                )
                stored.result = _failure(f"nonce {nonce}", error)
                return True
        return False

    def store(self, req_id: str, result: WireReport | Finished) -> None:
        """Ends a request of ours: its result waits for pick-up."""
        self._traces.pop(req_id, None)
        self._measured.pop(req_id, None)
        nonce = self._nonces.pop(req_id, None)
        if nonce is not None:
            self.discard(nonce)
            self._results[nonce] = _Stored(result, time.monotonic() + self._ttl)
            self._stored_as[req_id] = nonce


@dataclass(slots=True)
class _Stored:
    result: WireReport | Finished
    expires: float
    sent: bool = False

    def encode(self, nonce: str) -> bytes | None:
        """The result as it goes to the API server; None while it is on its way to the host."""
        try:
            result = self.result
            if not isinstance(result, WireReport):
                if not result.copied.arrived():
                    return None
                result = result.report()
            return result.encode()
        except Exception as error:
            return _failure(f"nonce {nonce}", error).encode()


class HandOut:
    """Results that leave the worker with the output of the step that finished their requests."""

    def __init__(
        self, results: dict[str, tuple[str, _Stored]], came_back: deque[tuple[str, _Stored]]
    ) -> None:
        self._results = results
        self._came_back = came_back

    def encode(self) -> dict[str, bytes]:
        """The results by request id, once; may be called in another thread than the recorder's.

        One that is still on its way to the host is left out, to be picked up from the recorder.
        """
        encoded = {}
        while self._results:
            req_id, (nonce, stored) = self._results.popitem()
            answer = stored.encode(nonce)
            if answer is not None:
                encoded[req_id] = answer
                stored.sent = True
            self._came_back.append((nonce, stored))  # What it holds is given back there.
        return encoded


def _failure(what: str, error: BaseException) -> WireReport:
    if isinstance(error, FlashTraceError):
        code, message = error.code, error.message
        logger.debug("Trace of %s failed: %s", what, error)  # Logged where it is picked up.
    elif isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        what_failed = str(error).partition(" GPU ")[0]  # Without a table of all processes.
        code, message = "overloaded", f"there is no memory left for the trace: {what_failed}"
        logger.debug("Trace of %s found no memory: %s", what, error)
    else:
        code, message = "recording_failed", f"{type(error).__name__}: {error}"
        log_unexpected(f"the trace of {what}", error)
    return WireReport(status="failed", code=code, message=message)
