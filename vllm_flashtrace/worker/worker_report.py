"""What a worker says of itself in the status report.

Invariant: never raises; what vLLM does not tell is ``None``.
"""

from __future__ import annotations

import os
from typing import Any

from vllm_flashtrace.base.processes import lineage


def worker_report(worker: Any) -> dict[str, Any]:
    """Process, device, runner, attention backends and place in the parallel layout.

    Args:
        worker: vLLM's worker.
    """
    parallel = getattr(getattr(worker, "vllm_config", None), "parallel_config", None)
    runner = getattr(worker, "model_runner", None)
    return {
        "pid": os.getpid(),
        "rank": getattr(worker, "rank", None),
        "tensor_parallel_size": getattr(parallel, "tensor_parallel_size", None),
        "pipeline_parallel_size": getattr(parallel, "pipeline_parallel_size", None),
        "data_parallel_rank": getattr(parallel, "data_parallel_index", None),
        "device": str(getattr(runner, "device", None)),
        "runner": _runner_version(runner),
        "attention_backends": _backends(runner),
        "processes": lineage(),
    }


def _runner_version(runner: Any) -> str | None:
    for kind in type(runner).__mro__:
        if kind.__module__ == "vllm.v1.worker.gpu.model_runner":
            return "V2"
        if kind.__module__ == "vllm.v1.worker.gpu_model_runner":
            return "V1"
    return None


def _backends(runner: Any) -> list[str] | None:
    try:
        groups = [group for per_cache in runner.attn_groups for group in per_cache]
        return sorted({str(group.backend.get_name()) for group in groups})
    except Exception:
        return None
