"""The recording FlashAttention backend; imported only when vLLM considers that backend."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl
from vllm_flashtrace.patches.recording_attention import RecordingAttention


class RecordingFlashAttentionImpl(RecordingAttention, FlashAttentionImpl):
    """The stock implementation, watched by the forward pass's observer if there is one."""


class RecordingFlashAttentionBackend(FlashAttentionBackend):
    """The stock backend with the recording implementation."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """The recording subclass."""
        return RecordingFlashAttentionImpl
