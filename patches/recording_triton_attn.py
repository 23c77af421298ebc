"""The recording Triton attention backend; imported only when vLLM considers that backend."""

from __future__ import annotations

from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl
from vllm_flashtrace.patches.recording_attention import RecordingAttention


class RecordingTritonAttentionImpl(RecordingAttention, TritonAttentionImpl):
    """The stock implementation, watched by the forward pass's observer if there is one."""


class RecordingTritonAttentionBackend(TritonAttentionBackend):
    """The stock backend with the recording implementation."""

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        """The recording subclass."""
        return RecordingTritonAttentionImpl
