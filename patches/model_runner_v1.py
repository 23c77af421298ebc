"""Lets the V1 model runner record traces.

What it changes: four methods of ``GPUModelRunner``, which the CPU runner inherits.
``execute_model`` first shows the scheduler's output to the capture.
``_determine_batch_execution_and_padding`` keeps a step with target rows of a trace out of CUDA
graphs, or out of all but piecewise ones where a second set of these was captured, see
``graph_capture``. ``_model_forward`` runs such a step with an observer. Before ``sample_tokens``
log-probabilities are taken of the hidden states in ``execute_model_state``, and to its output the
results that the step finished are added; see ``trace_results``. Each always calls the stock method;
the only arguments that change are ``force_eager`` or ``force_uniform_decode``.

Why here: vLLM has no public hook around a step. It documents ``_model_forward`` as the method to
override for inspecting the forward pass; it runs with the forward context set and the requests' KV
blocks held.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.block_table import BlockTable
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.utils import AttentionGroup

from vllm_flashtrace.patches._check import (
    require_fields,
    require_keyword,
    require_parameters,
    require_tuple_fields,
)
from vllm_flashtrace.patches.trace_results import with_results
from vllm_flashtrace.worker.observer import observing
from vllm_flashtrace.worker.rank_agreement import replays_pieces
from vllm_flashtrace.worker.runner import batch_rows_v1, existing_capture, observe_step


def check() -> None:
    """Raises PatchError unless the methods have the expected parameters."""
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
    require_parameters(
        getattr(GPUModelRunner, "sample_tokens", None),
        "GPUModelRunner.sample_tokens",
        *("self", "grammar_output"),
    )
    state = getattr(gpu_model_runner, "ExecuteModelState", None)
    require_tuple_fields(state, "ExecuteModelState", "hidden_states")
    dispatch = getattr(GPUModelRunner, "_determine_batch_execution_and_padding", None)
    require_parameters(
        dispatch, "GPUModelRunner._determine_batch_execution_and_padding", "self", "num_tokens"
    )
    for keyword in ("force_eager", "force_uniform_decode"):
        require_keyword(dispatch, "GPUModelRunner._determine_batch_execution_and_padding", keyword)
    # Blocks are counted in one of two ways, see `worker.runner.kernel_block_table`.
    if getattr(BlockTable, "map_to_kernel_blocks", None) is None:
        require_fields(AttentionGroup, "kernel_block_size", "kernel_block_stride", "kv_cache_spec")


def apply() -> None:
    """Wraps the methods."""
    stock_execute = GPUModelRunner.execute_model
    stock_dispatch = GPUModelRunner._determine_batch_execution_and_padding
    stock_forward = GPUModelRunner._model_forward

    @functools.wraps(stock_execute)
    def execute_model(
        self: GPUModelRunner, scheduler_output: Any, intermediate_tensors: Any = None
    ) -> Any:
        capture = observe_step(self, scheduler_output)
        try:
            return stock_execute(self, scheduler_output, intermediate_tensors)
        finally:
            if capture is not None:
                capture.forget_step()

    @functools.wraps(stock_dispatch)
    def _determine_batch_execution_and_padding(
        self: GPUModelRunner, *args: Any, **kwargs: Any
    ) -> Any:
        capture = existing_capture(self)
        if capture is not None and capture.records_step:
            if replays_pieces(self):
                kwargs["force_uniform_decode"] = False  # Full graphs are of uniform batches.
            else:
                kwargs["force_eager"] = True
        return stock_dispatch(self, *args, **kwargs)

    @functools.wraps(stock_forward)
    def _model_forward(self: GPUModelRunner, *args: Any, **kwargs: Any) -> Any:
        capture = existing_capture(self)
        if capture is None:
            return stock_forward(self, *args, **kwargs)
        observer = capture.begin_forward(lambda groups: batch_rows_v1(self, groups))
        with observing(observer) if observer is not None else nullcontext():
            output = stock_forward(self, *args, **kwargs)
        capture.end_forward(observer)
        return output

    GPUModelRunner.execute_model = execute_model
    GPUModelRunner.sample_tokens = with_results(GPUModelRunner.sample_tokens)
    GPUModelRunner._determine_batch_execution_and_padding = _determine_batch_execution_and_padding
    GPUModelRunner._model_forward = _model_forward
