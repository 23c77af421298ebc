"""Compiles the kernels of traces while a GPU worker starts.

What it changes: ``Worker.compile_or_warm_up_model`` first compiles every Triton kernel that traces
of the model can launch. No kernel runs and nothing that is computed changes.

Why here: the method ends by starting vLLM's JIT monitor, which warns of each later compilation or,
with ``--jit-monitor-mode error``, raises. vLLM's own warm-up takes no kernels of others.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from vllm_flashtrace.patches._check import require_parameters
from vllm_flashtrace.worker.warm_up import warm_up_kernels

_METHOD = "compile_or_warm_up_model"


def check() -> None:
    """Raises PatchError unless the method exists."""
    require_parameters(getattr(Worker, _METHOD, None), f"Worker.{_METHOD}", "self")


def apply() -> None:
    """Wraps the method."""
    setattr(Worker, _METHOD, warming_up(getattr(Worker, _METHOD)))


def warming_up(stock: Any) -> Any:
    """Wraps a worker's method so that the kernels of traces are compiled before it."""

    @functools.wraps(stock)
    def compile_or_warm_up_model(self: Any) -> Any:
        warm_up_kernels(self)
        return stock(self)

    return compile_or_warm_up_model
