"""Lets the V2 model runner record traces.

What it changes: four functions of ``vllm.v1.worker.gpu.model_runner``.
``GPUModelRunner.execute_model`` first shows the scheduler's output to the capture; dummy runs are
not touched. Until it returns, ``dispatch_cg_and_sync_dp`` keeps the step out of CUDA graphs if it
computes target rows of a trace, or out of all but piecewise ones where a second set of these was
captured, see ``graph_capture``; and ``GPUModelRunner.prepare_attn``, which knows the batch and its
block tables, sets the observer. Before ``GPUModelRunner.sample_tokens`` log-probabilities are taken
of the hidden states in ``execute_model_state``, and to its output the results that the step
finished are added; see ``trace_results``. Each always calls the stock function; the only arguments
that change are ``need_eager`` or those that tell a batch of decodes.

Why here: vLLM has no public hook around a step. A step outside CUDA graphs still runs compiled code
(``skip_compiled`` is left alone), because attention and taps are custom operators inside it.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_flashtrace.patches._check import (
    require_keyword,
    require_parameters,
    require_tuple_fields,
)
from vllm_flashtrace.patches.trace_results import with_results
from vllm_flashtrace.worker.observer import observing
from vllm_flashtrace.worker.rank_agreement import replays_pieces
from vllm_flashtrace.worker.runner import (
    RunnerCapture,
    StepObserver,
    batch_rows_v2,
    observe_step,
)

_METHODS: dict[str, tuple[str, ...]] = {
    "execute_model": ("self", "scheduler_output", "intermediate_tensors", "dummy_run"),
    "prepare_attn": ("self", "input_batch"),
    "sample_tokens": ("self", "grammar_output"),
}
_DISPATCH = "dispatch_cg_and_sync_dp"
_DISPATCHED = ("cudagraph_manager", "num_reqs", "num_tokens", "uniform_token_count")


class _Step:
    """A step of a runner that has, or once had, a trace."""

    def __init__(self, runner: GPUModelRunner, capture: RunnerCapture) -> None:
        self.runner = runner
        self.capture = capture
        self.observer: StepObserver | None = None
        self.observed = ExitStack()

    def begin_forward(self, input_batch: Any, block_tables: Sequence[Any]) -> None:
        """Sets the observer if the step computes target rows."""
        self.observer = self.capture.begin_forward(
            lambda groups: batch_rows_v2(self.runner, input_batch, block_tables, groups)
        )
        if self.observer is not None:
            self.observed.enter_context(observing(self.observer))


# The step that is running, if it is to be watched; a worker runs one at a time.
_running: _Step | None = None


def check() -> None:
    """Raises PatchError unless the methods and the function have the expected parameters."""
    for name, parameters in _METHODS.items():
        method = getattr(GPUModelRunner, name, None)
        require_parameters(method, f"GPUModelRunner.{name} (V2)", *parameters)
    state = getattr(model_runner, "ExecuteModelState", None)
    require_tuple_fields(state, "ExecuteModelState (V2)", "hidden_states")
    dispatch = getattr(model_runner, _DISPATCH, None)
    require_parameters(dispatch, _DISPATCH, *_DISPATCHED)
    for keyword in ("max_query_len", "need_eager", "uniform_decode"):
        require_keyword(dispatch, _DISPATCH, keyword)


def apply() -> None:
    """Wraps the methods and the function."""
    GPUModelRunner.execute_model = execute_wrapper(GPUModelRunner.execute_model)
    GPUModelRunner.prepare_attn = prepare_wrapper(GPUModelRunner.prepare_attn)
    GPUModelRunner.sample_tokens = with_results(GPUModelRunner.sample_tokens)
    setattr(model_runner, _DISPATCH, dispatch_wrapper(getattr(model_runner, _DISPATCH)))


def execute_wrapper(stock: Any) -> Any:
    """``execute_model`` with a step that the other wrappers know of."""

    @functools.wraps(stock)
    def execute_model(
        self: GPUModelRunner,
        scheduler_output: Any,
        intermediate_tensors: Any = None,
        dummy_run: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        arguments = (self, scheduler_output, intermediate_tensors, dummy_run, *args)
        capture = None if dummy_run else observe_step(self, scheduler_output)
        if capture is None:
            return stock(*arguments, **kwargs)
        global _running
        _running = step = _Step(self, capture)
        try:
            with step.observed:
                result = stock(*arguments, **kwargs)
            capture.end_forward(step.observer)
            return result
        finally:
            _running = None
            capture.forget_step()

    return execute_model


def prepare_wrapper(stock: Any) -> Any:
    """``prepare_attn`` followed by the beginning of a watched forward pass."""

    @functools.wraps(stock)
    def prepare_attn(self: GPUModelRunner, input_batch: Any) -> Any:
        prepared = stock(self, input_batch)
        if _running is not None and _running.runner is self:
            _running.begin_forward(input_batch, prepared[0])
        return prepared

    return prepare_attn


def dispatch_wrapper(stock: Any) -> Any:
    """``dispatch_cg_and_sync_dp`` that forces steps with target rows out of stock CUDA graphs."""

    @functools.wraps(stock)
    def dispatch_cg_and_sync_dp(
        cudagraph_manager: Any,
        num_reqs: int,
        num_tokens: int,
        uniform_token_count: int | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if _running is not None and _running.capture.records_step:
            if replays_pieces(cudagraph_manager):
                # Full graphs are of batches of decodes. Ranks agree on a mode for which all are.
                uniform_token_count = None
                kwargs.update(max_query_len=None, uniform_decode=False)
            else:
                kwargs["need_eager"] = True
        return stock(cudagraph_manager, num_reqs, num_tokens, uniform_token_count, *args, **kwargs)

    return dispatch_cg_and_sync_dp
