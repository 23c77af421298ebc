"""Models the package can prepare on its own, without a model hub."""

from __future__ import annotations

from vllm_flashtrace.models.smollm2 import prepare_smollm2

__all__ = ["prepare_smollm2"]
