"""Faults injected into a worker process, one per phase of a trace."""

from __future__ import annotations

from typing import Any


def break_function(_: Any, module: str, owner: str | None, name: str) -> None:
    """Runs in the worker: makes ``module[.owner].name`` raise."""
    import importlib

    holder: Any = importlib.import_module(module)
    if owner is not None:
        holder = getattr(holder, owner)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"injected into {name}")

    broken.original = getattr(holder, name)  # type: ignore[attr-defined]
    setattr(holder, name, broken)


def mend_function(_: Any, module: str, owner: str | None, name: str) -> None:
    import importlib

    holder: Any = importlib.import_module(module)
    if owner is not None:
        holder = getattr(holder, owner)
    setattr(holder, name, getattr(holder, name).original)


CAPTURE = "vllm_flashtrace.worker"
PHASES = {
    "registration": (f"{CAPTURE}.recorder", None, "Trace"),
    "batch": ("vllm_flashtrace.patches.model_runner_v1", None, "batch_rows_v1"),
    "observer": ("vllm_flashtrace.worker.runner", None, "StepObserver"),
    "chunk": (f"{CAPTURE}.step", "Trace", "begin_chunk"),
    "row plan": ("vllm_flashtrace.worker.cpu_model", "CPUTracedModel", "plan_rows"),
    "attention": ("vllm_flashtrace.core.attention", "TargetRowBlocks", "add"),
    "key read": ("vllm_flashtrace.worker.cpu_model", None, "read_keys"),
    "value read": ("vllm_flashtrace.worker.cpu_model", None, "read_values"),
    "residual": (f"{CAPTURE}.step", "StepRecorder", "record_update"),
    "proximity": ("vllm_flashtrace.worker.traced_model", None, "proximity"),
    "output projection": (
        "vllm_flashtrace.worker.cpu_model",
        "CPUTracedModel",
        "output_projection",
    ),
    "finish": (f"{CAPTURE}.recorder", "Recorder", "finish_step"),
    "scores": (f"{CAPTURE}.finish", None, "token_shares"),
}


class WorkerFaults:
    """``--worker-extension-cls`` of test servers."""

    def break_phase(self, phase: str) -> None:
        break_function(self, *PHASES[phase])

    def mend_phase(self, phase: str) -> None:
        mend_function(self, *PHASES[phase])
