"""Faults injected into a worker process, one per phase of a trace."""

from __future__ import annotations

import importlib
from typing import Any


def _holder(module: str, owner: str | None) -> Any:
    found: Any = importlib.import_module(module)
    return found if owner is None else getattr(found, owner)


def break_function(_: Any, module: str, owner: str | None, name: str) -> None:
    """Runs in the worker: makes ``module[.owner].name`` raise."""
    holder = _holder(module, owner)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"injected into {name}")

    broken.original = getattr(holder, name)  # type: ignore[attr-defined]
    setattr(holder, name, broken)


def mend_function(_: Any, module: str, owner: str | None, name: str) -> None:
    """Takes a fault back, if there is one."""
    holder = _holder(module, owner)
    broken = getattr(holder, name)
    if hasattr(broken, "original"):
        setattr(holder, name, broken.original)


def break_next_call(worker: Any, module: str, owner: str | None, name: str) -> None:
    """Runs in the worker: makes ``module[.owner].name`` raise once; ``injected_faults`` counts."""
    holder = _holder(module, owner)
    original = getattr(holder, name)
    if hasattr(original, "original"):
        return  # It has not been called since.

    def broken(*args: Any, **kwargs: Any) -> Any:
        setattr(holder, name, original)
        worker.injected_faults = injected_faults(worker) + 1
        raise RuntimeError(f"injected into {name}")

    broken.original = original  # type: ignore[attr-defined]
    setattr(holder, name, broken)


def injected_faults(worker: Any) -> int:
    """Runs in the worker: how many calls :func:`break_next_call` has made raise."""
    return int(getattr(worker, "injected_faults", 0))


CAPTURE = "vllm_flashtrace.worker"
PHASES = {
    "registration": (f"{CAPTURE}.recorder", None, "Trace"),
    "batch": ("vllm_flashtrace.patches.model_runner_v1", None, "batch_rows_v1"),
    "observer": ("vllm_flashtrace.worker.runner", None, "StepObserver"),
    "chunk": (f"{CAPTURE}.recorded_trace", "Trace", "begin_chunk"),
    "row plan": ("vllm_flashtrace.worker.cpu_model", "CPUTracedModel", "plan_rows"),
    "attention": ("vllm_flashtrace.core.attention", "TargetRowBlocks", "add"),
    "key read": ("vllm_flashtrace.worker.cpu_model", None, "read_keys"),
    "value read": ("vllm_flashtrace.worker.cpu_model", None, "read_values"),
    "residual": (f"{CAPTURE}.step", "StepRecorder", "record_update"),
    "proximity": ("vllm_flashtrace.worker.cpu_model", None, "replace_by_proximities"),
    "output projection": (
        "vllm_flashtrace.worker.cpu_model",
        "CPUTracedModel",
        "output_projection",
    ),
    "finish": (f"{CAPTURE}.recorder", "Recorder", "finish_step"),
    "scores": (f"{CAPTURE}.finish", None, "sum_shares"),
}


class WorkerFaults:
    """``--worker-extension-cls`` of test servers."""

    def break_phase(self, phase: str) -> None:
        break_function(self, *PHASES[phase])

    def mend_phase(self, phase: str) -> None:
        mend_function(self, *PHASES[phase])
