"""Readies a worker for traces while it starts: compiles their kernels and proves the model.

What it changes: ``compile_or_warm_up_model`` of the platform's worker first compiles every Triton
kernel that traces of the model can launch, on a GPU, and then runs the probe of
``worker.start_proof`` through the worker. Nothing of the probe stays, see there.

Why here: the weights are loaded and the KV cache is bound, and no request has been scheduled, so
that its blocks are free. The stock method then captures CUDA graphs, behind whose backs a later
probe might resize a workspace; seeds the random numbers; and starts vLLM's JIT monitor, which warns
of each later compilation or, with ``--jit-monitor-mode error``, raises. vLLM's own warm-up takes no
kernels of others, and ``_dummy_run`` writes no keys and values.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm_flashtrace.patches._check import require_parameters
from vllm_flashtrace.worker.start_proof import prove
from vllm_flashtrace.worker.warm_up import warm_up_kernels

_METHOD = "compile_or_warm_up_model"


def check() -> None:
    """Raises PatchError unless the methods exist."""
    worker = _worker_class()
    for name, parameters in {
        _METHOD: ("self",),
        "execute_model": ("self", "scheduler_output"),
        "sample_tokens": ("self", "grammar_output"),
    }.items():
        method = getattr(worker, name, None)
        require_parameters(method, f"{worker.__name__}.{name}", *parameters)


def apply() -> None:
    """Wraps the method."""
    worker = _worker_class()
    setattr(worker, _METHOD, starting(getattr(worker, _METHOD)))


def starting(stock: Any) -> Any:
    """Wraps a worker's method so that it is readied for traces before."""

    @functools.wraps(stock)
    def compile_or_warm_up_model(self: Any) -> Any:
        warm_up_kernels(self)
        prove(self)
        return stock(self)

    return compile_or_warm_up_model


def _worker_class() -> Any:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    return Worker
