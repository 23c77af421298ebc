"""The recording FlashInfer backend; imported only when vLLM considers that backend."""

from __future__ import annotations

from vllm.v1.attention.backends.flashinfer import FlashInferBackend, FlashInferImpl
from vllm_flashtrace.patches.recording_attention import RecordingAttention


class RecordingFlashInferImpl(RecordingAttention, FlashInferImpl):
    """The stock implementation, watched by the forward pass's observer if there is one."""


class RecordingFlashInferBackend(FlashInferBackend):
    """The stock backend with the recording implementation."""

    @staticmethod
    def get_impl_cls() -> type[FlashInferImpl]:
        """The recording subclass."""
        return RecordingFlashInferImpl
