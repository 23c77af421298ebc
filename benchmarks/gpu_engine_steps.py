"""Counts in the worker which steps replay CUDA graphs, and which hold target rows of a trace.

Invariant: the runner's own choice is recorded after it is made, and nothing about it is changed.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import Counter
from typing import Any

_V2_MODULE = "vllm.v1.worker.gpu.model_runner"
_V2_DISPATCH = "dispatch_cg_and_sync_dp"
_V1_DISPATCH = "_determine_batch_execution_and_padding"

_modes: Counter[str] = Counter()


EAGER_DECODE = "decode without trace, NONE"
"""Steps that should have replayed a CUDA graph."""


def attention_backend(worker: Any) -> str:
    """Runs in the worker: name of the first layer's attention backend."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    backend = next(layer.attn_backend for layer in layers if hasattr(layer, "attn_backend"))
    return str(backend.get_name())


def start_counting(worker: Any) -> str:
    """Runs in the worker: wraps the choice of a CUDA graph; returns which runner it is."""
    runner = worker.model_runner
    if type(runner).__module__ == _V2_MODULE:
        module = sys.modules[_V2_MODULE]
        stock = getattr(module, _V2_DISPATCH)
        setattr(module, _V2_DISPATCH, _counting(stock, runner, lambda chosen: chosen[0].cg_mode))
        return "v2"
    # On the object, in front of the plugin's wrapper, which sits on the class.
    stock = getattr(runner, _V1_DISPATCH)
    setattr(runner, _V1_DISPATCH, _counting(stock, runner, lambda chosen: chosen[0]))
    return "v1"


def take_counts(worker: Any) -> dict[str, int]:
    """Runs in the worker: steps since the last call, as ``{"decode with trace, NONE": steps}``.

    A step in which every request has one token is a decode; others are prefills.
    """
    counts = dict(_modes)
    _modes.clear()
    return counts


def _counting(stock: Any, runner: Any, mode_of: Any) -> Any:
    from vllm_flashtrace.worker.runner import existing_capture

    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        chosen = stock(*args, **kwargs)
        capture = existing_capture(runner)
        traced = capture is not None and capture.records_step
        given = signature.bind(*args, **kwargs).arguments
        kind = "decode" if given["num_tokens"] == given["num_reqs"] else "prefill"
        _modes[f"{kind} {'with' if traced else 'without'} trace, {mode_of(chosen).name}"] += 1
        return chosen

    return dispatch
