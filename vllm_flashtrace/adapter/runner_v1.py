"""Connects a V1 model runner with the recorder.

Invariant: outside :meth:`RunnerCapture.tapped` the model carries no hook and no attention layer has
a recorder, so a step without traces runs exactly vLLM's code.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_flashtrace.adapter.cpu_model import CPUTracedModel
from vllm_flashtrace.adapter.model import TracedLayer
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
        except Exception as error:
            self._model = None
            self.refusal = error.message if isinstance(error, FlashTraceError) else repr(error)
            logger.warning("FlashTrace: this model is served without attribution: %s", self.refusal)
        self.recorder = Recorder(self._model or _NoModel(self.refusal), ttl)

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

    def begin_forward(self) -> StepRecorder | None:
        """The recorder of the forward pass about to run, or None; must never raise."""
        try:
            active = self.recorder.active_requests
            if active.isdisjoint(self._scheduled):
                return None
            return self.recorder.begin_step(list(self._batch()))
        except Exception as error:
            logger.exception("FlashTrace: could not prepare a step")
            self._fail_scheduled(error)
            return None

    def end_forward(self, step: StepRecorder) -> None:
        """Finishes traces while their KV blocks are held; must never raise."""
        try:
            self.recorder.finish_step(step)
        except Exception as error:
            logger.exception("FlashTrace: could not finish a step")
            self._fail_scheduled(error)

    @contextmanager
    def tapped(self, step: StepRecorder) -> Iterator[None]:
        """Runs the enclosed forward pass eagerly, with taps on every layer.

        Compiled code does not call module hooks, hence the eager forward.
        """
        assert self._model is not None
        with ExitStack() as stack:
            try:
                for layer in self._model.layers:
                    self._tap(stack, step, layer)
                get_forward_context().skip_compiled = True
            except Exception as error:
                logger.exception("FlashTrace: could not place taps")
                self._fail_scheduled(error)
            yield

    def _tap(self, stack: ExitStack, step: StepRecorder, layer: TracedLayer) -> None:
        assert self._model is not None
        signature = inspect.signature(layer.decoder.forward)
        read_keys = self._model.key_reader(layer)
        scale = layer.attention.impl.scale

        def before_layer(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = signature.bind(*args, **kwargs).arguments
            residual = arguments["residual"]
            hidden = arguments["hidden_states"]
            step.record_residual(layer.index, hidden, *(() if residual is None else (residual,)))

        def after_block(_: nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> None:
            step.record_attention_output(layer.index, output)

        def attention(query: torch.Tensor) -> None:
            step.record_attention(layer.index, query, read_keys, scale)

        pre = layer.decoder.register_forward_pre_hook(self._guard(before_layer), with_kwargs=True)
        stack.callback(pre.remove)
        stack.callback(layer.block.register_forward_hook(self._guard(after_block)).remove)
        layer.attention.impl.on_attention = self._guard(attention)
        stack.callback(setattr, layer.attention.impl, "on_attention", None)

    def _guard(self, hook: Callable[..., None]) -> Callable[..., None]:
        """Turns an exception in a hook into failed traces instead of a dead engine."""

        def guarded(*args: Any) -> None:
            try:
                hook(*args)
            except Exception as error:
                self._fail_scheduled(error)

        return guarded

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


class _NoModel:
    """Stands in where the model cannot be traced; every use says why."""

    def __init__(self, reason: str | None) -> None:
        self._reason = reason or "unknown"

    def __getattr__(self, _: str) -> Any:
        raise UnsupportedModelError(self._reason)
