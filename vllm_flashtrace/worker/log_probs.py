"""Log-probabilities of tokens of prompts, of the rows that a step computes anyway.

vLLM's own ``prompt_logprobs`` would give them too, but for every token behind the prefix-cache hit,
with the logits of a whole chunk in memory at once, and with nothing written where the cache was
hit. Here only rows are turned into logits whose next token is asked for, a few at a time. They come
from the hidden states that the step has computed, whether it ran as code or as a CUDA graph.

Invariant: turning rows into logits is a collective of the ranks that share the heads, so which rows
a step takes follows from the scheduler's output and the spec alone; a rank that fails goes on with
the collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vllm_flashtrace.base.errors import TraceError, UnsupportedModelError
from vllm_flashtrace.trace.wire import ScoreSpec
from vllm_flashtrace.worker.fingerprint import WeightsSeen, numbers_of
from vllm_flashtrace.worker.recorder import Recorder
from vllm_flashtrace.worker.reports import FinishedLogProbs
from vllm_flashtrace.worker.step_rows import BatchRow
from vllm_flashtrace.worker.traced_model import TracedModel

ROWS = 64
"""Rows that are turned into logits at once: 39 MB of float32 with 152,000 tokens."""


@dataclass(slots=True, eq=False)
class LogProbRequest:
    """A request of which log-probabilities are being taken.

    Attributes:
        spec: What was asked for.
        rows: int64 ``[P]``, positions whose next token is asked for, ascending, on the CPU.
        rows_there: The same on the device.
        token_ids: int64 ``[P]`` on the device, the tokens behind them.
        log_probs: float32 ``[P]`` on the device; NaN where a row has not been computed.
        adapter: Id of the LoRA adapter that the request is computed with, or None.
        weights: Whether the model's weights were the same in all chunks.
        adapter_weights: Whether the adapter's were.
        next_position: Where the next chunk is expected to begin.
        failure: Why there will be no result, or None.
    """

    spec: ScoreSpec
    rows: Tensor
    rows_there: Tensor
    token_ids: Tensor
    log_probs: Tensor
    adapter: int | None
    weights: WeightsSeen = field(default_factory=WeightsSeen)
    adapter_weights: WeightsSeen = field(default_factory=WeightsSeen)
    next_position: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    failure: Exception | None = None

    def begin_chunk(self, row: BatchRow) -> None:
        """Counts a chunk that is about to be computed; a preempted request starts again."""
        if row.start != self.next_position:
            self.cached_tokens = row.start
            self.recomputed_tokens = 0
        self.next_position = row.stop
        self.recomputed_tokens += min(row.stop, self.spec.length) - row.start

    @property
    def weights_seen(self) -> Tensor:
        """int64 ``[2]`` on the device, as `Trace.weights_seen`."""
        adapter = None if self.adapter is None else self.adapter_weights
        numbers = numbers_of(self.weights, adapter)
        if numbers is None:
            raise ValueError("the weights of no step were noted")
        return numbers


class LogProbRecorder:
    """The requests of one worker of which log-probabilities are being taken."""

    def __init__(
        self, model: TracedModel | None, recorder: Recorder, *, refusal: str | None = None
    ) -> None:
        """Starts without a request.

        Args:
            model: The worker's model; None where it cannot be traced.
            recorder: Where results wait for pick-up.
            refusal: Why there is no model.
        """
        self._model = model
        self._recorder = recorder
        self._refusal = refusal
        self._requests: dict[str, LogProbRequest] = {}
        self._step: list[tuple[LogProbRequest, BatchRow]] = []

    def register(
        self, req_id: str, spec: ScoreSpec, token_ids: Sequence[int], adapter: int | None = None
    ) -> None:
        """Takes a new request; a spec that does not fit it becomes a failed result.

        A preempted request may come back as a new one, and goes on.
        """
        known = self._requests.get(req_id)
        if known is not None and known.spec.nonce == spec.nonce:
            return
        self._recorder.expire()
        self._recorder.expect(req_id, spec.nonce)
        try:
            if self._model is None:
                raise UnsupportedModelError(self._refusal or "unknown")
            if spec.length != len(token_ids):
                raise ValueError(f"spec is for {spec.length} tokens, not {len(token_ids)}")
            positions = spec.scored_positions()
            device = self._model.device
            with torch.inference_mode(False):  # They are written to with and without.
                self._requests[req_id] = LogProbRequest(
                    spec,
                    rows=positions - 1,
                    rows_there=(positions - 1).to(device),
                    token_ids=torch.tensor(token_ids)[positions].to(device),
                    log_probs=torch.full((len(positions),), torch.nan, device=device),
                    adapter=adapter,
                )
        except Exception as error:
            self._recorder.fail(req_id, error)

    def drop(self, req_ids: Iterable[str]) -> None:
        """Forgets requests that finished or were aborted."""
        if self._requests:
            for req_id in req_ids:
                self._requests.pop(req_id, None)

    def takes_part(self, scheduled: Mapping[str, int]) -> bool:
        """Whether a step computes tokens of one of the requests."""
        return bool(self._requests) and not self._requests.keys().isdisjoint(scheduled)

    @property
    def in_step(self) -> bool:
        """Whether the step that was begun last computes tokens of one of the requests."""
        return bool(self._step)

    def begin_step(self, batch: Sequence[BatchRow]) -> None:
        """Notes the rows of a step that is about to be computed, and the weights."""
        rows = [(self._requests[row.req_id], row) for row in batch if row.req_id in self._requests]
        self._step = rows
        if not rows or self._model is None:
            return
        number = self._model.fingerprint.take()
        for request, row in rows:
            request.weights.note(number)
            request.begin_chunk(row)

    def end_step(
        self,
        hidden_states: Tensor | None,
        compute_logits: Callable[[Tensor], Tensor | None],
        network: nn.Module,
    ) -> list[str]:
        """Takes the rows of the step that was begun last, after its forward pass.

        Args:
            hidden_states: ``[tokens, D]``, what the last layer gave; None on a pipeline stage
                that is not the last.
            compute_logits: Gives ``[rows, vocabulary]`` of hidden states ``[rows, D]``, or None on
                ranks without the logits.
            network: The model that it belongs to.

        Returns:
            The requests that the step finishes, whose results wait for pick-up from now on.
        """
        step, self._step = self._step, []
        finished = []
        for request, row in step:
            with torch.inference_mode():
                if hidden_states is not None:
                    self._take(request, row, hidden_states, compute_logits, network)
                self._note_adapter(request)
                if row.stop >= request.spec.length:
                    self._finish(row.req_id, request, hidden_states is not None)
                    finished.append(row.req_id)
        return finished

    def _take(
        self,
        request: LogProbRequest,
        row: BatchRow,
        hidden_states: Tensor,
        compute_logits: Callable[[Tensor], Tensor | None],
        network: nn.Module,
    ) -> None:
        first, last = request.rows.numpy().searchsorted((row.start, row.stop)).tolist()
        slot: int | None = None
        try:
            slot = self._slot(request.adapter)
        except Exception as error:
            request.failure = request.failure or error
        for start in range(first, last, ROWS):
            piece = slice(start, min(start + ROWS, last))
            try:
                rows = hidden_states[request.rows_there[piece] + (row.first_row - row.start)]
            except Exception as error:  # The other ranks wait for this one's part of the logits.
                request.failure = request.failure or error
                rows = hidden_states[: piece.stop - piece.start]
            try:
                with adapter_rows(network, slot):
                    logits = compute_logits(rows)
                if logits is not None:
                    request.log_probs[piece] = log_probs_of(logits, request.token_ids[piece])
            except Exception as error:
                request.failure = request.failure or error

    def _slot(self, adapter: int | None) -> int | None:
        if adapter is None:
            return None
        if self._model is None or self._model.slot_of is None:
            raise TraceError("recording_failed", "the adapters of this worker are not known")
        return self._model.slot_of(adapter)

    def _note_adapter(self, request: LogProbRequest) -> None:
        if request.adapter is None or self._model is None:
            return
        try:
            request.adapter_weights.note(self._model.adapter_number(request.adapter))
        except Exception as error:
            request.failure = request.failure or error

    def _finish(self, req_id: str, request: LogProbRequest, with_logits: bool) -> None:
        del self._requests[req_id]
        try:
            if request.failure is not None:
                raise request.failure
            assert self._model is not None
            log_probs = [request.log_probs] if with_logits else []
            copied = self._recorder.buffers.copy([request.weights_seen, *log_probs])
            part = self._model.part
            result = FinishedLogProbs(
                part, copied, request.recomputed_tokens, request.cached_tokens
            )
        except Exception as error:
            self._recorder.fail(req_id, error)
        else:
            self._recorder.store(req_id, result)


def log_probs_of(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Natural logarithms of the tokens' probabilities, float32 ``[R]``.

    Args:
        logits: ``[R, vocabulary]``.
        token_ids: int64 ``[R]``.
    """
    logits = logits.float()
    chosen = logits.gather(-1, token_ids[:, None]).squeeze(-1)
    return chosen - logits.logsumexp(-1)


@contextmanager
def adapter_rows(network: nn.Module, slot: int | None) -> Iterator[None]:
    """Within the block, logits are of rows that are all computed with one adapter, or none.

    With LoRA vLLM adds the adapter's part by the mapping of the rows that the step samples from,
    which others do not have.

    Args:
        network: The model; unchanged behind the block.
        slot: Where its modules hold the adapter; None for no adapter.
    """
    punica = _punica_of_logits(network)
    if punica is None:
        yield
        return

    def add_lora_logits(
        y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, **_: Any
    ) -> None:
        if slot is not None:
            a, b = lora_a[slot, 0].float(), lora_b[slot, 0].float()
            width = min(y.shape[-1], b.shape[0])
            y[:, :width] += scale * (x.float() @ a.T @ b[:width].T)

    punica.add_lora_logits = add_lora_logits
    try:
        yield
    finally:
        del punica.add_lora_logits


def _punica_of_logits(network: nn.Module) -> Any | None:
    for module in network.modules():
        if hasattr(module, "sharded_to_full_mapping"):
            return getattr(module, "punica_wrapper", None)
    return None
