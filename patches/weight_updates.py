"""Forgets what was derived from a model's weights when the weights change.

What it changes: after ``GPUModelRunner.reload_weights``, ``Worker.update_weights``,
``Worker.finish_weight_update``, ``Worker.reset_weights`` and ``Worker.wake_up``, also when one
fails half-way, what traces derived from weights is dropped, to be computed again when needed.

Why here: vLLM has no hook for weight changes, and on the CPU the packed weights cannot be compared.
A trace with the projections of old weights would be well-formed and wrong.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_flashtrace.patches._check import require_parameters
from vllm_flashtrace.worker.runner import existing_capture

_METHODS: tuple[tuple[type, str], ...] = (
    (GPUModelRunner, "reload_weights"),
    (Worker, "update_weights"),
    (Worker, "finish_weight_update"),
    (Worker, "reset_weights"),
    (Worker, "wake_up"),
)


def check() -> None:
    """Raises PatchError unless all methods exist."""
    for owner, name in _METHODS:
        require_parameters(getattr(owner, name, None), f"{owner.__name__}.{name}", "self")


def apply() -> None:
    """Wraps the methods."""
    for owner, name in _METHODS:
        setattr(owner, name, forgetting(getattr(owner, name)))


def forgetting(stock: Any) -> Any:
    """Wraps a method of a worker or runner so that derived weights are dropped after it."""

    @functools.wraps(stock)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return stock(self, *args, **kwargs)
        finally:
            capture = existing_capture(getattr(self, "model_runner", self))
            if capture is not None:
                capture.forget_weights()

    return wrapper
