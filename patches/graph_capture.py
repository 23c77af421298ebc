"""Captures CUDA graphs for steps with target rows, if the option ``trace_graphs`` asks for them.

What it changes: ``capture_model`` of both model runners notes for which runner graphs are captured;
``CudaGraphManager.capture`` (V2) and ``GPUModelRunner._capture_cudagraphs`` (V1) capture a second
set behind vLLM's own, by the same function; see ``worker.trace_graphs``. Only then, and never
without the option, ``CUDAGraphWrapper.__call__`` is replaced: it runs an observed step's pieces by
that set, and does what it did for all others.

Why here: vLLM has no hook for graphs of others. Its own loops know how inputs, adapters, streams
and memory pools are set up for a capture, and their memory is what its profile measures (V2).

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.compilation.cuda_graph import CUDAGraphEntry, CUDAGraphWrapper
from vllm.config import CUDAGraphMode
from vllm.forward_context import (
    BatchDescriptor,
    ForwardContext,
    is_forward_context_available,
)
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_flashtrace.patches._check import (
    PatchError,
    require_fields,
    require_keyword,
    require_parameters,
)
from vllm_flashtrace.worker.observer import current
from vllm_flashtrace.worker.rank_agreement import announce
from vllm_flashtrace.worker.trace_graphs import (
    GraphSets,
    can_capture,
    is_alone,
    is_asked_for,
    run_piece,
)

_PIECES = CUDAGraphMode.PIECEWISE

# The runner whose graphs are being captured, if it gets the second set too, and what is left to do
# behind the capture (V1).
_capturing: Any = None
_captured_v1: Callable[[], None] | None = None


def check() -> None:
    """Raises PatchError unless the methods have the expected parameters."""
    for kind, name, parameters in (
        (GPUModelRunner, "capture_model", ("self",)),
        (GPUModelRunner, "_dummy_run", ("self", "num_tokens", "cudagraph_runtime_mode")),
        (
            GPUModelRunner,
            "_capture_cudagraphs",
            ("self", "batch_descriptors", "cudagraph_runtime_mode"),
        ),
        (GPUModelRunnerV2, "capture_model", ("self",)),
        (CudaGraphManager, "capture", ("self", "create_forward_fn")),
        (CUDAGraphWrapper, "__call__", ("self",)),
    ):
        require_parameters(getattr(kind, name, None), f"{kind.__name__}.{name}", *parameters)
    for keyword in ("is_graph_capturing", "skip_eplb", "remove_lora", "num_active_loras"):
        require_keyword(GPUModelRunner._dummy_run, "GPUModelRunner._dummy_run", keyword)
    require_fields(CUDAGraphEntry, "cudagraph", "batch_descriptor")
    require_fields(BatchDescriptor, "num_tokens", "num_active_loras")
    require_fields(ForwardContext, "batch_descriptor", "cudagraph_runtime_mode")
    if not hasattr(CUDAGraphWrapper, "_all_instances"):
        raise PatchError("CUDAGraphWrapper has no _all_instances")
    if getattr(CudagraphDispatcher, "get_capture_descs", None) is None:
        raise PatchError("CudagraphDispatcher has no get_capture_descs")


def apply() -> None:
    """Wraps the methods that capture."""
    for kind in (GPUModelRunner, GPUModelRunnerV2):
        kind.capture_model = capture_model_wrapper(kind.capture_model)
    GPUModelRunner._capture_cudagraphs = capture_wrapper_v1(GPUModelRunner._capture_cudagraphs)
    CudaGraphManager.capture = capture_wrapper_v2(CudaGraphManager.capture)


def capture_model_wrapper(stock: Any) -> Any:
    """``capture_model`` that lets the second set be captured too, if it is asked for."""

    @functools.wraps(stock)
    def capture_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        manager = getattr(self, "cudagraph_manager", None)
        mode = self.compilation_config.cudagraph_mode if manager is None else manager.cudagraph_mode
        if not is_asked_for(self.vllm_config, mode):
            return stock(self, *args, **kwargs)
        global _capturing, _captured_v1
        _capturing = self
        try:
            taken = stock(self, *args, **kwargs)
            if _captured_v1 is not None:
                _captured_v1()
            return taken
        finally:
            _capturing = _captured_v1 = None

    return capture_model


def capture_wrapper_v2(stock: Any) -> Any:
    """``CudaGraphManager.capture`` followed by the capture of the second set."""

    @functools.wraps(stock)
    def capture(self: CudaGraphManager, create_forward_fn: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, create_forward_fn, *args, **kwargs)
        runner = _capturing
        if runner is None or self is not runner.cudagraph_manager:  # A speculator's.
            return
        own = self._capture_descs.get(_PIECES, [])
        if own and can_capture(runner):
            use_second_set()
            sets = GraphSets(is_alone(self.vllm_config))

            def create(desc: Any, warmup: bool) -> Any:
                run = create_forward_fn(desc, warmup=warmup)
                return lambda mode: sets.capture(run, mode)

            descs, self._capture_descs = self._capture_descs, {_PIECES: own}
            try:
                stock(self, create, "Capturing CUDA graphs of trace steps")
            finally:
                self._capture_descs = descs
            # Not before: with several ranks addresses are exchanged when the capture is over.
            for number, desc in enumerate(own):
                sets.try_out(number, create_forward_fn(desc, warmup=True))
            sets.report()
        announce(self)

    return capture


def capture_wrapper_v1(stock: Any) -> Any:
    """``_capture_cudagraphs``, the last time followed by the capture of the second set."""

    @functools.wraps(stock)
    def _capture_cudagraphs(
        self: GPUModelRunner,
        batch_descriptors: list[BatchDescriptor],
        cudagraph_runtime_mode: CUDAGraphMode,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        stock(self, batch_descriptors, cudagraph_runtime_mode, *args, **kwargs)
        groups = self.cudagraph_dispatcher.get_capture_descs()
        if _capturing is not self or cudagraph_runtime_mode != groups[-1][0]:
            return
        own = dict(groups).get(_PIECES, [])
        if own and can_capture(self):
            use_second_set()
            sets = GraphSets(is_alone(self.vllm_config))
            for desc in own:
                run = functools.partial(_run_v1, self, desc)
                for mode in (CUDAGraphMode.NONE, _PIECES):
                    sets.capture(run, mode)
                    torch.accelerator.synchronize()
            self.maybe_remove_all_loras(self.lora_config)
            global _captured_v1
            _captured_v1 = functools.partial(_try_out_v1, self, own, sets)
        announce(self)

    return _capture_cudagraphs


def _try_out_v1(runner: GPUModelRunner, descs: list[BatchDescriptor], sets: GraphSets) -> None:
    with torch.inference_mode():
        for number, desc in enumerate(descs):
            sets.try_out(number, functools.partial(_run_v1, runner, desc, captures=False))
    runner.maybe_remove_all_loras(runner.lora_config)
    sets.report()


def _run_v1(
    runner: GPUModelRunner, desc: BatchDescriptor, mode: CUDAGraphMode, captures: bool = True
) -> None:
    """As `GPUModelRunner._warmup_and_capture` runs a size of piecewise graphs."""
    runner._dummy_run(
        desc.num_tokens,
        cudagraph_runtime_mode=mode,
        uniform_decode=False,
        allow_microbatching=False,
        skip_eplb=True,
        remove_lora=False,
        num_active_loras=desc.num_active_loras,
        is_graph_capturing=captures and mode == _PIECES,
    )


def use_second_set() -> None:
    """Has observed steps run their pieces by the second set, in this process, from now on."""
    stock = CUDAGraphWrapper.__call__
    if getattr(stock, "__wrapped__", None) is not None:
        return

    @functools.wraps(stock)
    def __call__(self: CUDAGraphWrapper, *args: Any, **kwargs: Any) -> Any:
        observer = current()
        # A vision encoder's pieces run without a context.
        graphs = self.runtime_mode == _PIECES and is_forward_context_available()
        if observer is None or not graphs:
            return stock(self, *args, **kwargs)
        return run_piece(self, stock, observer, args, kwargs)

    CUDAGraphWrapper.__call__ = __call__
