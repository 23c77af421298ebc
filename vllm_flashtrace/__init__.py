"""FlashTrace for vLLM: which input tokens a completion came from.

Public names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vllm_flashtrace.base import __version__ as __version__

if TYPE_CHECKING:
    from vllm_flashtrace.api.attribution import Attribution
    from vllm_flashtrace.base.errors import (
        FlashTraceError,
        InvalidRequestError,
        TraceError,
        UnsupportedModelError,
    )
    from vllm_flashtrace.offline.flashtrace import FlashTrace
    from vllm_flashtrace.scale.batch.dataset import flashtrace_dataset


__all__ = [
    "Attribution",
    "FlashTrace",
    "FlashTraceError",
    "InvalidRequestError",
    "TraceError",
    "UnsupportedModelError",
    "flashtrace_dataset",
]

_HOME = {
    "Attribution": "vllm_flashtrace.api.attribution",
    "FlashTrace": "vllm_flashtrace.offline.flashtrace",
    "FlashTraceError": "vllm_flashtrace.base.errors",
    "InvalidRequestError": "vllm_flashtrace.base.errors",
    "TraceError": "vllm_flashtrace.base.errors",
    "UnsupportedModelError": "vllm_flashtrace.base.errors",
    "flashtrace_dataset": "vllm_flashtrace.scale.batch.dataset",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
