"""Registers a CPU attention backend that lets a trace see each layer's queries.

What it changes: vLLM's registry entry for ``CPU_ATTN`` names a subclass of the stock backend. After
the stock ``forward`` the subclass calls the current observer, of which there is one only during the
forward pass of a step that computes target rows of a trace.

Why here: ``register_backend`` is vLLM's public extension point and overriding a member keeps vLLM's
own backend selection. The method signature of ``forward`` is private.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm_flashtrace.patches._check import require_parameters
from vllm_flashtrace.patches.recording_attention import FORWARD_PARAMETERS, RecordingAttention


class RecordingCPUAttentionImpl(RecordingAttention, CPUAttentionBackendImpl):
    """The stock implementation, watched by the forward pass's observer if there is one."""


class RecordingCPUAttentionBackend(CPUAttentionBackend):
    """The stock backend with the recording implementation."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The recording subclass."""
        return RecordingCPUAttentionImpl


def check() -> None:
    """Raises PatchError unless the stock ``forward`` has the expected parameters."""
    require_parameters(
        CPUAttentionBackendImpl.forward, "CPUAttentionBackendImpl.forward", *FORWARD_PARAMETERS
    )


def apply() -> None:
    """Registers the recording backend over the stock one."""
    register_backend(
        AttentionBackendEnum.CPU_ATTN,
        f"{RecordingCPUAttentionBackend.__module__}.{RecordingCPUAttentionBackend.__qualname__}",
    )
