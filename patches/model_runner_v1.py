"""Lets the V1 model runner record traces.

What it changes: ``GPUModelRunner.execute_model`` (which the CPU runner inherits) first shows the
scheduler's output to the capture, and ``_model_forward`` runs with an observer when the step holds
target rows of a trace. Both always call the stock method with unchanged arguments.

Why here: vLLM has no public hook around a step; ``_model_forward`` is documented in vLLM as the
method to override for inspecting the forward pass, and runs with the forward context set and the
requests' KV blocks held.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm_flashtrace.patches._check import require_parameters

from vllm_flashtrace.adapter.runner_v1 import RunnerCapture
from vllm_flashtrace.capture.observer import observing
from vllm_flashtrace.wire import sealed_spec

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_flashtrace_capture"


def check() -> None:
    """Raises PatchError unless both methods have the expected parameters."""
    require_parameters(
        getattr(GPUModelRunner, "execute_model", None),
        "GPUModelRunner.execute_model",
        *("self", "scheduler_output", "intermediate_tensors"),
    )
    require_parameters(
        getattr(GPUModelRunner, "_model_forward", None),
        "GPUModelRunner._model_forward",
        *("self", "input_ids", "positions", "intermediate_tensors", "inputs_embeds"),
    )


def apply() -> None:
    """Wraps the two methods."""
    stock_execute = GPUModelRunner.execute_model
    stock_forward = GPUModelRunner._model_forward

    @functools.wraps(stock_execute)
    def execute_model(
        self: GPUModelRunner, scheduler_output: Any, intermediate_tensors: Any = None
    ) -> Any:
        capture = existing_capture(self)
        if capture is None and _has_trace(scheduler_output):
            capture = capture_of(self)
        if capture is not None:
            capture.observe(scheduler_output)
        return stock_execute(self, scheduler_output, intermediate_tensors)

    @functools.wraps(stock_forward)
    def _model_forward(self: GPUModelRunner, *args: Any, **kwargs: Any) -> Any:
        capture = existing_capture(self)
        if capture is None or (observer := capture.begin_forward()) is None:
            return stock_forward(self, *args, **kwargs)
        with observing(observer):
            output = stock_forward(self, *args, **kwargs)
        capture.end_forward(observer)
        return output

    GPUModelRunner.execute_model = execute_model
    GPUModelRunner._model_forward = _model_forward


def capture_of(runner: GPUModelRunner) -> RunnerCapture:
    """The runner's capture, made at first use (the model must be loaded)."""
    capture = existing_capture(runner)
    if capture is None:
        capture = RunnerCapture(runner)
        setattr(runner, _ATTRIBUTE, capture)
    return capture


def existing_capture(runner: Any) -> RunnerCapture | None:
    """The runner's capture, if one was made."""
    return getattr(runner, _ATTRIBUTE, None)


def _has_trace(scheduler_output: Any) -> bool:
    return any(
        new.sampling_params is not None and sealed_spec(new.sampling_params.extra_args) is not None
        for new in scheduler_output.scheduled_new_reqs
    )
