"""FlashTrace for vLLM: which input tokens a completion came from.

Public names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_flashtrace.attribution import Attribution
    from vllm_flashtrace.batch.dataset import flashtrace_dataset
    from vllm_flashtrace.errors import FlashTraceError, InvalidRequestError, TraceError
    from vllm_flashtrace.offline import FlashTrace

__version__ = "0.1.0"
__all__ = [
    "Attribution",
    "FlashTrace",
    "FlashTraceError",
    "InvalidRequestError",
    "TraceError",
    "flashtrace_dataset",
]

_HOME = {
    "Attribution": "vllm_flashtrace.attribution",
    "FlashTrace": "vllm_flashtrace.offline",
    "FlashTraceError": "vllm_flashtrace.errors",
    "InvalidRequestError": "vllm_flashtrace.errors",
    "TraceError": "vllm_flashtrace.errors",
    "flashtrace_dataset": "vllm_flashtrace.batch.dataset",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
