"""Connects a V1 model runner with the recorder.

Invariant: nothing here raises into the runner, and a step without target rows has no observer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_flashtrace.accumulator_budget import AccumulatorBudget, accumulator_limit_bytes
from vllm_flashtrace.adapter.cpu_model import CPUTracedModel
from vllm_flashtrace.capture.recorder import Recorder
from vllm_flashtrace.capture.step import BatchRow, StepRecorder
from vllm_flashtrace.config import FlashTraceConfig
from vllm_flashtrace.errors import FlashTraceError, UnsupportedModelError
from vllm_flashtrace.wire import sealed_spec

logger = logging.getLogger(__name__)


class RunnerCapture:
    """One model runner's traces."""

    def __init__(self, runner: GPUModelRunner) -> None:
        self._runner = runner
        self._scheduled: dict[str, int] = {}
        self.refusal: str | None = None
        self._model: CPUTracedModel | None = None
        ttl = FlashTraceConfig().result_ttl_seconds
        budget: AccumulatorBudget | None = None
        try:
            config = FlashTraceConfig.from_additional_config(runner.vllm_config.additional_config)
            ttl = config.result_ttl_seconds
            if runner.device.type != "cpu":
                raise UnsupportedModelError(f"traces are not supported on {runner.device.type}")
            self._model = CPUTracedModel(runner.get_model(), runner.vllm_config)
            groups = len(runner.kv_cache_config.kv_cache_groups)
            if groups != 1:
                raise UnsupportedModelError(
                    f"traces are not supported with {groups} KV cache groups"
                )
            limit = accumulator_limit_bytes(config.max_accumulator_mib)
            budget = AccumulatorBudget.of_model(limit, self._model.shape)
        except Exception as error:
            self._model = None
            self.refusal = error.message if isinstance(error, FlashTraceError) else repr(error)
            logger.warning("FlashTrace: this model is served without attribution: %s", self.refusal)
        self.recorder = Recorder(self._model or _NoModel(self.refusal), ttl, budget)

    def forget_weights(self) -> None:
        """Drops what was derived from the model's weights."""
        if self._model is not None:
            self._model.forget_weights()

    def observe(self, scheduler_output: SchedulerOutput) -> None:
        """Learns about new and finished requests; must never raise."""
        self._scheduled = {}
        try:
            self.recorder.drop(scheduler_output.finished_req_ids)
            for new in scheduler_output.scheduled_new_reqs:
                params = new.sampling_params
                sealed = sealed_spec(params.extra_args) if params is not None else None
                if sealed is not None:
                    self.recorder.register(new.req_id, sealed, len(new.prompt_token_ids or ()))
            self._scheduled = scheduler_output.num_scheduled_tokens
        except Exception:
            logger.exception("FlashTrace: could not read the scheduler's output")

    def begin_forward(self) -> StepObserver | None:
        """What watches the forward pass about to run, or None; must never raise."""
        try:
            active = self.recorder.active_requests
            if active.isdisjoint(self._scheduled):
                return None
            step = self.recorder.begin_step(list(self._batch()))
            if step is None or self._model is None:
                return None
            return StepObserver(self._model, step, self._fail_scheduled)
        except Exception as error:
            logger.exception("FlashTrace: could not prepare a step")
            self._fail_scheduled(error)
            return None

    def end_forward(self, observer: StepObserver) -> None:
        """Finishes traces while their KV blocks are held; must never raise."""
        try:
            self.recorder.finish_step(observer.step)
            observer.model.end_step()
        except Exception as error:
            logger.exception("FlashTrace: could not finish a step")
            self._fail_scheduled(error)

    def _fail_scheduled(self, error: BaseException) -> None:
        for req_id in self.recorder.active_requests.intersection(self._scheduled):
            self.recorder.fail(req_id, error)

    def _batch(self) -> Iterator[BatchRow]:
        """The step's requests in the order of the runner's flattened tokens."""
        batch = self._runner.input_batch
        first_row = 0
        for index, req_id in enumerate(batch.req_ids):
            count = self._scheduled[req_id]
            start = int(batch.num_computed_tokens_cpu[index])
            yield BatchRow(req_id, index, first_row, start, start + count)
            first_row += count


class StepObserver:
    """Shows a forward pass to a step's recorder; an exception there becomes failed traces."""

    def __init__(
        self, model: CPUTracedModel, step: StepRecorder, fail: Callable[[BaseException], None]
    ) -> None:
        self.model = model
        self.step = step
        self._fail = fail

    def on_attention(self, layer_name: str, query: torch.Tensor) -> None:
        """See :class:`~vllm_flashtrace.capture.observer.ForwardObserver`."""
        try:
            layer = self.model.layer_index(layer_name)
            if layer is not None:
                self.step.record_attention(layer, query)
        except Exception as error:
            self._fail(error)

    def on_residual(self, update: torch.Tensor, residual: torch.Tensor) -> None:
        """See :class:`~vllm_flashtrace.capture.observer.ForwardObserver`."""
        try:
            self.step.record_residual(update, residual)
        except Exception as error:
            self._fail(error)


class _NoModel:
    """Stands in where the model cannot be traced; every use says why."""

    def __init__(self, reason: str | None) -> None:
        self._reason = reason or "unknown"

    def __getattr__(self, _: str) -> Any:
        raise UnsupportedModelError(self._reason)
